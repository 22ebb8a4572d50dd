"""What the loop costs beside the network: ratios of medians, interleaved in one process.

    python benchmarks/engine.py step [--batch 16] [--resolution 32] [--rounds 15] [--device cuda] [--out FILE.json]
        a step of training (draws, loss, sphere, norm, optimizer, two averages) against forward, backward and fused Adam of
        the same DiT-S alone, and parts of it apart
    python benchmarks/engine.py save [--batch 16] [--rounds 9] ...
        how long the training waits when a state and two snapshots are written, against a step; steps beside the writing
    torchrun --nproc-per-node 2 benchmarks/engine.py ranks [--sharding ddp] ...
        images/s of these ranks together against the first alone on as many images (each has one thread)

Absolute times depend on the machine; the ratios are what is reported.
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


def trainer_of(args: argparse.Namespace, *settings: str, **how: object) -> Trainer:
    """DiT-S/2 on drawn shapes, a thousand of them."""
    output = [
        "eval.toy_metrics=none",
        "data.source=shapes:1000",
        "net.name=dit",
        "net.patch_size=2",
        "semantic.kind=label",
        "net.hidden_size=384",
        "net.depth=12",
        "net.num_heads=6",
        f"data.resolution={args.resolution}",
        f"train.batch_size={args.batch_size}",
        f"train.device={args.device}",
    ]
    run, dataset = open_dataset_for_run(recipes.resolve("shapes-class", [*output, *settings])[0], Console(quiet=True))
    return Trainer(run, dataset, **how)


def seconds(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed(contestants: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, taken in turn after one unmeasured round."""
    actual: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, function in contestants.items():
            elapsed = seconds(function, device)
            if i:
                actual[name].append(elapsed)
    return {name: statistics.median(values) for name, values in actual.items()}


def bare(trainer: Trainer) -> Callable[[], object]:
    """Forward, backward and optimizer step of another network like the trainer's, on a batch made before."""
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
    trainer = trainer_of(args)
    plain = bare(trainer)
    counter = torch.arange(args.batch, device=args.device)
    actual = timed({"bare": plain, "step": trainer.step}, args.rounds, args.device)
    parts = {
        "averages": lambda: trainer.ema.update(1000, 1000 + args.batch),
        "batch": lambda: trainer.batcher(counter),
        "optimizer": trainer.optimizer.step,
        "summary": trainer.pop_log_line,
    }
    actual |= {f"part: {name}": value for name, value in timed(parts, max(31, args.rounds), args.device).items()}
    return actual | {"step / bare": actual["step"] / actual["bare"]}


def save(args: argparse.Namespace) -> dict[str, float]:
    trainer = trainer_of(args)
    saver, waits, others, alone = checkpoint.CheckpointWriter(), [], [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        out = Path(folder)

        def write() -> None:
            saver.save(out / "state", trainer.nimg, trainer.state_tensors(), 2, False)
            loop._write_snapshots(trainer, out, saver)

        for i in range(args.rounds + 1):
            waited = seconds(write, args.device)
            first = seconds(trainer.step, args.device)
            saver.wait()
            if i:
                waits.append(waited)
                others.append(first)
                alone.append(seconds(trainer.step, args.device))
        size = sum(file.stat().st_size for file in checkpoint.list_checkpoints(out / "state")[-1].iterdir())
        assert len(snapshot.list_snapshots(out)) == 2 * (args.rounds + 1)
    saver.close()
    actual = {
        "step": statistics.median(alone),
        "wait": statistics.median(waits),
        "step beside": statistics.median(others),
    }
    actual |= {"longest wait": max(waits), "megabytes of a state": size / 1e6}
    return actual | {
        "wait / step": actual["wait"] / actual["step"],
        "step beside / step": actual["step beside"] / actual["step"],
    }


def ranks(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    settings = recipes.resolve("shapes-class", [f"train.batch_size={args.batch}"])[0]
    with init_distributed(settings) as (here, device):
        together = trainer_of(args, f"train.sharding={args.sharding}", ranks=here, device=device)
        alone = trainer_of(args, device=device) if here.is_main else None
        times: dict[str, list[float]] = {"alone": [], "together": []}
        for i in range(args.rounds + 1):
            elapsed = seconds(alone.step, args.device) if alone else 0.0
            here.barrier()
            both = seconds(together.step, args.device)
            if i:
                times["alone"].append(elapsed)
                times["together"].append(both)
        actual = {name: statistics.median(values) for name, values in times.items()}
        actual |= {f"{name}, images/s": args.batch / actual[name] for name in times if actual[name]}
        actual["ranks"] = here.world_size
        return actual | {"times as fast": actual["alone"] / actual["together"]} if here.is_main else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "save", "ranks"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sharding", default="ddp")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where states are written")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    actual = {"step": step, "save": save, "ranks": ranks}[args.what](args)
    how = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": args.device,
        "load": os.getloadavg()[0],
    }
    for name, value in actual.items():
        print(f"{name:24} {value:10.4f}")
    if actual:
        print(how)
    if args.out and actual:
        args.out.write_text(json.dumps(vars(args) | how | actual, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
