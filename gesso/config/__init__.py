"""The schema of a run and the ways to fill it. Nothing here imports torch."""

from gesso.config.condition import CONTROLS, Controls, Dropout, Semantic
from gesso.config.explain import explained
from gesso.config.init import Init
from gesso.config.merge import as_tree, differences, flat, nearest, read, recorded, resolve, to_yaml, validate, write
from gesso.config.net import (
    EDM2,
    MDT,
    Control,
    DiT,
    DiTAtt,
    EDM2Ladder,
    Inputs,
    MMDiT,
    MMDiTpp,
    MPDiT,
    MPMMDiTpp,
    Net,
    PixArt,
    UNet,
    edm2,
    mmditpp,
)
from gesso.config.process import EDM, RF, VP, Process
from gesso.config.run import Data, Ema, Eval, Latent, Resize, Run
from gesso.config.sample import Sample
from gesso.config.train import Group, Loss, Optim, Train
from gesso.config.watch import Watch

__all__ = [
    "CONTROLS", "EDM", "EDM2", "MDT", "RF", "VP", "Control", "Controls", "Data", "DiT", "DiTAtt", "Dropout", "EDM2Ladder", "Ema", "Eval", "Group", "Init", "Inputs", "Latent", "Loss", "MMDiT",
    "MMDiTpp", "MPDiT", "MPMMDiTpp", "Net", "Optim", "PixArt", "Process", "Resize", "Run", "Sample", "Semantic", "Train", "UNet", "Watch",
    "as_tree", "differences", "edm2", "explained", "flat", "mmditpp", "nearest", "read", "recorded", "resolve", "to_yaml", "validate", "write",
]  # fmt: skip
