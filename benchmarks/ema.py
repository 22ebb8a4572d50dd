"""What averages cost: in training, and made into others afterwards. Interleaved in one process: ratios of medians.

    python benchmarks/ema.py update [--batch 64] [--rounds 5] [--device cuda] [--peer FOLDER] [--out FILE.json]
    python benchmarks/ema.py make [--snapshots 64] [--lengths 8] [--megabytes 32] [--folder DIR] [--out FILE.json]

update: two averages of DiT-S/2 against a training step of it (forward, backward, fused Adam; 32x32x4 latents), and
against ema-pytorch's two, which `pip install --target FOLDER --no-deps ema-pytorch beartype` puts where --peer says.
make: several lengths from snapshots of one network in one pass, against a pass for each and against reading the files
once: into tensors with safetensors (`tensors`), and by the system's read alone into one small buffer (`read`). With
--cold every pass begins with files that are on the disk alone, as those of a run larger than the memory are.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from gesso import ema, models, snapshot
from gesso.conditioning import Cond
from gesso.config import DiTConfig, InputSpec
from gesso.ema import PowerProfile


def timed(
    contestants: dict[str, Callable[[], None]], rounds: int, device: str, before: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of each, taken in turn after one unmeasured round."""
    actual: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            before()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                actual[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in actual.items()}


def update(args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    device = args.device
    net = models.build_network(
        DiTConfig(hidden_size=384, depth=12, num_heads=6, patch_size=2), InputSpec(4, 32, 1000)
    ).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5, fused=True)
    x = torch.randn(args.batch, 4, 32, 32, device=device)
    level = torch.rand(args.batch, device=device)
    cond = Cond(label=torch.arange(args.batch, device=device))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x, 1000 * level, level, cond).square().mean().backward()
        optimizer.step()

    tracker, seen = ema.Tracker(net.state_dict(), [PowerProfile(0.05), PowerProfile(0.10)]), [10_000]

    def ours() -> None:
        tracker.update(seen[0], seen[0] + args.batch)
        seen[0] += args.batch_size

    # A step takes long, an average little: the latter in more rounds of their own.
    actual = timed({"step": step}, args.rounds, device)
    contestants: dict[str, Callable[[], None]] = {"gesso": ours}
    if args.peer:
        sys.path.append(args.peer)
        from ema_pytorch import PostHocEMA

        with tempfile.TemporaryDirectory() as folder:
            peer = PostHocEMA(
                net,
                sigma_rels=(0.05, 0.10),
                update_every=1,
                checkpoint_every_num_steps="manual",
                checkpoint_folder=folder,
            )
        contestants["ema-pytorch"] = peer.update
    actual |= timed(contestants, max(31, args.rounds), device)
    actual["gesso / step"] = actual["gesso"] / actual["step"]
    if args.peer:
        actual["gesso / ema-pytorch"] = actual["gesso"] / actual["ema-pytorch"]
    return actual


def make(args: argparse.Namespace) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        available = _written(folder, args.snapshots, args.megabytes)
        targets = [PowerProfile(s) for s in np.geomspace(0.03, 0.2, args.lengths)]

        def once() -> None:
            snapshot.reconstruct(snapshot.plan_reconstruction(available, targets), args.device)

        def each() -> None:
            for i, target in enumerate(targets):
                if args.cold and i:
                    forget()
                snapshot.reconstruct(snapshot.plan_reconstruction(available, [target]), args.device)

        def tensors() -> None:
            for s in available:
                with safe_open(s.path, "pt") as file:
                    for name in list(file.keys()):
                        file.get_tensor(name).clone()

        def read() -> None:
            buffer = bytearray(2**20)
            for s in available:
                with open(s.path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        def forget() -> None:
            for s in available:
                with open(s.path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        contestants = {"once": once, "each": each, "tensors": tensors, "read": read}
        actual = timed(contestants, args.rounds, args.device, forget if args.cold else lambda: None)
    finally:
        shutil.rmtree(folder)
    actual["each / once"] = actual["each"] / actual["once"]
    actual["once / tensors"] = actual["once"] / actual["tensors"]
    actual["once / read"] = actual["once"] / actual["read"]
    return actual


def _written(folder: Path, count: int, megabytes: int) -> list[snapshot.Snapshot]:
    """Snapshots of a network of so many megabytes: matrices of 4 MB, each with a vector."""
    for i in range(count):
        torch.manual_seed(i)
        matrices = {f"block{j}.weight": torch.randn(1024, 1024) for j in range(max(1, megabytes // 4))}
        tensors = matrices | {f"block{j}.bias": torch.randn(1024) for j in range(len(matrices))}
        nimg, profile = 1_000_000 * (i // 2 + 1), (PowerProfile(0.05), PowerProfile(0.10))[i % 2]
        snapshot.write(snapshot.snapshot_path(folder / "snapshots", nimg, profile), tensors, nimg, profile, "benchmark")
    return snapshot.list_snapshots(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["update", "make"])
    for name, default in (("batch", 64), ("rounds", 5), ("snapshots", 64), ("lengths", 8), ("megabytes", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", help="folder of ema-pytorch")
    parser.add_argument("--folder", help="where the snapshots are written")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    actual = {"update": update, "make": make}[args.what](args)
    how = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": args.device,
        "load": os.getloadavg()[0],
    }
    for name, value in actual.items():
        print(f"{name:22} {value:10.4f}")
    print(how)
    if args.out:
        args.out.write_text(json.dumps(vars(args) | how | actual, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
