"""Reading data: ratios of medians, interleaved in one process.

    python benchmarks/data.py feed [--recipes digits shapes ...]
        batches alone against whole training steps: how often the loader could feed the step
    python benchmarks/data.py read [--peers] [--images 20000] [--batch 256]
        random-order batches of cached latents against a bare numpy memmap gather (and HF datasets and webdataset, where
        they are installed: pip install datasets webdataset); the keyed draw of latents and conditions apart
    python benchmarks/data.py decode FOLDER_OF_JPEGS [--resolution 256]
        gesso cache against a plain Pillow loop with the same filter, per core and over all

Absolute times depend on the machine; the ratios are what is reported.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from gesso import recipes
from gesso.data import crops
from gesso.train import loop
from gesso.train.start import opened

QUIET = Console(quiet=True)


def medians(rounds: int, **runs: Callable[[], None]) -> dict[str, float]:
    """Seconds of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def feed(names: list[str], rounds: int) -> dict[str, float]:
    """By recipe: seconds of a training step over seconds of making its batch."""
    found = {}
    for name in names:
        run, dataset = opened(recipes.resolve(name, [])[0], QUIET)
        trainer = loop.Trainer(run, dataset)
        counter = torch.arange(run.train.batch_size)
        some = iter(range(10**9))
        took = medians(
            rounds, step=trainer.step, batch=lambda: trainer.batches(counter + run.train.batch_size * next(some))
        )
        found[name] = took["step"] / took["batch"]
        print(f"{name:16} a step takes {found[name]:.1f} times as long as its batch")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["feed", "read", "decode"])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--recipes", nargs="+", default=["digits", "digits-mp-mmdit++", "digits-dit", "shapes", "shapes-class"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {"feed": lambda: feed(args.recipes, args.rounds)}[args.what]()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
