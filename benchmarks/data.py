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
    actual = {}
    for name in names:
        run, dataset = open_dataset_for_run(recipes.resolve(name, [])[0], QUIET)
        trainer = loop.Trainer(run, dataset)
        counter = torch.arange(run.train.batch_size)
        counters = (counter + len(counter) * i for i in itertools.count())
        took = medians(rounds, step=trainer.step, batch=lambda make=trainer.batcher, k=counters: make(next(k)))
        actual[name] = took["step"] / took["batch"]
        print(f"{name:16} a step takes {actual[name]:.1f} times as long as its batch")
    return actual


def read(images: int, size: int, rounds: int, peers: bool) -> dict[str, float]:
    """Random-order batches of 8x32x32 fp16 latents: samples/s over those of a numpy memmap gather."""
    from gesso.data.cache import write
    from gesso.data.cache.plan import CachePlan
    from gesso.data.cache.read import CachedDataset

    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        rows = rng.standard_normal((images, 8, 32, 32)).astype(np.float32)
        rows[:, 4:] = np.abs(rows[:, 4:])
        with zipfile.ZipFile(root / "latents.zip", "w") as archive:
            for i, row in enumerate(rows):
                raw = io.BytesIO()
                np.save(raw, row)
                archive.writestr(f"{i // 1000:05d}/img-mean-std-{i:08d}.npy", raw.getvalue())
        rows.astype(np.float16).tofile(root / "bare")
        data = DataConfig(source=str(root / "latents.zip"), resolution=256)
        plan = CachePlan(data=data, latent=LatentConfig(vae="any/name", convention="edm2"), dtype="float16")
        write.write_cache(plan, root / "cache")
        bare = np.memmap(root / "bare", np.float16, "r", shape=rows.shape)
        cache = CachedDataset(root / "cache")
        some = torch.from_numpy(rng.permutation(images)).split(size)[:40]
        latent = LatentConfig(vae="any/name", convention="edm2")
        space = Normalizer(DataConfig(mean=(0.0,) * 4, std=(1.0,) * 4), latent, 0.5, "cpu")
        runs: dict[str, Callable[[], None]] = {
            "bare": lambda: [bare[index.numpy()] for index in some],
            "cache": lambda: [cache.get(index, index) for index in some],
            "latents drawn": lambda: [space.to_x0(cache.get(index, index).x, 0, index) for index in some[:4]],
        }
        share = {"latents drawn": 4 / len(some), "HF Array3D": 4 / len(some)}
        if peers:
            runs |= _peers(root, rows.astype(np.float16), some)
        took = medians(rounds, **runs)
    actual = {name: took["bare"] / (seconds / share.get(name, 1)) for name, seconds in took.items() if name != "bare"}
    for name, ratio in actual.items():
        print(f"{name:16} {ratio:.3f} of a bare memmap gather")
    return actual


def _peers(root: Path, rows: np.ndarray, some: list[torch.Tensor]) -> dict[str, Callable[[], None]]:
    """The same rows through HF datasets (random order) and webdataset (as it reads: in the order of its tar)."""
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
    count = sum(len(index) for index in some)

    def hf() -> None:
        for index in some:
            np.stack([np.frombuffer(raw, np.float16).reshape(8, 32, 32) for raw in table[index.tolist()]["x"]])

    def wds() -> None:
        stream = webdataset.WebDataset(str(root / "wds.tar"), shardshuffle=False).decode().to_tuple("x.npy")
        batch = []
        for (row,) in itertools.islice(stream, count):
            batch.append(row)
            if len(batch) == len(some[0]):
                np.stack(batch)
                batch = []

    def hf_arrays() -> None:
        for index in some[:4]:
            np.asarray(arrays[index.tolist()]["x"])

    return {"HF bytes": hf, "HF Array3D": hf_arrays, "webdataset": wds}


def decode(folder: str, resolution: int, rounds: int) -> dict[str, float]:
    """JPEGs to centre crops: gesso cache, and a plain Pillow loop with the same filter on one core and on all."""
    from gesso.data.cache import write
    from gesso.data.cache.plan import CachePlan

    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))

    def plain(path: Path) -> np.ndarray:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))

    def pool() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(plain, files))

    def cache() -> None:
        with tempfile.TemporaryDirectory() as out:
            write.write_cache(CachePlan(data=DataConfig(source=folder, resolution=resolution)), Path(out) / "c")

    took = medians(rounds, cache=cache, one=lambda: [plain(path) for path in files], pool=pool)
    actual = {
        "over one core": took["one"] / took["cache"],
        "over a pool of threads": took["pool"] / took["cache"],
    }
    for name, ratio in actual.items():
        print(f"gesso cache is {ratio:.2f} times as fast as a plain Pillow loop {name}")
    return actual


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["feed", "read", "decode"])
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
    }[args.what]()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
