"""Ranks for the tests. Imports once, then forks the ranks of each launch that it reads from stdin: seconds are saved.

A launch is a line of JSON: world, per_node, port, log (where its ranks speak), jobs, one after the other: {out, settings, recipe,
resume, stop_at, kill, signal, prelude}. Answers with a line of the process ids, and one of the exit codes when all are gone.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from rich.console import Console

import gesso.training.run_folder
from gesso import recipes
from gesso.errors import GessoError
from gesso.training import loop

ORIGINAL_STEP = loop.Trainer.step


def run_jobs(jobs: list[dict]) -> None:
    if "RANK" in os.environ and len(jobs) > 1:
        torch.distributed.init_process_group("gloo")  # once for all jobs: the store serves one
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


def step_with_faults(job: dict):
    def step(self):
        if self.nimg == job.get("stop_at"):
            raise KeyboardInterrupt
        for what, number in (("kill", signal.SIGKILL), ("signal", job.get("number", signal.SIGTERM))):
            if job.get(what) in ([self.nimg, self.ranks.rank], [self.nimg, None]):
                os.kill(os.getpid(), number)
        return ORIGINAL_STEP(self)

    return step


def print_line(text: str) -> None:
    print(text, flush=True)


def run_and_get_exit_code(jobs: list[dict]) -> int:
    """The exit code, as gesso's command line has it."""
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
    world, per_node, port = launch["world"], launch["per_node"] or launch["world"], launch["port"]
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        if world > 1:
            where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node,
                     "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
            os.environ.update({name: str(value) for name, value in where.items()})
        with open(launch["log"], "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = run_and_get_exit_code(launch["jobs"])
        sys.exit(code)  # with all that a process does at its end
    return children


def main() -> None:
    if len(sys.argv) > 1:  # one rank that torchrun started
        sys.exit(run_and_get_exit_code(json.loads(sys.argv[1])))
    gesso.training.run_folder.open_dataset_for_run(
        recipes.resolve("digits", [])[0], Console(quiet=True)
    )  # imports scikit-learn
    torch.optim.Adam([torch.zeros(1)])  # and torch's compiler
    for line in sys.stdin:
        children = fork_ranks(json.loads(line))
        print(json.dumps(children), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
