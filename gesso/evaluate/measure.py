"""Scores of a run over any number of samples, drawn and read a part at a time: `gesso evaluate RUN eval.scores=fid,is`.

RUN/evaluation/KEY/inception-000003.safetensors     features of the samples of part 3, written whole
RUN/scores.json                                     every measurement, by KEY, with its protocol

A sample depends on its seed alone, and so does its part: any number of ranks share the parts, and after any stop the
same command goes on with those that are not there. KEY stands for the weights and for all that decides a sample.

Legend: N samples, D features.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso import conditions, ema, files, generate, keyed, snapshot
from gesso.config import Run
from gesso.data.shards import is_cache, opened_manifest
from gesso.data.sources import open_source
from gesso.data.space import Space
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import RunError, UsageError
from gesso.evaluate import compare, lpips
from gesso.evaluate.compare import Statistics
from gesso.evaluate.metrics import Moments
from gesso.evaluate.pictures import Pictures, open_pictures

SIZES = (64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
LEAST = 192
"""original sizes that conditional diversity is measured over: ten, from 64 to 1024, without 64 and 128 for "lpips_hr"; which
ones lie between is our choice"""
Tick = Callable[[int, int], None]
PART = 500
"""samples of a file"""
POLL = 2.0
"""seconds between looks for the parts of other ranks"""


class Work(NamedTuple):
    """What is measured, on this rank of `world`."""

    folder: Path
    run: Run
    device: torch.device
    rank: int = 0
    world: int = 1


def measure_folder(folder: Path, run: Run, tick: Tick) -> list[str]:
    """Measure run.eval.scores of a run folder, with the other processes of one torchrun where there are any."""
    rank, world = (int(os.environ.get(name, plain)) for name, plain in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = generate.device_of(run)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return scores_of(Work(folder, run, device, rank, world), tick)[1]


def scores_of(work: Work, tick: Tick) -> tuple[dict[str, Any], list[str]]:
    """Measure run.eval.scores; returns what scores.json holds of it and the lines to show, on the first rank alone.

    Raises UsageError for what the run or this machine lacks, before any sample is drawn.
    """
    run, cfg = work.run, work.run.eval
    asked = compare.Asked(
        str(work.folder), weights=Path(cfg.weights) if cfg.weights else None, dinov2=cfg.dinov2, clip=cfg.clip
    )
    prompts = _prompts(run)
    alone = set(cfg.scores) <= set(compare.ALONE)
    reference = None if alone else _reference(run)
    names = dict.fromkeys(compare.METRICS[score] for score in cfg.scores)
    networks = {name: compare.load(name, asked, work.device) for name in names}
    pairs = networks.pop("lpips", None)
    if pairs:
        _check_pairs(run)
    weights, _, nimg, _ = snapshot.synthesize(work.folder, [ema.chosen(run.sample)])
    protocol = _protocol(work, nimg, networks, reference)
    place = work.folder / "evaluation" / _key(work, protocol)
    mine = (cfg.images * cfg.repeats if networks else 0) + (cfg.diversity_seeds if pairs else 0)
    total = mine // work.world + (reference.count * len(networks) if reference and not work.rank else 0)
    seen = compare.Seen(tick, total)
    denoiser, guide = snapshot.denoiser(weights[0], run, work.device), generate.guide_of(work.folder, run)
    drawer = Drawer(work, denoiser, guide, generate.opened_space(run), prompts)
    if networks:
        _in_parts(work, list(networks), cfg.images, cfg.repeats, place, lambda s: _embedded(drawer, networks, s), seen)
    if pairs:
        _in_parts(work, ["lpips"], cfg.diversity_seeds, 1, place, lambda s: _distances(drawer, pairs, s), seen)
    if work.rank:
        return {}, []
    found: dict[str, list[float]] = {}
    if pairs:
        mean = _gathered(place, "lpips", cfg.diversity_seeds, 0).moments.mean.tolist()
        found = {"lpips": mean[:1], "lpips_hr": mean[1:]}
    for name, network in networks.items():
        mine = [score for score in cfg.scores if compare.METRICS[score] == name]
        y = None
        if not set(mine) <= set(compare.ALONE):
            keep = any(score in compare.ROWS and score not in compare.ALONE for score in mine)
            y = compare.reference_statistics(reference, network, 64, keep, work.device, seen)
        for repeat in range(cfg.repeats):
            x = _gathered(place, name, cfg.images, repeat)
            for score in mine:
                for what, value in compare.scored(score, x, y, network).items():
                    found.setdefault(what, []).append(value)
    result = {"scores": {what: _summed(values) for what, values in found.items()}, "protocol": protocol}
    _record(work.folder / "scores.json", place.name, result)
    files.remove_folder(place)
    return result, [*_lines(result), *compare.too_few(cfg.images, cfg.scores, networks)]


def _reference(run: Run) -> Pictures:
    """The pictures that samples are compared with: eval.reference, else those that the run was trained on."""
    height, width = run.canvas
    if height != width:
        raise UsageError(f"eval.scores are of squares, and {width}x{height} is sampled: set sample.aspect=null")
    where = run.eval.reference or run.data.source
    if is_cache(where):
        where = opened_manifest(where).plan.data.source
    return open_pictures(where, height)


def _check_pairs(run: Run) -> None:
    """Raise UsageError where the run cannot be told sizes, or draws too small for LPIPS."""
    if "size" not in run.control.variables:
        raise UsageError(
            "eval.scores=lpips compares samples told different sizes; this run has no control variable size"
        )
    if min(run.canvas) < lpips.SMALLEST:
        raise UsageError(
            f"eval.scores=lpips needs {lpips.SMALLEST}x{lpips.SMALLEST} and more; this run draws {run.canvas[1]}x{run.canvas[0]}"
        )


def _prompts(run: Run) -> Sequence[str] | None:
    """Captions that samples are drawn for, where the run has words: those of eval.prompts, else of the training images."""
    if run.semantic.kind != "text":
        if "clip" in run.eval.scores:
            raise UsageError("eval.scores=clip needs a run with words; this one has none")
        return None
    captions = [text for text in open_source(run.eval.prompts or run.data.source).captions() if text]
    if not captions:
        raise UsageError(f"eval.prompts={run.eval.prompts or run.data.source} has no captions")
    return captions


def _labels(run: Run, seeds: Sequence[int]) -> list[int] | None:
    """Classes of the samples of these seeds, where the run has any."""
    classes = run.inputs.num_classes
    if not classes or run.eval.labels == "turn":
        return [seed % classes for seed in seeds] if classes else None
    u = keyed.uniform(run.eval.seed, torch.tensor(list(seeds)), "label of a sample")[:, 0]
    return (u * classes).long().tolist()


def _parts(images: int, repeats: int) -> list[tuple[int, int, range]]:
    """(repeat, part, seeds): no seed is in two repeats."""
    return [
        (repeat, part, range(repeat * images + first, repeat * images + min(first + PART, images)))
        for repeat in range(repeats)
        for part, first in enumerate(range(0, images, PART))
    ]


def _file(place: Path, network: str, repeat: int, part: int) -> Path:
    return place / f"{network}-{repeat}-{part:06d}.safetensors"


class Drawer(NamedTuple):
    """What samples are drawn with."""

    work: Work
    denoiser: Denoiser
    guide: Denoiser | None
    space: Space
    prompts: Sequence[str] | None

    def images(
        self, seeds: Sequence[int], control: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Tensor, list[str] | None]]:
        """Batches of RGB samples (n, 3, H, W) uint8 on the device with their captions; control: what all are told."""
        run, texts = (
            self.work.run,
            None if self.prompts is None else [self.prompts[s % len(self.prompts)] for s in seeds],
        )
        rows = snapshot.control_rows(self.work.folder)
        cond, _ = conditions.build(run, seeds, rows, _labels(run, seeds), texts, control)
        at = 0
        for images in generate.generate(self.denoiser, run, seeds, cond, self.guide, self.space):
            yield images.expand(-1, 3, -1, -1).to(self.work.device), texts and texts[at : at + len(images)]
            at += len(images)


def _embedded(drawer: Drawer, networks: dict[str, nn.Module], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Features of the samples of these seeds by every network."""
    rows: dict[str, list[Tensor]] = {name: [] for name in networks}
    for images, texts in drawer.images(seeds):
        for name, network in networks.items():
            rows[name].append(compare.features_of(network, images, texts if name == "clip" else None))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _distances(drawer: Drawer, network: lpips.LPIPS, seeds: Sequence[int]) -> dict[str, Tensor]:
    """{"lpips": (n, 2)}: of each seed, class or prompt, and noise, the mean LPIPS between its samples under two of SIZES;
    then without those below LEAST (Berrada et al. Section 3.1)."""
    made = [torch.cat([x for x, _ in drawer.images(seeds, {"size": f"{size}x{size}"})]) for size in SIZES]
    pairs = [(i, j) for j in range(len(SIZES)) for i in range(j)]
    found = torch.stack([network(made[i], made[j]).cpu() for i, j in pairs], dim=1)
    sharp = [k for k, (i, _) in enumerate(pairs) if SIZES[i] >= LEAST]
    return {"lpips": torch.stack([found.mean(dim=1), found[:, sharp].mean(dim=1)], dim=1)}


@torch.no_grad()
def _in_parts(
    work: Work,
    names: Sequence[str],
    images: int,
    repeats: int,
    place: Path,
    made: Callable[[Sequence[int]], dict[str, Tensor]],
    seen: compare.Seen,
) -> None:
    """Write what is `made` of the seeds of each part that is not there; the first rank waits for those of the others."""
    place.mkdir(parents=True, exist_ok=True)
    parts = _parts(images, repeats)
    for repeat, part, seeds in parts[work.rank :: work.world]:
        paths = {name: _file(place, name, repeat, part) for name in names}
        if not all(path.is_file() for path in paths.values()):
            for name, rows in made(seeds).items():
                with files.whole(paths[name]) as temporary:
                    save_file({"rows": rows}, temporary)
        seen(len(seeds))
    started = time.monotonic()
    for repeat, part, _ in parts if work.rank == 0 else ():
        for name in names:
            while not (path := _file(place, name, repeat, part)).is_file():
                if time.monotonic() - started > work.run.eval.patience:
                    raise RunError(f"{path} of another rank is not there after {work.run.eval.patience} seconds")
                time.sleep(POLL)


def _gathered(place: Path, network: str, images: int, repeat: int) -> Statistics:
    """Of all parts of one repeat, in order."""
    moments, rows = Moments(), []
    for _, part, _ in _parts(images, 1):
        with safe_open(_file(place, network, repeat, part), "pt") as file:
            rows.append(file.get_tensor("rows"))
        moments.update(rows[-1])
    return Statistics(moments, torch.cat(rows))


def _protocol(work: Work, nimg: int, networks: dict[str, nn.Module], reference: Pictures | None) -> dict[str, Any]:
    """All that decides a number."""
    run, cfg = work.run, work.run.eval
    return {
        "name": cfg.protocol, "images": cfg.images, "diversity_seeds": cfg.diversity_seeds, "repeats": cfg.repeats, "first_seed": 0,
        "labels": cfg.labels if run.inputs.num_classes else None,
        "prompts": (cfg.prompts or run.data.source) if run.semantic.kind == "text" else None,
        "reference": reference.where if reference else None, "reference_images": reference.count if reference else None,
        "reference_pictures": reference.fingerprint if reference else None,
        "reference_resized": "middle square, Lanczos" if reference else None,
        "networks": {name: network.name for name, network in networks.items()},
        "nimg": nimg, **run.sample.model_dump(mode="json", exclude={"batch_size"}),
    }  # fmt: skip


def _key(work: Work, protocol: dict[str, Any]) -> str:
    """Of the weights and of all that decides a sample; how many are drawn apart."""
    used = [(s.path.name, s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in snapshot.stored(work.folder)]
    return hashlib.sha256(json.dumps([protocol, used], sort_keys=True).encode()).hexdigest()[:12]


def _summed(values: list[float]) -> dict[str, float | list[float]]:
    """Over repeats: all, the least, the mean."""
    return {"values": values, "least": min(values), "mean": sum(values) / len(values)}


def _record(path: Path, key: str, result: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    files.write_json(path, known | {key: result})


def _lines(result: dict[str, Any]) -> list[str]:
    protocol, lines = result["protocol"], []
    for name, found in result["scores"].items():
        if name.endswith("_std"):
            continue
        each = ", ".join(f"{value:.4f}" for value in found["values"])
        least = f"   least of {len(found['values'])}: {found['least']:.4f}" if len(found["values"]) > 1 else ""
        lines.append(f"{name:20}{each}{least}")
    reference = f" beside {protocol['reference_images']:,} of {protocol['reference']}" if protocol["reference"] else ""
    said = f" by the protocol {protocol['name']}" if protocol["name"] else ""
    lines.append(f"{protocol['images']:,} samples{reference}{said}; {', '.join(protocol['networks'].values())}")
    return lines
