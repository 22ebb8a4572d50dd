"""Measure the cost of the training loop around the network, as ratios of medians, interleaved in one process.

    python benchmarks/engine.py step [--batch 16] [--resolution 32] [--rounds 15] [--device cuda] [--out FILE.json]
        a training step (random draws, loss, weight normalization, gradient norm, optimizer, two EMAs) against forward,
        backward and fused Adam of the same DiT-S, and parts of the step
    python benchmarks/engine.py save [--batch 16] [--rounds 9] ...
        seconds that training waits for writing a checkpoint and two snapshots, and seconds of a step during writing,
        both against a step
    torchrun --nproc-per-node 2 benchmarks/engine.py ranks [--sharding ddp] ...
        images/s of all ranks against one rank with the same batch (each has one thread)

Absolute times depend on the machine, so that only ratios are reported.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from gesso import recipes, snapshot
from gesso.training import checkpoint, loop
from gesso.training.ranks import init_distributed
from gesso.training.run_folder import open_dataset_for_run
from gesso.training.trainer import Trainer


def make_trainer(args: argparse.Namespace, *settings: str, **trainer_options: object) -> Trainer:
    """Return the trainer of DiT-S/2 on a thousand drawn shapes."""
    defaults = [
        "eval.toy_metrics=none",
        "data.source=shapes:1000",
        "net.name=dit",
        "net.patch_size=2",
        "semantic.kind=label",
        "net.hidden_size=384",
        "net.depth=12",
        "net.num_heads=6",
        f"data.resolution={args.resolution}",
        f"train.batch_size={args.batch}",
        f"train.device={args.device}",
    ]
    run, dataset = open_dataset_for_run(recipes.resolve("shapes-class", [*defaults, *settings])[0], Console(quiet=True))
    return Trainer(run, dataset, **trainer_options)


def seconds(function: Callable[[], object], device: str) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(candidates: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Return the median seconds of each candidate, run in turn after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, function in candidates.items():
            elapsed = seconds(function, device)
            if i:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def plain_step(trainer: Trainer) -> Callable[[], object]:
    """Return a step of forward, backward and optimizer alone, of a network like the trainer's on a fixed batch."""
    net = Trainer(trainer.run, trainer.batcher.dataset).denoiser.net
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6, fused=True)
    _, _, x0, cond = trainer.next_batch()
    trainer._batch_iterator = None
    level = torch.rand(len(x0), device=x0.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x0, 1000 * level, level, cond).square().mean().backward()
        optimizer.step()

    return step


def step(args: argparse.Namespace) -> dict[str, float]:
    """Return seconds of a training step, of a plain step and of parts of the training step."""
    trainer = make_trainer(args)
    sample_index = torch.arange(args.batch, device=args.device)
    results = median_seconds({"plain step": plain_step(trainer), "step": trainer.step}, args.rounds, args.device)
    parts = {
        "part: EMAs": lambda: trainer.ema.update(1000, 1000 + args.batch),
        "part: batch": lambda: trainer.batcher(sample_index),
        "part: optimizer": trainer.optimizer.step,
        "part: log line": trainer.pop_log_line,
    }
    results |= median_seconds(parts, max(31, args.rounds), args.device)
    return results | {"step / plain step": results["step"] / results["plain step"]}


def save(args: argparse.Namespace) -> dict[str, float]:
    """Return seconds that training waits for a checkpoint, and of steps during and after the writing."""
    trainer = make_trainer(args)
    writer = checkpoint.CheckpointWriter()
    times: dict[str, list[float]] = {"step": [], "wait": [], "step during writing": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        out = Path(folder)

        def write() -> None:
            writer.save(out / "state", trainer.nimg, trainer.state_tensors(), 2, False)
            loop._write_snapshots(trainer, out, writer)

        for i in range(args.rounds + 1):
            wait = seconds(write, args.device)
            step_during_writing = seconds(trainer.step, args.device)
            writer.wait()
            step_alone = seconds(trainer.step, args.device)
            if i:
                for name, value in zip(times, (step_alone, wait, step_during_writing), strict=True):
                    times[name].append(value)
        size = sum(file.stat().st_size for file in checkpoint.list_checkpoints(out / "state")[-1].iterdir())
        assert len(snapshot.list_snapshots(out)) == 2 * (args.rounds + 1)
    writer.close()
    results = {name: statistics.median(values) for name, values in times.items()}
    return results | {
        "longest wait": max(times["wait"]),
        "checkpoint, MB": size / 1e6,
        "wait / step": results["wait"] / results["step"],
        "step during writing / step": results["step during writing"] / results["step"],
    }


def ranks(args: argparse.Namespace) -> dict[str, float]:
    """Return seconds and images/s of all ranks and of the main rank alone; nothing on other ranks."""
    torch.set_num_threads(1)
    settings = recipes.resolve("shapes-class", [f"train.batch_size={args.batch}"])[0]
    with init_distributed(settings) as (distributed, device):
        parallel_trainer = make_trainer(args, f"train.sharding={args.sharding}", ranks=distributed, device=device)
        single_trainer = make_trainer(args, device=device) if distributed.is_main else None
        times: dict[str, list[float]] = {"one rank": [], "all ranks": []}
        for i in range(args.rounds + 1):
            single = seconds(single_trainer.step, args.device) if single_trainer else 0.0
            distributed.barrier()
            parallel = seconds(parallel_trainer.step, args.device)
            if i:
                times["one rank"].append(single)
                times["all ranks"].append(parallel)
        results = {name: statistics.median(values) for name, values in times.items()}
        results |= {f"{name}, images/s": args.batch / results[name] for name in times if results[name]}
        results["number of ranks"] = distributed.world_size
        return results | {"speedup": results["one rank"] / results["all ranks"]} if distributed.is_main else {}


def main() -> None:
    """Run a measurement, print and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=["step", "save", "ranks"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sharding", default="ddp")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="folder for the checkpoints")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {"step": step, "save": save, "ranks": ranks}[args.measurement](args)
    environment = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": args.device,
        "load": os.getloadavg()[0],
    }
    for name, value in results.items():
        print(f"{name:28} {value:10.4f}")
    if results:
        print(environment)
    if args.out and results:
        args.out.write_text(json.dumps(vars(args) | environment | results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
