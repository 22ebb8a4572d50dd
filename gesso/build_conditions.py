"""Build conditions for sampling from a user's labels, prompts and control variables.

Legend: N samples, M training samples, n columns of control variables.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gesso import config, rng
from gesso.conditioning import Cond
from gesso.config import CONTROL_VARIABLES, RunConfig
from gesso.data import crops
from gesso.data.batching import control_tensors, text_tensors
from gesso.data.encoders import text as encoders
from gesso.errors import UsageError


def parse_int_ranges(text: str, option: str) -> list[int]:
    """Parse "0-3,7" to [0, 1, 2, 3, 7].

    Raises:
        UsageError: The text is not a list of ranges; the error names `option`.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UsageError(f"{option} {text!r}: write numbers such as 0-15 or 1,5,9")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def check_labels(run: RunConfig, labels: Sequence[int]) -> None:
    """Raise UsageError for a label that the run does not have."""
    classes = run.input_spec.num_classes
    has_null = run.dropout.both + run.dropout.semantic > 0  # otherwise the null class was not trained
    if not classes:
        kind = "text: use --prompt" if run.semantic.kind == "text" else "no classes: it takes no label"
        raise UsageError(f"this run was trained with {kind}")
    wrong = sorted({label for label in labels if not 0 <= label < classes + has_null})
    if wrong:
        valid = f"labels 0 to {classes - 1}" + (f" (and {classes} for none)" if has_null else "")
        raise UsageError(f"label {wrong[0]} is out of range: the run has {valid}")


def expand_labels(run: RunConfig, text: str | None, n: int) -> list[int] | None:
    """Return n labels that cycle through those in `text` (numbers, ranges, class names), or all classes for None.

    Returns None for a run without classes. Raises UsageError for an unknown label.
    """
    classes = run.input_spec.num_classes
    if text is None:
        return [i % classes for i in range(n)] if classes else None
    names = list(run.data.class_names or ())
    if not classes:
        check_labels(run, [])
    labels: list[int] = []
    for part in (part.strip() for part in text.split(",")):
        if part in names:
            labels.append(names.index(part))
        elif part[:1].isdigit():
            labels += parse_int_ranges(part, "--label")
        else:
            raise UsageError(f"--label {part!r}: no such class; {config.suggest(part, names)}")
    check_labels(run, labels)
    return [labels[i % len(labels)] for i in range(n)]


def expand_prompts(run: RunConfig, prompts: Sequence[str], n: int) -> list[str] | None:
    """Return n prompts that cycle through `prompts`, or through the run's example captions if empty.

    Returns None for a run without text. Raises UsageError for prompts that the run does not take.
    """
    if run.semantic.kind != "text":
        if prompts:
            kind = "classes: use --label" if run.input_spec.num_classes else "neither classes nor text"
            raise UsageError(f"--prompt {prompts[0]!r}: this run was trained with {kind}")
        return None
    prompts = list(prompts) or list(run.data.example_captions or ("",))
    return [prompts[i % len(prompts)] for i in range(n)]


def build_cond(
    run: RunConfig,
    seeds: Sequence[int],
    control_rows: Tensor | None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    control: Mapping[str, str] | None = None,
) -> tuple[Cond, list[str]]:
    """Return the conditions of N samples, on the CPU, and warnings. Each sample depends on its seed only.

    Control variables that the user does not set have their default (no flip) or come together from one training row,
    the best variant of Berrada et al. Table 2b; the crop is the centered box that training shows of an image of the
    sampled size.

    Args:
        run: Settings of the run.
        seeds: N seeds.
        control_rows: Control variables of training samples, (M, n).
        labels: N labels, or None.
        prompts: N prompts, or None.
        control: The user's control variables by name, as text.

    Raises:
        UsageError: A label or a control variable is invalid for this run.
    """
    seed = torch.tensor(list(seeds), dtype=torch.int64)
    fields: dict[str, Tensor | None] = {}
    warnings: list[str] = []
    is_null = torch.zeros(len(seed), dtype=torch.bool)
    if labels is not None:
        check_labels(run, labels)
        fields["label"] = label = torch.tensor(list(labels))
        is_null = label == run.input_spec.num_classes
    if prompts is not None:
        encoder = encoders.build_text_encoder(run.semantic)
        warnings = encoder.truncation_notes(prompts)
        encoded = encoder(prompts)
        fields |= text_tensors(run.semantic, encoded, 0, seed)
        is_null = encoded.lengths == 0
    user_values = _parse_control(run, control or {})
    if run.control.variables:
        fields |= control_tensors(run, _choose_control_rows(run, seed, control_rows, user_values))
        if not user_values and not run.learned_without(semantic=True):
            fields["has_control"] = ~is_null  # training never shows control variables without label or text
    return Cond(**fields), [f"warning: {line}" for line in dict.fromkeys(warnings)]


def _parse_control(run: RunConfig, control: Mapping[str, str]) -> dict[str, tuple[float, ...]]:
    """Return the columns of the control variables that the user sets."""
    values: dict[str, tuple[float, ...]] = {}
    for name, text in control.items():
        if name not in CONTROL_VARIABLES:
            raise UsageError(
                f"{name}={text}: no such control variable; {config.suggest(name, list(CONTROL_VARIABLES))}"
            )
        if name not in run.control.variables:
            has = ", ".join(run.control.variables) or "none"
            raise UsageError(f"{name}={text}: this run was not trained with {name}; its control variables: {has}")
        try:
            values[name] = CONTROL_VARIABLES[name].parse(text)
        except (ValueError, KeyError):
            raise UsageError(f"{name}={text}: write {CONTROL_VARIABLES[name].input_format}") from None
    if "size" in values and "aspect" in run.control.variables and "aspect" not in values:
        height, width = values["size"]
        values["aspect"] = (1000 * width / height,)
    return values


def _choose_control_rows(
    run: RunConfig, seed: Tensor, control_rows: Tensor | None, user_values: Mapping[str, tuple[float, ...]]
) -> Tensor:
    """Return control variables (N, n) that occur together in training, except where the user sets them."""
    if control_rows is None:
        raise UsageError("the snapshot has no control variables of training samples, which sampling needs")
    columns = run.control.column_names("high") + run.control.column_names("low")
    control_rows = _rows_near_aspect(run, control_rows, columns)
    pick = (rng.uniform(0, seed, "control row")[:, 0] * len(control_rows)).long()
    chosen = dict(zip(columns, control_rows[pick].T, strict=True))
    defaults: dict[str, tuple[float, ...]] = {
        name: default for name in run.control.variables if (default := CONTROL_VARIABLES[name].default)
    }
    settings: dict[str, Sequence[Tensor | float]] = {**defaults, **_sample_original_sizes(run, seed), **user_values}
    for name, values in settings.items():
        for column, value in zip(CONTROL_VARIABLES[name].columns, values, strict=True):
            chosen[column] = value if isinstance(value, Tensor) else torch.full_like(chosen[column], float(value))
    if "aspect" in user_values and "height" in chosen and "size" not in user_values:
        # The number of pixels of the row in the aspect that the user sets.
        area, ratio = chosen["height"] * chosen["width"], chosen["aspect"] / 1000
        chosen |= {"height": (area / ratio).sqrt().round(), "width": (area * ratio).sqrt().round()}
    if "crop" in run.control.variables and "crop" not in user_values:
        chosen |= _center_crop_columns(run, chosen)
    return torch.stack([chosen[column] for column in columns], dim=1)


def _center_crop_columns(run: RunConfig, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the crop columns, (N,) each, of the largest centered box that training shows of an image of this size.

    The box has the aspect of the sampled image. Where neither size nor aspect is a control variable, the original
    aspect follows from the crop box of the training row, whose aspect in pixels is that of the training images.
    """
    height, width = run.sample_size
    if "height" in values:
        sizes = torch.stack([values["height"], values["width"]], dim=1)
    elif "aspect" in values:
        sizes = torch.stack([torch.ones_like(values["aspect"]), values["aspect"] / 1000], dim=1)
    else:
        top, left, bottom, right = (values[column] for column in crops.BOX)
        trained = width / height if run.data.buckets else 1.0
        sizes = torch.stack([right - left, trained * (bottom - top)], dim=1)
    boxes = [crops.largest_view(run.data, h, w, width / height)[:4] for h, w in sizes.tolist()]
    return dict(zip(crops.BOX, (1000 * torch.tensor(boxes)).unbind(1), strict=True))


def _rows_near_aspect(run: RunConfig, control_rows: Tensor, columns: Sequence[str]) -> Tensor:
    """Return the training rows of images of about the sampled aspect, or all rows if there are none.

    For a run with buckets these are the rows of the sampled bucket; for others with sample.aspect set, the rows whose
    aspect is within a factor of 1.2.
    """
    buckets = run.data.buckets
    if (run.sample.aspect is None and not buckets) or not {"aspect", "width"} & set(columns):
        return control_rows
    values = dict(zip(columns, control_rows.unbind(1), strict=True))
    log_aspect = (values["aspect"] / 1000 if "aspect" in values else values["width"] / values["height"]).log()
    if buckets:
        aspects = torch.tensor([w / h for h, w in buckets]).log()
        sampled = math.log(run.sample_size[1] / run.sample_size[0])
        near = (log_aspect[:, None] - aspects).abs().argmin(dim=1) == (aspects - sampled).abs().argmin()
    else:
        near = (log_aspect - math.log(run.sample.aspect_value)).abs() < math.log(1.2)
    return control_rows[near] if bool(near.any()) else control_rows


def _sample_original_sizes(run: RunConfig, seed: Tensor) -> dict[str, tuple[Tensor | float, ...]]:
    """Return original sizes from the samplers of Table 2b; empty for the training distribution."""
    cfg = run.sample
    if cfg.size_conditioning == "train" or "size" not in run.control.variables:
        return {}
    low, high = cfg.size_range
    u = rng.uniform(0, seed, "size", 2)
    sides = (low + u * (high - low + 1)).floor().float()
    height, width = {
        "fixed": (torch.full_like(sides[:, 0], low),) * 2,
        "square": (sides[:, 0], sides[:, 0]),
        "free": (sides[:, 0], sides[:, 1]),
    }[cfg.size_conditioning]
    sizes: dict[str, tuple[Tensor | float, ...]] = {"size": (height, width)}
    if "aspect" in run.control.variables:
        sizes["aspect"] = (1000 * width / height,)
    return sizes
