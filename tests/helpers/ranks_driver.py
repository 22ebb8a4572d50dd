"""Process that forks ranks for tests; imports happen once, which saves seconds per launch.

Reads one launch per line of stdin as JSON: world, per_node, port, log (file for the output of the ranks) and jobs,
which run one after another: {out, settings, recipe, resume, stop_at, kill, signal, prelude}. Answers each launch with a
line of the process ids, and with a line of the exit codes after all ranks have ended.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

import gesso.training.run_folder
from gesso import recipes
from gesso.errors import GessoError
from gesso.training import loop

ORIGINAL_STEP = loop.Trainer.step


def run_jobs(jobs: list[dict]) -> None:
    """Train all jobs in this process."""
    if "RANK" in os.environ and len(jobs) > 1:
        torch.distributed.init_process_group("gloo")  # once for all jobs, because the store serves one group
    torch.set_num_threads(1)
    for job in jobs:
        exec(job.get("prelude", ""), {})
        loop.Trainer.step = step_with_faults(job)
        run = recipes.resolve(job.get("recipe", "digits"), [f"{k}={v}" for k, v in job["settings"].items()])[0]
        try:
            gesso.training.run_folder.start_training(
                run, Path(job["out"]), job.get("resume", False), Console(quiet=True), print_line
            )
        except KeyboardInterrupt:
            if "stop_at" not in job:
                raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def step_with_faults(job: dict) -> Callable[[loop.Trainer], object]:
    """Return a training step that first stops, kills or signals this rank where the job says so."""

    def step(self):
        if self.nimg == job.get("stop_at"):
            raise KeyboardInterrupt
        for kind, number in (("kill", signal.SIGKILL), ("signal", job.get("number", signal.SIGTERM))):
            if job.get(kind) in ([self.nimg, self.ranks.rank], [self.nimg, None]):
                os.kill(os.getpid(), number)
        return ORIGINAL_STEP(self)

    return step


def print_line(text: str) -> None:
    """Print a line at once, so that the log is complete when a rank is killed."""
    print(text, flush=True)


def run_and_get_exit_code(jobs: list[dict]) -> int:
    """Return the exit code of jobs, as the command line of gesso would."""
    try:
        run_jobs(jobs)
    except GessoError as error:
        print(f"gesso: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def fork_ranks(launch: dict) -> list[int]:
    """Fork all ranks of a launch; return their process ids."""
    world, per_node, port = launch["world"], launch["per_node"] or launch["world"], launch["port"]
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        if world > 1:
            environment = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % per_node,
            "LOCAL_WORLD_SIZE": per_node,
                     "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
            os.environ.update({name: str(value) for name, value in environment.items()})
        with open(launch["log"], "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = run_and_get_exit_code(launch["jobs"])
        sys.exit(code)  # runs exit handlers, unlike os._exit
    return children


def main() -> None:
    """Serve launches from stdin, or run the jobs of the command line as a rank of torchrun."""
    if len(sys.argv) > 1:  # a rank that torchrun started
        sys.exit(run_and_get_exit_code(json.loads(sys.argv[1])))
    # Import scikit-learn and the compiler of torch before the first fork.
    gesso.training.run_folder.open_dataset_for_run(recipes.resolve("digits", [])[0], Console(quiet=True))
    torch.optim.Adam([torch.zeros(1)])
    for line in sys.stdin:
        children = fork_ranks(json.loads(line))
        print(json.dumps(children), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
