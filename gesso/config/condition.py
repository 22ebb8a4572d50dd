"""What a network is told besides the noise level: class or text, and control variables. CONTROLS is the only list."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from gesso.config.base import Positive, Probability, Settings, parse_words


class Variable(NamedTuple):
    """A control variable. Its values are embedded by sinusoids that resolve steps of 1 up to 1e4; hence the units.

    columns: its numbers in a row of control; level "high" shapes the composition, "low" the details (Berrada et
    al. Section 2.1); parse: what a user types -> the numbers; plain: what sampling takes when the user is silent,
    None: a row drawn from the training set (of crop the centred box that training gives such a picture).
    """

    columns: tuple[str, ...]
    level: Literal["high", "low"]
    unit: str
    written: str
    parse: Callable[[str], tuple[float, ...]]
    plain: tuple[float, ...] | None = None


def _flip(text: str) -> tuple[float, ...]:
    return ({"no": 0.0, "yes": 1000.0}[text],)


def _crop(text: str) -> tuple[float, ...]:
    if text == "full":
        return (0.0, 0.0, 1000.0, 1000.0)
    top, left, bottom, right = (float(part) for part in text.split(","))
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError(text)
    return tuple(1000 * edge for edge in (top, left, bottom, right))


def _size(text: str) -> tuple[float, ...]:
    height, width = (int(part) for part in text.split("x"))
    return _above_zero(height), _above_zero(width)


def _aspect(text: str) -> tuple[float, ...]:
    width, colon, height = text.partition(":")
    return (_above_zero(1000 * _above_zero(float(width)) / _above_zero(float(height if colon else 1))),)


def _grey(text: str) -> tuple[float, ...]:
    if not 0 <= float(text) <= 255:
        raise ValueError(text)
    return (float(text),)


def _above_zero(number: float) -> float:
    if not 0 < number < 1e9:  # nan and inf neither
        raise ValueError(number)
    return float(number)


CONTROLS: dict[str, Variable] = {
    "flip": Variable(("flip",), "high", "0 or 1000", "yes or no", _flip, (0.0,)),
    "crop": Variable(
        ("crop_top", "crop_left", "crop_bottom", "crop_right"),
        "high",
        "thousandths of height and width of the whole image, mirrored if the view is",
        "full, or top,left,bottom,right from 0 to 1",
        _crop,
    ),
    "aspect": Variable(("aspect",), "high", "1000 * width / height", "width:height such as 4:3", _aspect),
    "size": Variable(("height", "width"), "low", "pixels of the whole image", "HEIGHTxWIDTH such as 512x512", _size),
    "brightness": Variable(("brightness",), "low", "mean of the pixels, 0 to 255", "0 to 255", _grey),
    "contrast": Variable(("contrast",), "low", "standard deviation of the pixels, 0 to 255", "0 to 255", _grey),
}


def _names(value: Any) -> Any:
    """In the order of CONTROLS."""
    value = parse_words(value)
    if isinstance(value, list | tuple) and all(isinstance(name, str) and name in CONTROLS for name in value):
        return tuple(name for name in CONTROLS if name in value)
    return value


Names = Annotated[
    tuple[Literal["flip", "crop", "aspect", "size", "brightness", "contrast"], ...], BeforeValidator(_names)
]


class Semantic(Settings):
    """What an image shows: its class, or words."""

    kind: Literal["label", "text", "none"] = "label"
    """label: the class; text: the caption; none: neither, unconditional"""
    encoder: str = "words"
    """words (a random vector for each, nothing to download), or a folder or hub id of a CLIP or T5 text encoder, such as
    openai/clip-vit-large-patch14, also of a pipeline with text_encoder and tokenizer; it stays as it is"""
    tokens: Positive = 16
    """T: text tokens that the network sees, CLIP's and T5's marks among them; longer captions are cut, shorter padded"""
    width: Positive | None = None
    """channels of a text token; null is the encoder's own (64 of words), filled in when it is opened"""
    pooled_width: Positive | None = None
    """channels of the pooled text; null is the encoder's own, filled in when it is opened"""
    padding: Literal["zero", "masked", "replicate", "noisy"] = "zero"
    """tokens after the caption: zeros that stay attended (the paper's baseline), zeros that are masked, copies of the
    caption, or copies with noise (Berrada et al. Eq. 7). No text is T zero tokens, all attended, under each of them"""
    noise: Annotated[float, Field(ge=0)] = 0.02
    """beta_txt: noisy adds noise * sqrt(m-1) * (standard deviation of each channel over the tokens), m copies (Eq. 7)"""


class Dropout(Settings):
    """Conditions withheld in training: one event per sample, keyed to it, of which at most one happens.

    Guidance needs the network without conditions, and each share is that of one branch: `both` trains (none, none),
    the last term of Eq. 2 of Berrada et al.; `control` trains (none, semantic), its middle term; `semantic` trains
    (control, none), the last term under sample.keep_control (SDXL) and no term of Eq. 2. The paper is silent on these
    shares. Withholding each condition independently in 10 % of the samples would train (none, none), which every
    guided step evaluates, on 1 % of them, and (control, none), which Eq. 2 never evaluates, on 9 %. Defaults: our choice.
    """

    both: Probability = 0.10
    """share of samples without any condition; of a run with one kind of condition, without that one"""
    control: Probability = 0.05
    """share of samples whose control variables alone are withheld, for sample.control_guidance"""
    semantic: Probability = 0.0
    """share of samples whose class or caption alone is withheld; .05 where guidance is to keep the control variables
    (sample.keep_control)"""

    @model_validator(mode="after")
    def _shares(self) -> "Dropout":
        total = self.both + self.control + self.semantic
        if total > 1 + 1e-9:
            raise ValueError(f"dropout.both + dropout.control + dropout.semantic is {total:g}, above 1: set them lower")
        return self


def without_dropout(tree: Any) -> Any:
    """Return settings of semantic or control without the `dropout` that they had before the block of that name."""
    return {k: v for k, v in tree.items() if k != "dropout"} if isinstance(tree, dict) else tree


def joint_dropout(tree: Any) -> Any:
    """Return the settings of a run with semantic.dropout and control.dropout, independent shares, as a joint `dropout`.

    Files written before the block `dropout` hold these. Raises ValueError where a run has both forms.
    """
    blocks = {name: tree[name] for name in ("semantic", "control") if isinstance(tree.get(name), dict)}
    old = {name: block["dropout"] for name, block in blocks.items() if "dropout" in block}
    if not old:
        return tree
    if "dropout" in tree:
        name = next(iter(old))
        raise ValueError(
            f"{name}.dropout={old[name]}: no such setting; set dropout.both, dropout.control and dropout.semantic, the "
            "shares of samples without any condition, without control variables, and without class or caption"
        )
    try:
        s, c = (float(old.get(name, 0.1)) for name in ("semantic", "control"))
    except (TypeError, ValueError):
        return tree
    joint = {"both": s * c, "control": (1 - s) * c, "semantic": s * (1 - c)}
    return tree | {name: without_dropout(block) for name, block in blocks.items()} | {"dropout": joint}


class Controls(Settings):
    """Control variables: facts of the crop and the file, so that the network need not take them for content (Eq. 1)."""

    variables: Names = ()
    """of flip, crop, aspect (high level), size, brightness, contrast (low level)"""
    mlp: Literal["split", "joint"] = "split"
    """split: E_h(phi_h) + gamma_c(t) E_l(phi_l) (Eq. 1); joint: one MLP over all, gamma_c = 1, as SDXL has it"""
    schedule: Literal["cosine", "uniform", "zero", "linear", "step"] = "cosine"
    """gamma_c at progress t: (1-cos(pi (1-t)^alpha))/2, 1, 0, 1-t, or 1 where sigma <= edge (Table A6)"""
    alpha: PositiveFloat = 8.0
    """exponent of cosine (Tables 2a, A6; 8 is the best published)"""
    edge: PositiveFloat = 2.0
    """sigma at which step begins to tell the low level (Table A6 has 1, 2 and 6)"""

    @model_validator(mode="after")
    def _joint(self) -> "Controls":
        if self.mlp == "joint" and self.schedule != "uniform":
            raise ValueError(
                f"control.schedule={self.schedule} weighs the low level, which control.mlp=joint does not keep apart: "
                "set control.schedule=uniform or control.mlp=split"
            )
        return self

    def columns(self, level: str) -> tuple[str, ...]:
        """Names of the numbers of one level, in order."""
        return tuple(c for v in self.variables if CONTROLS[v].level == level for c in CONTROLS[v].columns)
