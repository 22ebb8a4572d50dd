"""What a sample is to show, from what a user says: labels, prompts and control variables into a Cond.

Legend: N samples, n numbers of control.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gesso import config, keyed
from gesso.cond import Cond
from gesso.config import CONTROLS, Run
from gesso.data import crops
from gesso.data import text as encoders
from gesso.data.batches import control_fields, text_fields
from gesso.errors import UsageError


def numbers(text: str, what: str) -> list[int]:
    """0-3,7 -> [0, 1, 2, 3, 7]. Raises UsageError that names `what`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UsageError(f"{what} {text!r}: write numbers such as 0-15 or 1,5,9")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def check_labels(run: Run, labels: Sequence[int]) -> None:
    """Raise UsageError for a label that the run does not have."""
    classes = run.inputs.num_classes
    none = run.dropout.both + run.dropout.semantic > 0  # otherwise the null class was never trained
    if not classes:
        words = "words: say --prompt" if run.semantic.kind == "text" else "no classes: it takes no label"
        raise UsageError(f"this run was trained with {words}")
    wrong = sorted({label for label in labels if not 0 <= label < classes + none})
    if wrong:
        says = f"labels 0 to {classes - 1}" + (f" (and {classes} for none)" if none else "")
        raise UsageError(f"label {wrong[0]} is out of range: the run has {says}")


def labels_for(run: Run, text: str | None, n: int) -> list[int] | None:
    """n labels that go round those in `text` (numbers, ranges, class names); round all when None.

    None where the run has no labels.
    """
    classes = run.inputs.num_classes
    if text is None:
        return [i % classes for i in range(n)] if classes else None
    names = list(run.data.class_names or ())
    if not classes:
        check_labels(run, [])
    chosen: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        if part in names:
            chosen.append(names.index(part))
        elif part[:1].isdigit():
            chosen += numbers(part, "--label")
        else:
            raise UsageError(f"--label {part!r}: no such class; {config.nearest(part, names)}")
    check_labels(run, chosen)
    return [chosen[i % len(chosen)] for i in range(n)]


def prompts_for(run: Run, prompts: Sequence[str], n: int) -> list[str] | None:
    """n prompts that go round those given, or round the run's examples. None where the run has no text."""
    if run.semantic.kind != "text":
        if prompts:
            kind = "classes: say --label" if run.inputs.num_classes else "neither classes nor text"
            raise UsageError(f"--prompt {prompts[0]!r}: this run was trained with {kind}")
        return None
    prompts = list(prompts) or list(run.data.examples or ("",))
    return [prompts[i % len(prompts)] for i in range(n)]


def build(
    run: Run,
    seeds: Sequence[int],
    rows: Tensor | None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    control: Mapping[str, str] | None = None,
) -> tuple[Cond, list[str]]:
    """The conditions of N samples, on the CPU, and warnings. Each depends on its own seed alone.

    labels or prompts: N of them; rows (M, n): control variables of training samples; control: what the user
    says of a variable, by name. What the user leaves open is plain (no flip), drawn with its companions from one
    training row (Table 2b's best), or follows from them: the crop is the centred box that training gives a picture of
    that size. Raises UsageError.
    """
    seed = torch.tensor(list(seeds), dtype=torch.int64)
    fields: dict[str, Tensor | None] = {}
    cut: list[str] = []
    nothing = torch.zeros(len(seed), dtype=torch.bool)
    if labels is not None:
        check_labels(run, labels)
        fields["label"] = torch.tensor(list(labels))
        nothing = fields["label"] == run.inputs.num_classes
    if prompts is not None:
        encoder = encoders.build(run.semantic)
        cut = encoder.cut(prompts)
        encoded = encoder(prompts)
        fields |= text_fields(run.semantic, encoded, 0, seed)
        nothing = encoded.lengths == 0
    said = _said(run, control or {})
    if run.control.variables:
        fields |= control_fields(run, _rows(run, seed, rows, said))
        if not said and not run.learned_without(semantic=True):
            fields["has_control"] = ~nothing  # training never shows control variables without label or text
    return Cond(**fields), [f"warning: {line}" for line in dict.fromkeys(cut)]


def _said(run: Run, control: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """Numbers of the variables that the user names."""
    said = {}
    for name, text in control.items():
        if name not in CONTROLS:
            raise UsageError(f"{name}={text}: no such control variable; {config.nearest(name, list(CONTROLS))}")
        if name not in run.control.variables:
            has = ", ".join(run.control.variables) or "none"
            raise UsageError(f"{name}={text}: this run was not trained with {name}; its control variables: {has}")
        try:
            said[name] = CONTROLS[name].parse(text)
        except (ValueError, KeyError):
            raise UsageError(f"{name}={text}: write {CONTROLS[name].written}") from None
    if "size" in said and "aspect" in run.control.variables and "aspect" not in said:
        height, width = said["size"]
        said["aspect"] = (1000 * width / height,)
    return said


def _rows(run: Run, seed: Tensor, rows: Tensor | None, said: Mapping[str, tuple[float, ...]]) -> Tensor:
    """Return (N, n) numbers of control, such as training shows together."""
    if rows is None:
        raise UsageError("the snapshot lacks its rows of control variables, from which samples draw theirs")
    columns = run.control.columns("high") + run.control.columns("low")
    rows = _alike(run, rows, columns)
    pick = (keyed.uniform(0, seed, "control row")[:, 0] * len(rows)).long()
    drawn = dict(zip(columns, rows[pick].T, strict=True))
    given = {name: CONTROLS[name].plain for name in run.control.variables if CONTROLS[name].plain}
    chosen = dict(drawn)
    for name, values in {**given, **_sizes(run, seed), **said}.items():
        for column, value in zip(CONTROLS[name].columns, values, strict=True):
            chosen[column] = value if isinstance(value, Tensor) else torch.full_like(drawn[column], float(value))
    if "aspect" in said and "height" in chosen and "size" not in said:
        # As many pixels as the row has, in the aspect that the user names.
        area, ratio = chosen["height"] * chosen["width"], chosen["aspect"] / 1000
        chosen |= {"height": (area / ratio).sqrt().round(), "width": (area * ratio).sqrt().round()}
    if "crop" in run.control.variables and "crop" not in said:
        chosen |= _centred(run, chosen)
    return torch.stack([chosen[column] for column in columns], dim=1)


def _centred(run: Run, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the crop columns (N,) of the largest centred box that training shows of a picture of the chosen size.

    The box has the aspect of the canvas. Where neither size nor aspect is a control variable, the picture's aspect
    follows from its row's own box, whose aspect in pixels is that of the training canvas.
    """
    height, width = run.canvas
    if "height" in chosen:
        sizes = torch.stack([chosen["height"], chosen["width"]], dim=1)
    elif "aspect" in chosen:
        sizes = torch.stack([torch.ones_like(chosen["aspect"]), chosen["aspect"] / 1000], dim=1)
    else:
        top, left, bottom, right = (chosen[column] for column in crops.BOX)
        trained = width / height if run.data.buckets else 1.0
        sizes = torch.stack([right - left, trained * (bottom - top)], dim=1)
    boxes = [crops.largest(run.data, h, w, width / height)[:4] for h, w in sizes.tolist()]
    return dict(zip(crops.BOX, (1000 * torch.tensor(boxes)).unbind(1), strict=True))


def _alike(run: Run, rows: Tensor, columns: Sequence[str]) -> Tensor:
    """Return the training rows of pictures that training showed at about the aspect of the canvas, if there are any.

    Of a run on buckets those of the bucket that is sampled; of others, where sample.aspect is set, those whose aspect
    is within a factor of 1.2.
    """
    buckets = run.data.buckets
    if (run.sample.aspect is None and not buckets) or not {"aspect", "width"} & set(columns):
        return rows
    value = dict(zip(columns, rows.unbind(1), strict=True))
    wide = (value["aspect"] / 1000 if "aspect" in value else value["width"] / value["height"]).log()
    if buckets:
        aspects = torch.tensor([w / h for h, w in buckets]).log()
        sampled = math.log(run.canvas[1] / run.canvas[0])
        near = (wide[:, None] - aspects).abs().argmin(dim=1) == (aspects - sampled).abs().argmin()
    else:
        near = (wide - math.log(run.sample.ratio)).abs() < math.log(1.2)
    return rows[near] if bool(near.any()) else rows


def _sizes(run: Run, seed: Tensor) -> dict[str, tuple[Tensor | float, ...]]:
    """Original sizes by the samplers of Table 2b; nothing for the training distribution."""
    cfg = run.sample
    if cfg.size == "train" or "size" not in run.control.variables:
        return {}
    low, high = cfg.size_range
    u = keyed.uniform(0, seed, "size", 2)
    drawn = (low + u * (high - low + 1)).floor().float()
    height, width = {
        "fixed": (torch.full_like(drawn[:, 0], low),) * 2,
        "square": (drawn[:, 0], drawn[:, 0]),
        "free": (drawn[:, 0], drawn[:, 1]),
    }[cfg.size]
    sizes = {"size": (height, width)}
    return sizes | ({"aspect": (1000 * width / height,)} if "aspect" in run.control.variables else {})
