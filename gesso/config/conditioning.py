"""Settings of the conditions besides the noise level: class or text, and control variables.

CONTROL_VARIABLES is the only list of control variables; gesso.extend adds to it.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from gesso.config.base import Factor, Probability, Settings, Width, parse_list


class ControlVariable(NamedTuple):
    """Control variable: its columns, units and text format.

    Values are embedded with sinusoids that resolve steps of 1 for values up to 1e4; the units are chosen to fit.

    columns: names of its numbers in a row of control values.
    level: "high" shapes the composition, "low" the details (Berrada et al. Section 2.1).
    unit: unit of the numbers.
    input_format: format that the user types, for error messages.
    parse: converts the typed text to numbers; raises ValueError or KeyError on bad input.
    default: values for sampling if the user gives none. None: those of a random training image (for crop: the centre
        box that training would give an image of the sampled size).
    measure: returns the columns, (B, number of columns) float32, of a SampleBatch. None: gesso knows them.
    """

    columns: tuple[str, ...]
    level: Literal["high", "low"]
    unit: str
    input_format: str
    parse: Callable[[str], tuple[float, ...]]
    default: tuple[float, ...] | None = None
    measure: Callable[[Any], Any] | None = None


def _parse_flip(text: str) -> tuple[float, ...]:
    return ({"no": 0.0, "yes": 1000.0}[text],)


def _parse_crop(text: str) -> tuple[float, ...]:
    if text == "full":
        return (0.0, 0.0, 1000.0, 1000.0)
    top, left, bottom, right = (float(part) for part in text.split(","))
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(text)
    return tuple(1000 * edge for edge in (top, left, bottom, right))


def _parse_size(text: str) -> tuple[float, ...]:
    height, width = (int(part) for part in text.split("x"))
    return _positive(height), _positive(width)


def _parse_aspect(text: str) -> tuple[float, ...]:
    width, colon, height = text.partition(":")
    return (_positive(1000 * _positive(float(width)) / _positive(float(height if colon else 1))),)


def _parse_grey(text: str) -> tuple[float, ...]:
    if not 0 <= float(text) <= 255:
        raise ValueError(text)
    return (float(text),)


def _positive(number: float) -> float:
    if not 0 < number < 1e9:  # also rejects nan and inf
        raise ValueError(number)
    return float(number)


CONTROL_VARIABLES: dict[str, ControlVariable] = {
    "flip": ControlVariable(("flip",), "high", "0 or 1000", "yes or no", _parse_flip, (0.0,)),
    "crop": ControlVariable(
        ("crop_top", "crop_left", "crop_bottom", "crop_right"),
        "high",
        "thousandths of height and width of the full image, mirrored if the view is mirrored",
        "full, or top,left,bottom,right from 0 to 1",
        _parse_crop,
    ),
    "aspect": ControlVariable(("aspect",), "high", "1000 * width / height", "width:height such as 4:3", _parse_aspect),
    "size": ControlVariable(
        ("height", "width"), "low", "pixels of the full image", "HEIGHTxWIDTH such as 512x512", _parse_size
    ),
    "brightness": ControlVariable(("brightness",), "low", "mean of the pixels, 0 to 255", "0 to 255", _parse_grey),
    "contrast": ControlVariable(
        ("contrast",), "low", "standard deviation of the pixels, 0 to 255", "0 to 255", _parse_grey
    ),
}


def _parse_names(value: Any) -> Any:
    """Return names of control variables as a tuple in the order of CONTROL_VARIABLES."""
    value = parse_list(value)
    if not isinstance(value, list | tuple):
        return value
    if unknown := [name for name in value if not (isinstance(name, str) and name in CONTROL_VARIABLES)]:
        raise ValueError(
            f"no such control variable: {unknown[0]}; there are: {', '.join(CONTROL_VARIABLES)} (others need their "
            "code: gesso --code FILE.py)"
        )
    return tuple(name for name in CONTROL_VARIABLES if name in value)


ControlNames = Annotated[tuple[str, ...], BeforeValidator(_parse_names)]


class SemanticConfig(Settings):
    """Semantic condition: the class or the caption of an image."""

    kind: Literal["label", "text", "none"] = "label"
    """label: condition on the class; text: condition on the caption; none: unconditional"""
    encoder: str = "words"
    """text encoder: words (a fixed random vector per word, no download), or a folder or hub id of a CLIP or T5 text
    encoder, such as openai/clip-vit-large-patch14, or of a pipeline with text_encoder and tokenizer. It is not
    trained"""
    max_tokens: Width = 16
    """number of text tokens T, including the special tokens of CLIP and T5; longer captions are cut, shorter ones
    padded"""
    embed_dim: Width | None = None
    """channels of a text token; null: filled in when the encoder is opened (64 for words)"""
    pooled_dim: Width | None = None
    """channels of the pooled text embedding; null: filled in when the encoder is opened"""
    padding: Literal["zero", "masked", "replicate", "noisy"] = "zero"
    """tokens after the caption: zero (zeros that attention sees, the baseline of Berrada et al.), masked (zeros that
    attention ignores), replicate (copies of the caption) or noisy (copies with noise, Berrada et al. Eq. 7). An empty
    caption is T zero tokens that attention sees, with every setting"""
    padding_noise: Annotated[float, Field(ge=0, le=1e3)] = 0.02
    """beta_txt: noisy adds beta_txt * sqrt(m-1) * std * noise, where m is the number of copies and std the standard
    deviation of each channel over the tokens (Berrada et al. Eq. 7)"""


class Dropout(Settings):
    """Shares of training samples that drop conditions; at most one of the three events happens per sample.

    Guidance evaluates the network without some conditions, and each share trains one such branch: `both` trains
    (none, none), the last term of Eq. 2 of Berrada et al.; `control` trains (none, semantic), its middle term;
    `semantic` trains (control, none), which sample.keep_control=true evaluates (SDXL). The paper does not give these
    shares; the defaults are our choice. Dropping each condition independently in 10 % of the samples would train
    (none, none), which every guided step evaluates, on 1 % of them, and (control, none), which Eq. 2 never evaluates,
    on 9 %.
    """

    both: Probability = 0.10
    """share of samples without class or caption and without control variables"""
    control: Probability = 0.05
    """share of samples without control variables only; needed by sample.control_guidance"""
    semantic: Probability = 0.0
    """share of samples without class or caption only; needed by sample.keep_control=true, for example 0.05"""

    @model_validator(mode="after")
    def _check_sum(self) -> "Dropout":
        total = self.both + self.control + self.semantic
        if total > 1 + 1e-9:
            raise ValueError(f"dropout.both + dropout.control + dropout.semantic is {total:g}, above 1: set them lower")
        return self


class ControlConfig(Settings):
    """Control variables: properties of the crop and the file, so that the network can tell them from the content.

    See Berrada et al. Eq. 1.
    """

    variables: ControlNames = ()
    """control variables to condition on: flip, crop, aspect (high level), size, brightness, contrast (low level)"""
    mlp: Literal["split", "joint"] = "split"
    """embedding of control variables: split is E_h(phi_h) + gamma_c(t) E_l(phi_l) (Berrada et al. Eq. 1); joint is one
    MLP over all of them with gamma_c = 1 (SDXL)"""
    schedule: Literal["cosine", "uniform", "zero", "linear", "step"] = "cosine"
    """weight gamma_c of the low level at progress t (Berrada et al. Table A6): cosine (1-cos(pi (1-t)^alpha))/2,
    uniform 1, zero 0, linear 1-t, step 1 if sigma <= control.step_sigma, otherwise 0"""
    alpha: Factor = 8.0
    """exponent of control.schedule=cosine (Berrada et al. Tables 2a, A6; the best published value is 8)"""
    step_sigma: Factor = 2.0
    """noise level sigma at and below which control.schedule=step uses the low level (Berrada et al. Table A6: 1, 2 and
    6)"""

    @model_validator(mode="after")
    def _check_joint(self) -> "ControlConfig":
        if self.mlp == "joint" and self.schedule != "uniform":
            raise ValueError(
                f"control.schedule={self.schedule} weights the low level, which control.mlp=joint does not embed "
                "separately: set control.schedule=uniform or control.mlp=split"
            )
        return self

    def column_names(self, level: str) -> tuple[str, ...]:
        """Return the names of the numbers of a level ("high" or "low"), in order."""
        return tuple(
            column
            for name in self.variables
            if CONTROL_VARIABLES[name].level == level
            for column in CONTROL_VARIABLES[name].columns
        )
