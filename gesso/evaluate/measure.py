"""Scores of a run over any number of samples, drawn and read a part at a time: `gesso evaluate RUN eval.scores=fid,is`.

RUN/evaluation/KEY/     what networks found in parts of the samples (parts.py), until all are there
RUN/scores.json         every measurement, by KEY, with its protocol

A sample depends on its seed alone, and so does its part: any number of ranks share the parts, and after any stop the
same command goes on with those that are not there. KEY stands for the weights and for all that decides a sample.

Legend: N samples, D features.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gesso import ema, files, generate, snapshot, torchrun
from gesso.config import Run
from gesso.data.shards import is_cache, opened_manifest
from gesso.data.sources import open_source
from gesso.errors import UsageError
from gesso.evaluate import compare, lpips, shipped
from gesso.evaluate.features import load_digit_features
from gesso.evaluate.parts import Drawer, Prompt, Spent, Work, embedded, gathered, in_parts
from gesso.evaluate.pictures import Pictures, open_pictures

SIZES = {"lpips": (64, 128, 256, 512, 1024), "told": (4, 8)}
LEAST = 256
"""original sizes that conditional diversity is measured over, and the least of those of "lpips_hr" (Berrada et al. Table 2a).
The text of Section 3.1 speaks of ten generations; five sizes make ten pairs. told: those of data.source=digits-coarse"""
Tick = Callable[[int, int], None]


def measure_folder(folder: Path, run: Run, tick: Tick) -> list[str]:
    """Measure run.eval.scores of a run folder, with the other processes of one torchrun where there are any."""
    rank, world, local, _ = torchrun.place()
    device = generate.device_of(run)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local)
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
    networks = {name: _load(name, asked, run, work.device) for name in names}
    pairs = {name: networks.pop(name) for name in SIZES if name in networks}
    for name in pairs:
        _check_pairs(run, name)
    weights, _, nimg, _ = snapshot.synthesize(work.folder, [work.average or ema.chosen(run.sample)], cfg.nimg)
    protocol = _protocol(work, nimg, networks | pairs, reference)
    place = work.folder / "evaluation" / _key(work, protocol)
    mine = (cfg.images * cfg.repeats if networks else 0) + cfg.diversity_seeds * len(pairs)
    total = mine // work.world + (reference.count * len(networks) if reference and not work.rank else 0)
    seen = compare.Seen(tick, total)
    denoiser, guide = snapshot.denoiser(weights[0], run, work.device), generate.guide_of(work.folder, run)
    drawer = Drawer(work, denoiser, guide, generate.opened_space(run), prompts, snapshot.control_rows(work.folder))
    spent = Spent()
    if networks:
        spent += in_parts(
            work, list(networks), cfg.images, cfg.repeats, place, lambda s: embedded(drawer, networks, s), seen
        )
    for name in pairs:
        spent += in_parts(
            work, [name], cfg.diversity_seeds, 1, place, lambda s, n=name: _distances(drawer, n, pairs[n], s), seen
        )
    if work.rank:
        return {}, []
    found: dict[str, list[float]] = {}
    for name in pairs:
        mean = gathered(place, name, cfg.diversity_seeds, 0).moments.mean.tolist()
        found |= {"lpips": mean[:1], "lpips_hr": mean[1:]} if name == "lpips" else {"told_digits": mean}
    for name, network in networks.items():
        mine = [score for score in cfg.scores if compare.METRICS[score] == name]
        y = compare.beside(reference, network, mine, work.device, seen)
        for repeat in range(cfg.repeats):
            x = gathered(place, name, cfg.images, repeat)
            for score in mine:
                for what, value in compare.scored(score, x, y, network).items():
                    found.setdefault(what, []).append(value)
    result = {
        "scores": {what: _summed(values) for what, values in found.items()},
        "protocol": protocol,
        "speed": spent.speed(),
    }
    if work.average is None:
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


def _check_pairs(run: Run, name: str) -> None:
    """Raise UsageError where the run cannot be told sizes, or draws too small for LPIPS."""
    if "size" not in run.control.variables:
        said = next(score for score, network in compare.METRICS.items() if network == name)
        raise UsageError(
            f"eval.scores={said} compares samples told different sizes; this run has no control variable size"
        )
    if name == "lpips" and min(run.canvas) < lpips.SMALLEST:
        raise UsageError(
            f"eval.scores=lpips needs {lpips.SMALLEST}x{lpips.SMALLEST} and more; this run draws {run.canvas[1]}x{run.canvas[0]}"
        )


def _prompts(run: Run) -> list[Prompt] | None:
    """Captions that samples are drawn for, where the run has words: those of eval.prompts, else of the training images."""
    if run.semantic.kind != "text":
        if "clip" in run.eval.scores:
            raise UsageError("eval.scores=clip needs a run with words; this one has none")
        return None
    where = run.eval.prompts or run.data.source
    source = open_source(where)
    pairs = zip(source.captions(), source.labels.tolist(), strict=True)
    prompts = [Prompt(caption, label) for caption, label in pairs if caption]
    if not prompts:
        raise UsageError(f"eval.prompts={where} has no captions")
    return prompts


def _load(name: str, asked: compare.Asked, run: Run, device: torch.device) -> nn.Module:
    """A network, or a judge that knows what the samples of this run were told."""
    if name == "agreement":
        if not run.inputs.num_classes and run.semantic.kind != "text":
            raise UsageError("eval.scores=agreement needs a run with classes or words; this one has neither")
        return shipped.Agreement(load_digit_features(str(device)))
    if name == "told":
        return shipped.Apart(load_digit_features(str(device)))
    return shipped.Drawn(run.semantic.kind == "text") if name == "drawn" else compare.load(name, asked, device)


def _distances(drawer: Drawer, name: str, network: nn.Module, seeds: Sequence[int]) -> dict[str, Tensor]:
    """{name: (n, 2)}: of each seed, class or prompt, and noise, the mean distance between its samples under two of SIZES;
    of lpips then without those below LEAST (Berrada et al. Section 3.1)."""
    sizes = SIZES[name]
    made = [torch.cat([x for x, _ in drawer.images(seeds, {"size": f"{size}x{size}"})]) for size in sizes]
    pairs = [(i, j) for j in range(len(sizes)) for i in range(j)]
    found = torch.stack([network(made[i], made[j]).cpu() for i, j in pairs], dim=1)
    if name != "lpips":
        return {name: found.mean(dim=1, keepdim=True)}
    sharp = [k for k, (i, _) in enumerate(pairs) if sizes[i] >= LEAST]
    return {name: torch.stack([found.mean(dim=1), found[:, sharp].mean(dim=1)], dim=1)}


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
        **({"average": str(work.average)} if work.average else {}),
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
    if speed := result["speed"]:
        energy = f", {speed['milliwatt_hours']:.3g} mWh each" if "milliwatt_hours" in speed else ""
        lines.append(f"{speed['images_per_second']:.3g} samples a second, drawn and read{energy}")
    return lines
