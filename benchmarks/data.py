"""Measure the speed of data loading as ratios of medians, with the candidates interleaved in one process.

    python benchmarks/data.py feed [--recipes digits shapes ...]
        seconds of a training step over seconds of loading its batch
    python benchmarks/data.py read [--peers] [--images 20000] [--batch 256]
        batches of cached latents in random order against indexing a numpy memmap; with --peers also HF datasets and
        webdataset (pip install datasets webdataset)
    python benchmarks/data.py decode FOLDER_OF_JPEGS [--resolution 256]
        gesso cache against a plain Pillow loop with the same filter, on one core and on all cores

Absolute times depend on the machine, so that only ratios are reported.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from gesso import recipes
from gesso.config import DataConfig, LatentConfig
from gesso.data.normalization import Normalizer
from gesso.training import loop
from gesso.training.run_folder import open_dataset_for_run

QUIET = Console(quiet=True)
NUM_SLOW_BATCHES = 4  # batches that slow candidates read


def median_seconds(rounds: int, **candidates: Callable[[], None]) -> dict[str, float]:
    """Return the median seconds of each candidate, run in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def feed(names: list[str], rounds: int) -> dict[str, float]:
    """Return by recipe: seconds of a training step over seconds of loading its batch."""
    ratios = {}
    for name in names:
        run, dataset = open_dataset_for_run(recipes.resolve(name, [])[0], QUIET)
        trainer = loop.Trainer(run, dataset)
        first_batch = torch.arange(run.train.batch_size)
        batches = (first_batch + len(first_batch) * i for i in itertools.count())
        seconds = median_seconds(
            rounds, step=trainer.step, batch=lambda load=trainer.batcher, indices=batches: load(next(indices))
        )
        ratios[name] = seconds["step"] / seconds["batch"]
        print(f"{name:16} a step takes {ratios[name]:.1f} times as long as its batch")
    return ratios


def read(num_images: int, batch_size: int, rounds: int, peers: bool) -> dict[str, float]:
    """Return the throughput of random batches of 8x32x32 float16 latents, relative to indexing a numpy memmap."""
    from gesso.data.cache import write
    from gesso.data.cache.plan import CachePlan
    from gesso.data.cache.read import CachedDataset

    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        rows = rng.standard_normal((num_images, 8, 32, 32)).astype(np.float32)
        rows[:, 4:] = np.abs(rows[:, 4:])
        with zipfile.ZipFile(root / "latents.zip", "w") as archive:
            for i, row in enumerate(rows):
                raw = io.BytesIO()
                np.save(raw, row)
                archive.writestr(f"{i // 1000:05d}/img-mean-std-{i:08d}.npy", raw.getvalue())
        rows.astype(np.float16).tofile(root / "memmap")
        data = DataConfig(source=str(root / "latents.zip"), resolution=256)
        plan = CachePlan(data=data, latent=LatentConfig(vae="any/name", convention="edm2"), dtype="float16")
        write.write_cache(plan, root / "cache")
        memmap = np.memmap(root / "memmap", np.float16, "r", shape=rows.shape)
        cache = CachedDataset(root / "cache")
        batches = torch.from_numpy(rng.permutation(num_images)).split(batch_size)[:40]
        latent = LatentConfig(vae="any/name", convention="edm2")
        normalizer = Normalizer(DataConfig(mean=(0.0,) * 4, std=(1.0,) * 4), latent, 0.5, "cpu")
        candidates: dict[str, Callable[[], None]] = {
            "memmap": lambda: [memmap[index.numpy()] for index in batches],
            "cache": lambda: [cache.get(index, index) for index in batches],
            "latents sampled": lambda: [
                normalizer.to_x0(cache.get(index, index).x, 0, index) for index in batches[:NUM_SLOW_BATCHES]
            ],
        }
        if peers:
            candidates |= _peers(root, rows.astype(np.float16), batches)
        seconds = median_seconds(rounds, **candidates)
        for name in {"latents sampled", "HF Array3D"} & seconds.keys():  # read fewer batches
            seconds[name] *= len(batches) / NUM_SLOW_BATCHES
    ratios = {name: seconds["memmap"] / value for name, value in seconds.items() if name != "memmap"}
    for name, ratio in ratios.items():
        print(f"{name:16} {ratio:.3f} times the throughput of a memmap")
    return ratios


def _peers(root: Path, rows: np.ndarray, batches: list[torch.Tensor]) -> dict[str, Callable[[], None]]:
    """Return readers of the same rows by HF datasets (random order) and webdataset (order of its tar)."""
    import datasets
    import webdataset

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"x": [row.tobytes() for row in rows]})
    table.save_to_disk(str(root / "hf"))
    table = datasets.load_from_disk(str(root / "hf"))
    shaped = datasets.Features({"x": datasets.Array3D((8, 32, 32), "float16")})
    datasets.Dataset.from_dict({"x": list(rows)}, features=shaped).save_to_disk(str(root / "hf3"))
    arrays = datasets.load_from_disk(str(root / "hf3")).with_format("numpy")
    with webdataset.TarWriter(str(root / "wds.tar")) as tar:
        for i, row in enumerate(rows):
            tar.write({"__key__": f"{i:08d}", "x.npy": row})
    num_rows = sum(len(index) for index in batches)

    def hf() -> None:
        for index in batches:
            np.stack([np.frombuffer(raw, np.float16).reshape(8, 32, 32) for raw in table[index.tolist()]["x"]])

    def wds() -> None:
        stream = webdataset.WebDataset(str(root / "wds.tar"), shardshuffle=False).decode().to_tuple("x.npy")
        batch = []
        for (row,) in itertools.islice(stream, num_rows):
            batch.append(row)
            if len(batch) == len(batches[0]):
                np.stack(batch)
                batch = []

    def hf_arrays() -> None:
        for index in batches[:NUM_SLOW_BATCHES]:
            np.asarray(arrays[index.tolist()]["x"])

    return {"HF bytes": hf, "HF Array3D": hf_arrays, "webdataset": wds}


def decode(folder: str, resolution: int, rounds: int) -> dict[str, float]:
    """Return the speed of gesso cache over a plain Pillow loop that writes nothing, on one core and on all cores."""
    from gesso.data.cache import write
    from gesso.data.cache.plan import CachePlan

    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))

    def center_crop(path: Path) -> np.ndarray:
        with Image.open(path) as file:
            image = file.convert("RGB")
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))

    def pool() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(center_crop, files))

    def cache() -> None:
        with tempfile.TemporaryDirectory() as out:
            write.write_cache(CachePlan(data=DataConfig(source=folder, resolution=resolution)), Path(out) / "c")

    seconds = median_seconds(
        rounds, cache=cache, one_core=lambda: [center_crop(path) for path in files], thread_pool=pool
    )
    ratios = {
        "on one core": seconds["one_core"] / seconds["cache"],
        "in a thread pool": seconds["thread_pool"] / seconds["cache"],
    }
    for name, ratio in ratios.items():
        print(f"gesso cache is {ratio:.2f} times as fast as a Pillow loop {name}")
    return ratios


def main() -> None:
    """Run a measurement and print its ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=["feed", "read", "decode"])
    parser.add_argument("folder", nargs="?")
    parser.add_argument(
        "--recipes", nargs="+", default=["digits", "digits-mp-mmdit++", "digits-dit", "shapes", "shapes-class"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {
        "feed": lambda: feed(args.recipes, args.rounds),
        "read": lambda: read(args.images, args.batch, args.rounds, args.peers),
        "decode": lambda: decode(args.folder, args.resolution, args.rounds),
    }[args.measurement]()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
