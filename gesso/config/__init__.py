"""The schema of a run and the ways to fill it. Nothing here imports torch."""

from gesso.config.merge import as_tree, differences, nearest, read, resolve, to_yaml, validate, write
from gesso.config.net import EDM2, MMDiTpp, Net, edm2, mmditpp
from gesso.config.run import EDM, VP, Data, Ema, Eval, Loss, Optim, Process, Run, Sample, Train

__all__ = [
    "EDM",
    "EDM2",
    "VP",
    "Data",
    "Ema",
    "Eval",
    "Loss",
    "MMDiTpp",
    "Net",
    "Optim",
    "Process",
    "Run",
    "Sample",
    "Train",
    "as_tree",
    "differences",
    "edm2",
    "mmditpp",
    "nearest",
    "read",
    "resolve",
    "to_yaml",
    "validate",
    "write",
]
