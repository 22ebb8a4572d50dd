"""Scores of a run over any number of samples, drawn and read a part at a time: `gesso evaluate RUN eval.scores=fid,is`.

RUN/evaluation/KEY/     what networks found in parts of the samples (parts.py), until all are there
RUN/scores.json         every measurement, by KEY, with its protocol

A sample depends on its seed alone, and so does its part: any number of ranks share the parts, and after any stop the
same command goes on with those that are not there. KEY stands for the weights and for all that decides a sample.

Legend: N samples, D features.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gesso import ema, files, generate, snapshot, torchrun
from gesso.config import Run
from gesso.data.dataset import open_dataset
from gesso.data.shards import is_cache, opened_manifest
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.evaluate import compare, drawer, lpips, metrics, shipped, statistics, validation
from gesso.evaluate.drawer import SIZES, Drawer
from gesso.evaluate.features import load_digit_features
from gesso.evaluate.parts import Spent, Step, Work, gathered, in_parts
from gesso.evaluate.pictures import Pictures, open_pictures
from gesso.evaluate.statistics import Kept, Seen, Statistics, Tick
from gesso.evaluate.validation import Validation

READ = 20_000
"""pictures of a reference whose moments make a file"""
BATCH = 64
"""of them that a network reads at once"""


def measure_folder(folder: Path, run: Run, tick: Tick) -> list[str]:
    """Measure run.eval.scores of a run folder, with the other processes of one torchrun where there are any."""
    rank, world, local, _ = torchrun.place()
    device = generate.device_of(run)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)  # of all that is put on "cuda": guides, VAEs
    averages = [run, *(_with_halflife(run, halflife) for halflife in run.eval.halflives)]
    if len(averages) == 1:
        return scores_of(Work(folder, run, device, rank, world), tick)[1]
    lines: list[str] = []
    for each in averages:
        found = scores_of(Work(folder, each, device, rank, world), tick)[1]
        lines += [f"average: {ema.chosen(each.sample)}", *found] if found else []
    return lines


def _with_halflife(run: Run, halflife: int) -> Run:
    """Return the run as it is sampled with its traditional average of that half-life."""
    return run.model_copy(update={"sample": run.sample.model_copy(update={"halflife": halflife})})


def scores_of(work: Work, tick: Tick) -> tuple[dict[str, Any], list[str]]:
    """Measure run.eval.scores; returns what scores.json holds of it and the lines to show, on the first rank alone.

    Raises UsageError for what the run or this machine lacks, before any sample is drawn.
    """
    run, cfg = work.run, work.run.eval
    judges = _judges(work)
    reference = _reference(run) if any(judge.compares for judge in judges) else None
    if reference:
        compare.check_subsets(cfg.scores, cfg.kid_subset, [cfg.images, reference.count], "eval.kid_subset")
    validated = _validation(work) if "loss" in cfg.scores else None
    weights, _, nimg, fits = snapshot.synthesize(work.folder, [work.average or ema.chosen(run.sample)], cfg.nimg)
    protocol = _protocol(work, nimg, judges, reference, validated)
    place = work.folder / "evaluation" / _key(work, protocol)
    denoiser = snapshot.denoiser(weights[0], run, work.device)
    drawn, steps, notes = {}, {}, compare.unusual_subsets(protocol)
    if judges:
        draws = drawer.opened(work.folder, run, denoiser, work.device)
        drawn, notes = _drawn(draws, judges), [*notes, *_repeated_captions(run, draws.prompts)]
    if validated:
        steps["loss"] = Step(("loss",), cfg.loss_pairs, functools.partial(_losses, validated, denoiser))
    beside = {j.name: _beside(reference, j, work.device) for j in judges if j.compares} if reference else {}
    steps |= {f"reference of {name}": each.step for name, each in beside.items() if each.step}
    total = sum(step.count * (step.repeats - step.first) for step in (drawn | steps).values())
    seen = Seen(tick, total // work.world)
    spent = sum((in_parts(work, step, place, seen) for step in drawn.values()), Spent())
    for step in steps.values():
        in_parts(work, step, place, seen)
    if work.rank:
        return {}, []
    found: dict[str, list[float]] = {}
    for judge in judges:
        y = beside[judge.name].statistics(place) if judge.name in beside else None
        found |= _found(judge, run, drawn, y, place)
    if validated:
        found |= _found_losses(validated, steps["loss"], place)
    result = {
        "scores": {what: _summed(what, found) for what in found},
        "protocol": protocol,
        "speed": spent.speed(),
    }
    if work.average is None:
        _record(work.folder / "scores.json", place.name, result)
    files.remove_folder(place)
    poor = fits[0].error > generate.POOR**2
    warnings = [f"warning: the stored averages hardly make one of {ema.chosen(run.sample)}: {fits[0]}"] * poor
    return result, [
        *warnings,
        *_lines(result),
        *notes,
        *compare.too_few(cfg.images, cfg.scores, {j.name: j.network for j in judges}),
    ]


def _repeated_captions(run: Run, prompts: Sequence[drawer.Prompt] | None) -> list[str]:
    """A note where a protocol draws more samples than there are captions: those on COCO have one sample for each."""
    if run.eval.protocol is None or prompts is None or run.eval.images <= len(prompts):
        return []
    return [
        f"note: {run.eval.images:,} samples of {len(prompts):,} captions, so some are drawn for more than once; "
        f"eval.images={len(prompts)} draws for each once"
    ]


class Judge(NamedTuple):
    """A network, and those of eval.scores that are made of what it makes of samples."""

    name: str
    network: nn.Module
    scores: tuple[str, ...]

    @property
    def step(self) -> str:
        """Which samples: of those told different sizes its own."""
        return self.name if self.name in SIZES else "samples"

    def repeats(self, run: Run) -> int:
        """How often samples are drawn for it."""
        return max(repeats_of(score, run) for score in self.scores)

    @property
    def compares(self) -> bool:
        """With a reference."""
        return not set(self.scores) <= set(compare.ALONE)


def repeats_of(score: str, run: Run) -> int:
    """How often a score is measured, each time on other seeds."""
    cfg = run.eval
    return cfg.repeats if not cfg.repeated or score in cfg.repeated else 1


def _judges(work: Work) -> list[Judge]:
    run, cfg = work.run, work.run.eval
    asked = compare.Asked(
        str(work.folder),
        weights=Path(cfg.weights) if cfg.weights else None,
        inception=cfg.inception,
        lpips=cfg.lpips,
        dinov2=cfg.dinov2,
        clip=cfg.clip,
    )
    if "clip" in cfg.scores and run.semantic.kind != "text":
        raise UsageError("eval.scores=clip needs a run with words; this one has none")
    by: dict[str, list[str]] = {}
    for score in cfg.scores:
        if score != "loss":
            by.setdefault(compare.METRICS[score], []).append(score)
    judges = [Judge(name, _load(name, asked, run, work.device), tuple(scores)) for name, scores in by.items()]
    for name in SIZES.keys() & by.keys():
        _check_pairs(run, name)
    return judges


def _drawn(draws: Drawer, judges: Sequence[Judge]) -> dict[str, Step]:
    """What is made of samples, by Judge.step."""
    cfg = draws.run.eval
    of_samples = [judge for judge in judges if judge.name not in SIZES]
    networks = {judge.name: judge.network for judge in of_samples}
    again = {judge.name: judge.network for judge in of_samples if judge.repeats(draws.run) > 1}
    found = {
        judge.step: Step((judge.name,), cfg.diversity_seeds, functools.partial(drawer.distances, draws, judge.name, judge.network))
        for judge in judges
        if judge.name in SIZES
    }  # fmt: skip
    if networks:
        made = functools.partial(drawer.embedded, draws, networks)
        found["samples"] = Step(tuple(networks), cfg.images, made, cfg.repeats if again == networks else 1)
    if again and again != networks:
        made = functools.partial(drawer.embedded, draws, again)
        found["repeats"] = Step(tuple(again), cfg.images, made, cfg.repeats, first=1)
    return found


class Beside(NamedTuple):
    """What the scores of a judge compare with: kept from another time, or read first."""

    kept: Kept
    step: Step | None

    def statistics(self, place: Path) -> Statistics:
        if self.step is None:
            return statistics.stored(self.kept.path)
        found = statistics.joined(map(statistics.stored, self.step.files(place, *self.step.names)))
        self.kept.write(found)
        return found


def _beside(reference: Pictures, judge: Judge, device: torch.device) -> Beside:
    rows = compare.rows_needed(judge.scores)
    kept, name = statistics.kept(reference, judge.network, rows), f"reference-{judge.name}"

    def made(some: range) -> dict[str, dict[str, Tensor]]:
        part = statistics.gathered(reference, judge.network, BATCH, rows, device, lambda n: None, some)
        return {name: part.tensors()}

    # Caches of several machines may differ: the first rank makes what the others see no need to.
    step = Step((name,), reference.count, made, part=READ, spare=True)
    return Beside(kept, None if kept.path.is_file() else step)


def _found(judge: Judge, run: Run, drawn: dict[str, Step], y: Statistics | None, place: Path) -> dict[str, list[float]]:
    """Numbers of one judge by name, each over its repeats."""
    found: dict[str, list[float]] = {}
    first = drawn[judge.step]
    for repeat in range(1 if judge.name in SIZES else judge.repeats(run)):
        step = first if repeat < first.repeats else drawn["repeats"]
        x = gathered(step.files(place, judge.name, repeat))
        for score in judge.scores:
            if repeat < repeats_of(score, run):
                for what, value in compare.scored(score, x, y, judge.network, run.eval.kid_subset).items():
                    found.setdefault(what, []).append(value)
    return found


def _validation(work: Work) -> Validation:
    """Of eval.validation, else of what the run was validated on. Raises UsageError where it has nothing."""
    run, setting = work.run, "eval.validation" if work.run.eval.validation else "watch.source"
    dataset = open_dataset(run.data, run.latent, run.train.seed)
    held = validation.images(run, dataset, setting)
    if held is None:
        raise UsageError(
            "eval.scores=loss needs images that were not trained on: name them by eval.validation=DIR (or train with "
            "data.held_out=N)"
        )
    return Validation(run, *held, work.device, run.eval.loss_pairs)


def _losses(validated: Validation, denoiser: Denoiser, pairs: range) -> dict[str, dict[str, Tensor]]:
    passes = map(validated.read, validated.passes(torch.tensor(pairs)))
    return {"loss": {"rows": validated.losses(denoiser, passes)[pairs.start : pairs.stop, None]}}


def _found_losses(validated: Validation, step: Step, place: Path) -> dict[str, list[float]]:
    """The mean, and by tenths of the training draw from clean to noise: loss_0_10, ..., loss_90_100."""
    mean, by_level = validated.means(gathered(step.files(place, "loss")).rows[:, 0])
    width = 100 // len(by_level)
    named = {f"loss_{width * i}_{width * (i + 1)}": value for i, value in enumerate(by_level)}
    return {name: [value] for name, value in ({"loss": mean} | named).items() if value is not None}


def _reference(run: Run) -> Pictures:
    """Open the pictures that samples are compared with: eval.reference, else those that the run was trained on.

    Those of a cache are read from its source and prepared as it was: the same filter, faces blurred where it has them blurred.
    """
    height, width = run.canvas
    if height != width:
        raise UsageError(f"eval.scores are of squares, and {width}x{height} is sampled: set sample.aspect=null")
    where, resize, blur = run.eval.reference or run.data.source, run.data.resize, False
    if is_cache(where):
        plan = opened_manifest(where).plan
        where, resize, blur = plan.data.source, plan.data.resize, plan.blur_faces
    return open_pictures(where, height, resize=run.eval.resize or resize, blur=blur)


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


def _load(name: str, asked: compare.Asked, run: Run, device: torch.device) -> nn.Module:
    """A network, or a judge that knows what the samples of this run were told."""
    if name == "agreement":
        if not run.inputs.num_classes and run.semantic.kind != "text":
            raise UsageError("eval.scores=agreement needs a run with classes or words; this one has neither")
        return shipped.Agreement(load_digit_features(str(device)))
    if name == "told":
        return shipped.Apart(load_digit_features(str(device)))
    return shipped.Drawn(run.semantic.kind == "text") if name == "drawn" else compare.load(name, asked, device)


def _protocol(
    work: Work, nimg: int, judges: Sequence[Judge], reference: Pictures | None, validated: Validation | None
) -> dict[str, Any]:
    """All that decides a number."""
    run, cfg = work.run, work.run.eval
    told: dict[str, Any] = {
        "name": cfg.protocol,
        "networks": {judge.name: judge.network.name for judge in judges},
        "nimg": nimg,
    }
    told |= run.sample.model_dump(mode="json", exclude={"batch_size"})
    told |= {
        "images": cfg.images, "diversity_seeds": cfg.diversity_seeds, "repeats": cfg.repeats, "first_seed": 0,
        "labels": cfg.labels if run.inputs.num_classes else None,
        "prompts": (cfg.prompts or run.data.source) if run.semantic.kind == "text" else None,
        "reference": reference.where if reference else None, "reference_images": reference.count if reference else None,
        "reference_pictures": reference.fingerprint if reference else None,
        "reference_resized": reference.preparation if reference else None,
    }  # fmt: skip
    if cfg.repeats > 1 and cfg.repeated:
        told["repeated"] = list(cfg.repeated)
    if cfg.kid_subset != metrics.KID_SUBSET and {"kid", "kd_dinov2"} & set(cfg.scores):
        told["kid_subset"] = cfg.kid_subset
    if reference and reference.blur:
        told["reference_faces"] = "blurred"
    if validated:
        told |= {
            "validation": cfg.validation or run.watch.source or f"{run.data.source}, held out",
            "validation_pictures": validated.dataset.fingerprint(),
            "loss_pairs": cfg.loss_pairs,
        }
    return told | ({"average": str(work.average)} if work.average else {})


def _key(work: Work, protocol: dict[str, Any]) -> str:
    """Of the weights and of all that decides a sample; how many are drawn apart."""
    used = [(s.path.name, s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in snapshot.stored(work.folder)]
    return hashlib.sha256(json.dumps([protocol, used], sort_keys=True).encode()).hexdigest()[:12]


def _summed(name: str, found: dict[str, list[float]]) -> dict[str, float | list[float]]:
    """Return all values of a score, the best in its own direction, and their mean; of a spread that of the best value."""
    values = found[name]
    ranked = found.get(name.removesuffix("_std"), values)
    choose = min if compare.lower_is_better(name) else max
    best = choose(range(len(values)), key=lambda repeat: ranked[repeat])
    return {"values": values, "best": values[best], "mean": sum(values) / len(values)}


def _record(path: Path, key: str, result: dict[str, Any]) -> None:
    with files.in_turn(path):
        known = json.loads(path.read_text()) if path.is_file() else {}
        files.write_json(path, known | {key: result})


def _lines(result: dict[str, Any]) -> list[str]:
    protocol, lines = result["protocol"], []
    by_noise = [found["mean"] for name, found in result["scores"].items() if name.startswith("loss_")]
    for name, found in result["scores"].items():
        if name.endswith("_std") or name.startswith("loss_"):
            continue
        each = ", ".join(f"{value:.4f}" for value in found["values"])
        best = f"   best of {len(found['values'])}: {found['best']:.4f}" if len(found["values"]) > 1 else ""
        lines.append(f"{name:20}{each}{best}")
    if by_noise:
        lines.append(
            f"{'  by noise':20}{' '.join(f'{value:.3g}' for value in by_noise)}   (tenths of the training draw, clean to noise)"
        )
        lines.append(f"{protocol['loss_pairs']:,} pairs of an image of {protocol['validation']} and a noise level")
    reference = f" beside {protocol['reference_images']:,} of {protocol['reference']}" if protocol["reference"] else ""
    said = f" by the protocol {protocol['name']}" if protocol["name"] else ""
    if protocol["networks"]:
        lines.append(f"{protocol['images']:,} samples{reference}{said}; {', '.join(protocol['networks'].values())}")
    if speed := result["speed"]:
        energy = f", {speed['milliwatt_hours']:.3g} mWh each" if "milliwatt_hours" in speed else ""
        lines.append(f"{speed['images_per_second']:.3g} samples a second, drawn and read{energy}")
    return lines
