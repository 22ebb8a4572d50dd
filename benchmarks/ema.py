"""Measure the cost of EMAs in training and of their reconstruction, as ratios of medians, interleaved in one process.

python benchmarks/ema.py update [--batch 64] [--rounds 5] [--device cuda] [--peer FOLDER] [--out FILE.json]
    two EMAs of DiT-S/2 against a training step of it (forward, backward, fused Adam; 32x32x4 latents), and against the
    two of ema-pytorch; install it by `pip install --target FOLDER --no-deps ema-pytorch beartype`
python benchmarks/ema.py reconstruct [--snapshots 64] [--lengths 8] [--megabytes 32] [--folder DIR] [--out FILE.json]
    several lengths from the snapshots of one network in one pass, against one pass per length (`separate`), against
    reading the files into tensors (`tensors`) and against reading their bytes into a small buffer (`bytes`); with
    --cold files are dropped from the page cache before every pass, as for runs larger than the memory
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


def median_seconds(
    candidates: dict[str, Callable[[], None]], rounds: int, device: str, setup: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the median seconds of each candidate, run in turn after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, run in candidates.items():
            setup()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def update(args: argparse.Namespace) -> dict[str, float]:
    """Return seconds of a training step and of EMA updates, and their ratios."""
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

    tracker = ema.Tracker(net.state_dict(), [PowerProfile(0.05), PowerProfile(0.10)])
    nimg = 10_000

    def update_emas() -> None:
        nonlocal nimg
        tracker.update(nimg, nimg + args.batch)
        nimg += args.batch

    # Updates take little time compared with a step, so that they run in more rounds.
    results = median_seconds({"step": step}, args.rounds, device)
    candidates: dict[str, Callable[[], None]] = {"gesso": update_emas}
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
        candidates["ema-pytorch"] = peer.update
    results |= median_seconds(candidates, max(31, args.rounds), device)
    results["gesso / step"] = results["gesso"] / results["step"]
    if args.peer:
        results["gesso / ema-pytorch"] = results["gesso"] / results["ema-pytorch"]
    return results


def reconstruct(args: argparse.Namespace) -> dict[str, float]:
    """Return seconds of reconstructions and of reading the snapshots, and their ratios."""
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        snapshots = _write_snapshots(folder, args.snapshots, args.megabytes)
        targets = [PowerProfile(sigma_rel) for sigma_rel in np.geomspace(0.03, 0.2, args.lengths)]

        def one_pass() -> None:
            snapshot.reconstruct(snapshot.plan_reconstruction(snapshots, targets), args.device)

        def separate() -> None:
            for i, target in enumerate(targets):
                if args.cold and i:
                    drop_page_cache()
                snapshot.reconstruct(snapshot.plan_reconstruction(snapshots, [target]), args.device)

        def read_tensors() -> None:
            for s in snapshots:
                with safe_open(s.path, "pt") as file:
                    for name in list(file.keys()):
                        file.get_tensor(name).clone()

        def read_bytes() -> None:
            buffer = bytearray(2**20)
            for s in snapshots:
                with open(s.path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        def drop_page_cache() -> None:
            for s in snapshots:
                with open(s.path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        candidates = {"one pass": one_pass, "separate": separate, "tensors": read_tensors, "bytes": read_bytes}
        setup = drop_page_cache if args.cold else lambda: None
        results = median_seconds(candidates, args.rounds, args.device, setup)
    finally:
        shutil.rmtree(folder)
    results["separate / one pass"] = results["separate"] / results["one pass"]
    results["one pass / tensors"] = results["one pass"] / results["tensors"]
    results["one pass / bytes"] = results["one pass"] / results["bytes"]
    return results


def _write_snapshots(folder: Path, num_snapshots: int, megabytes: int) -> list[snapshot.Snapshot]:
    """Write snapshots of a network of `megabytes` MB: matrices of 4 MB, each with a vector."""
    for i in range(num_snapshots):
        torch.manual_seed(i)
        matrices = {f"block{j}.weight": torch.randn(1024, 1024) for j in range(max(1, megabytes // 4))}
        tensors = matrices | {f"block{j}.bias": torch.randn(1024) for j in range(len(matrices))}
        nimg, profile = 1_000_000 * (i // 2 + 1), (PowerProfile(0.05), PowerProfile(0.10))[i % 2]
        snapshot.write(snapshot.snapshot_path(folder / "snapshots", nimg, profile), tensors, nimg, profile, "benchmark")
    return snapshot.list_snapshots(folder)


def main() -> None:
    """Run a measurement, print and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=["update", "reconstruct"])
    for name, default in (("batch", 64), ("rounds", 5), ("snapshots", 64), ("lengths", 8), ("megabytes", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", help="folder of ema-pytorch")
    parser.add_argument("--folder", help="folder for the snapshots")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {"update": update, "reconstruct": reconstruct}[args.measurement](args)
    environment = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": args.device,
        "load": os.getloadavg()[0],
    }
    for name, value in results.items():
        print(f"{name:22} {value:10.4f}")
    print(environment)
    if args.out:
        args.out.write_text(json.dumps(vars(args) | environment | results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
