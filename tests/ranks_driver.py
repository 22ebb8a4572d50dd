"""One rank of the runs that tests/test_ranks.py asks for: a JSON list of {out, settings, resume, stop_at, kill}."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from gesso import recipes
from gesso.train import loop
from gesso.train.start import start

STEP = loop.Trainer.step


def main() -> None:
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")  # once for all jobs: torchrun's store serves one
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):

        def step(self, job=job):
            if self.nimg == job.get("stop_at"):
                raise KeyboardInterrupt
            if [self.nimg, self.ranks.rank] == job.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if [self.nimg, self.ranks.rank] == job.get("signal"):
                os.kill(os.getpid(), signal.SIGTERM)
            return STEP(self)

        loop.Trainer.step = step
        run = recipes.resolve("digits", [f"{k}={v}" for k, v in job["settings"].items()])[0]
        try:
            start(run, Path(job["out"]), job.get("resume", False), Console(quiet=True), print)
        except KeyboardInterrupt:
            if "stop_at" not in job:
                raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
