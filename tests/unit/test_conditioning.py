"""Conditions of samples from user settings and training rows, and errors raised before any work."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.images import write_image_folders
from helpers.run_factory import small_run, with_settings, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from gesso import cli, conditioning, config, models, recipes, sample_files, sampling, snapshot
from gesso.config import CONTROL_VARIABLES, DataConfig, InputSpec, MMDiTConfig, UNetConfig
from gesso.data import crops, factory
from gesso.data.batching import Batcher
from gesso.data.encoders.text import WordVectors
from gesso.errors import UsageError
from gesso.sample_files import SampleArgs
from gesso.training.run_folder import open_dataset_for_run

ALL_VARIABLES = "flip,crop,aspect,size,brightness,contrast"
COLUMNS = [
    "flip", "crop_top", "crop_left", "crop_bottom", "crop_right", "aspect", "height", "width", "brightness", "contrast",
]  # fmt: skip


def run_with(variables: str = ALL_VARIABLES, **sample: object):
    """Return a run as after opening its data set."""
    run = small_run(**{"control.variables": variables, "data.num_classes": 10})
    return with_settings(run, **{f"sample.{k}": v for k, v in sample.items()})


def training_rows(n: int = 50) -> torch.Tensor:
    """Return rows whose values are 100 + row + column / 100; no flip is 0 and no crop is full."""
    return 100.0 + torch.arange(n)[:, None] + torch.arange(10) / 100


def build_control(run, seeds=range(40), rows=None, **control: str) -> dict[str, torch.Tensor]:
    cond, warnings = sampling.build_cond(run, list(seeds), training_rows() if rows is None else rows, control=control)
    assert warnings == []
    values = torch.cat([v for v in (cond.control_high, cond.control_low) if v is not None], dim=1)
    columns = run.control.column_names("high") + run.control.column_names("low")
    return dict(zip(columns, values.T, strict=True))


# Rows of control.


def test_sampled_control_comes_from_one_training_row():
    at = build_control(run_with(), range(300))
    number = at["aspect"].floor()
    for name in ("aspect", "height", "width", "brightness", "contrast"):
        torch.testing.assert_close(at[name], number + COLUMNS.index(name) / 100)
    assert len(number.unique()) > 45  # all rows, evenly
    assert torch.bincount((number - 100).long(), minlength=50).max() < 20


def test_default_flip_is_off():
    assert not build_control(run_with())["flip"].any()


def crop_box(at: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([at[column] for column in crops.BOX], dim=1)


def non_square_control_rows(n: int = 60) -> torch.Tensor:
    """Return rows of ALL_VARIABLES for images of many aspects, with random boxes as in training."""
    u = torch.rand(n, crops.UNIFORMS_PER_VIEW + 2, generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for *view, tall, wide in u:
        height, width = 40 + int(400 * tall), 40 + int(400 * wide)
        box = crops.random_view(DataConfig(crop_scale=(0.4, 1.0)), height, width, view)[:4]
        rows.append([0, *(1000 * edge for edge in box), 1000 * width / height, height, width, 100, 50])
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("method", ["train", "fixed", "square", "free"])
@pytest.mark.parametrize("aspect", [None, "3:2"])
def test_default_crop_is_the_center_box_of_the_sampled_size(method, aspect):
    """Training shows square boxes, so the full image is never the box of an image that is not square."""
    run = run_with(size_conditioning=method, size_range="[30,300]", **({"aspect": aspect} if aspect else {}))
    at = build_control(run, range(300), non_square_control_rows())
    height, width = run.sample_size
    for box, h, w in zip(crop_box(at), at["height"].tolist(), at["width"].tolist(), strict=True):
        torch.testing.assert_close(
            box, 1000 * torch.tensor(crops.center_view(h, w, width / height)[:4]), rtol=0, atol=1e-4
        )
        shape = float((box[3] - box[1]) * w / ((box[2] - box[0]) * h))
        assert shape == pytest.approx(width / height, rel=1e-5)
    full_batch = (crop_box(at) == torch.tensor([0.0, 0.0, 1000.0, 1000.0])).all(1)
    assert full_batch.all() if method in ("fixed", "square") and aspect is None else full_batch.float().mean() < 0.2


@pytest.mark.parametrize("variables", ["crop", "crop,aspect", "flip,crop,size"])
def test_default_crop_with_a_subset_of_variables(variables):
    """The box is the same from the size, the aspect, or the box of the row."""
    rows, run = non_square_control_rows(), run_with(variables)
    columns = run.control.column_names("high") + run.control.column_names("low")
    at = build_control(run, range(300), rows[:, [COLUMNS.index(column) for column in columns]])
    expected = torch.tensor([crops.center_view(*size)[:4] for size in rows[:, 6:8].tolist()]) * 1000
    distance = (crop_box(at)[:, None] - expected).abs().amax(2).min(1).values
    assert distance.max() < 0.01 and len(crop_box(at).unique(dim=0)) > 40


def test_default_crop_occurs_in_training(tmp_path):
    """The rows are those that training on a folder of oblong images stores."""
    for i, size in enumerate([(20, 40), (40, 20), (20, 30), (30, 30)]):
        write_image_folders(tmp_path / "all" / str(i), {"a": 2}, size=40)
        for path in (tmp_path / "all" / str(i)).rglob("*.png"):
            Image.open(path).crop((0, 0, *size)).save(path)
    run = small_run("digits-dit", **{"data.source": tmp_path / "all", "data.resolution": 16, "data.channels": 3,
                                 "control.variables": "crop,size", "eval.toy_metrics": "none"})  # fmt: skip
    run, loaded = open_dataset_for_run(run, Console(quiet=True))
    batches = Batcher(loaded, run, 0.5, torch.device("cpu"))
    displayed = batches.control_rows(torch.arange(len(loaded)))
    cond, _ = sampling.build_cond(run, range(100), displayed, labels=[0] * 100)
    sampled = torch.cat([cond.control_high, cond.control_low], dim=1)
    assert all((row == displayed).all(1).any() for row in sampled) and len(sampled.unique(dim=0)) == 4


def test_default_crop_of_local_crop_run_is_the_largest_training_crop():
    """Crops of .4 to .6 of the area never show a full image."""
    run = with_settings(run_with(), **{"data.crop_scale": "[.4,.6]"})
    at = build_control(run, range(200), non_square_control_rows())
    box = crop_box(at) / 1000
    sides = (box[:, 2:] - box[:, :2]) * torch.stack([at["height"], at["width"]], 1)
    shortest = torch.minimum(at["height"], at["width"])
    torch.testing.assert_close(sides, (0.6**0.5 * shortest)[:, None].expand(-1, 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(box[:, :2] + box[:, 2:], torch.ones(200, 2))
    for scale in ("null", "[.4,1]", "[.9,1]"):
        local_crop_run = with_settings(run_with(), **{"data.crop_scale": scale})
        assert crop_box(build_control(local_crop_run, rows=non_square_control_rows())).equal(
            crop_box(build_control(run_with(), rows=non_square_control_rows()))
        )


def test_crop_full_is_the_full_image():
    at = build_control(run_with(), rows=non_square_control_rows(), crop="full")
    assert crop_box(at).unique(dim=0).tolist() == [[0.0, 0.0, 1000.0, 1000.0]]


def test_bucket_run_samples_rows_of_its_bucket():
    """A square sample never has the conditions of an oblong image, which is in another bucket."""
    buckets = {"data.buckets": "[[12,6],[8,8],[6,12]]"}
    for aspect, (height, width) in [(None, (8, 8)), ("2:1", (6, 12)), ("1:2", (12, 6))]:
        run = with_settings(run_with(**({"aspect": aspect} if aspect else {})), **buckets)
        assert run.sample_size == (height, width)
        at = build_control(run, range(200), non_square_control_rows())
        wide = (at["width"] / at["height"]).log()
        nearest = (wide[:, None] - torch.tensor([0.5, 1.0, 2.0]).log()).abs().argmin(1)
        assert nearest.unique().tolist() == [[0.5, 1.0, 2.0].index(width / height)]
        for box, h, w in zip(crop_box(at), at["height"].tolist(), at["width"].tolist(), strict=True):
            expected = 1000 * torch.tensor(crops.center_view(h, w, width / height)[:4])
            torch.testing.assert_close(box, expected, rtol=0, atol=1e-4)


USER_VALUES = {
    "flip": ("yes", [1000]),
    "crop": ("0.1,0.2,0.9,1", [100, 200, 900, 1000]),
    "aspect": ("3:2", [1500]),
    "size": ("256x384", [256, 384]),
    "brightness": ("128.5", [128.5]),
    "contrast": ("0", [0]),
}


@settings(max_examples=40, deadline=None)
@given(names=st.sets(st.sampled_from(list(USER_VALUES))))
def test_user_values_override_only_their_columns(names):
    silent, at = build_control(run_with()), build_control(run_with(), **{name: USER_VALUES[name][0] for name in names})
    message = {column for name in names for column in CONTROL_VARIABLES[name].columns}
    if "size" in names:  # the aspect and the centred box are those of the size
        message |= {"aspect", *crops.BOX}
    elif "aspect" in names:  # as many pixels in this aspect
        message |= {"height", "width", *crops.BOX}
        torch.testing.assert_close(at["width"] / at["height"], torch.full((40,), 1.5), rtol=0.02, atol=0)
        torch.testing.assert_close(at["width"] * at["height"], silent["width"] * silent["height"], rtol=0.02, atol=0)
    for name in names:
        for column, value in zip(CONTROL_VARIABLES[name].columns, USER_VALUES[name][1], strict=True):
            torch.testing.assert_close(at[column], torch.full((40,), float(value)))
    for column in set(COLUMNS) - message:
        assert at[column].equal(silent[column])
    if "size" in names and "aspect" not in names:
        assert (at["aspect"] == 1500).all()


@settings(max_examples=30, deadline=None)
@given(low=st.integers(1, 3000), extent=st.integers(0, 50), method=st.sampled_from(["fixed", "square", "free"]))
def test_size_samplers_of_table_2b(low, extent, method):
    at = build_control(run_with(size_conditioning=method, size_range=f"[{low},{low + extent}]"), range(400))
    h, w = at["height"], at["width"]
    for side in (h, w):
        assert side.frac().abs().max() == 0 and side.min() >= low and side.max() <= low + extent
    torch.testing.assert_close(at["aspect"], 1000 * w / h)
    if method == "fixed":
        assert (h == low).all() and (w == low).all()
    elif method == "square":
        assert h.equal(w)
    elif extent > 3:
        assert abs(float(torch.corrcoef(torch.stack([h, w]))[0, 1])) < 0.25
    if method != "fixed" and extent <= 10:
        assert set(h.tolist()) == set(map(float, range(low, low + extent + 1)))  # both ends are drawn
    rows = at["brightness"] - 0.08
    torch.testing.assert_close(rows, rows.round())  # the rest still comes from training rows


def test_user_size_overrides_the_size_sampler():
    at = build_control(run_with(size_conditioning="free"), size="64x32")
    assert (at["height"] == 64).all() and (at["width"] == 32).all() and (at["aspect"] == 500).all()


@pytest.mark.parametrize("method", ["train", "fixed", "square", "free"])
def test_conditions_depend_only_on_the_sample_seed(method):
    run = run_with(size_conditioning=method)
    full_batch = build_control(run, range(100, 140))
    for part in ([117], [139, 100], [105, 105]):
        for name, values in build_control(run, part).items():
            assert values.equal(full_batch[name][[seed - 100 for seed in part]])


def test_run_with_a_subset_of_control_variables():
    rows = torch.tensor([[0.0, 4, 5], [1000.0, 6, 7]])
    at = build_control(run_with("flip,size"), rows=rows)
    assert list(at) == ["flip", "height", "width"] and not at["flip"].any()
    assert at["width"].equal(at["height"] + 1) and set(at["height"].tolist()) == {4.0, 6.0}
    cond, _ = sampling.build_cond(run_with("flip"), [0], rows[:, :1])
    assert cond.control_low is None and cond.control_high.shape == (1, 1)


def test_snapshot_without_control_rows():
    with pytest.raises(UsageError, match="has no control variables"):
        sampling.build_cond(run_with(), [0], None)


# What is written wrongly.


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("flip", ["maybe", "", "1", "YES"]),
        ("crop", ["half", "0,0,1", "0.5,0,0.5,1", "0,0.9,1,0.1", "-0.1,0,1,1", "0,0,1,1.01", "0,0,nan,1", "0,0,1,1,1"]),
        (
            "size",
            [
                "512",
                "512x",
                "0x512",
                "-5x5",
                "512.5x5",
                "axb",
                "512x512x3",
                "512:512",
                "infx5",
                "9" * 400 + "x5",
                "5x" + "9" * 5000,
            ],
        ),
        ("aspect", ["4:", ":3", "0", "-1:2", "4:0", "nan", "inf", "1e308:1e-308", "4x3", "4:3:2", ""]),
        ("brightness", ["-1", "256", "nan", "bright", ""]),
        ("contrast", ["-1", "inf", "255.01"]),
    ],
)
def test_malformed_values(name, wrong):
    for text in wrong:
        with pytest.raises(UsageError) as refused:
            build_control(run_with(), **{name: text})
        assert str(refused.value) == f"{name}={text}: write {CONTROL_VARIABLES[name].input_format}"


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(CONTROL_VARIABLES)), text=st.text(alphabet="0123456789.,:xe-+ ninfayo", max_size=12))
def test_control_values_parse_or_raise(name, text):
    try:
        at = build_control(run_with(), [0], **{name: text})
    except UsageError:
        return
    assert all(value.isfinite().all() for value in at.values())


def test_unknown_and_untrained_control_variables():
    with pytest.raises(UsageError, match=r"sise=4x4: no such control variable; did you mean size\?"):
        build_control(run_with(), sise="4x4")
    with pytest.raises(UsageError, match="not trained with crop; its control variables: flip, size"):
        build_control(run_with("flip,size"), rows=torch.zeros(1, 3), crop="full")
    with pytest.raises(UsageError, match="its control variables: none"):
        sampling.build_cond(with_settings(small_run(), **{"data.num_classes": 10}), [0], None, control={"size": "4x4"})


# Labels and prompts.


def run_with_classes(names=("cat", "dog", "hen"), **settings):
    run = with_settings(small_run(), **{"data.num_classes": len(names), **settings})
    return run.model_copy(update={"data": run.data.model_copy(update={"class_names": tuple(names)})})


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, [0, 1, 2, 0, 1]),
        ("2", [2] * 5),
        ("0-2", [0, 1, 2, 0, 1]),
        ("dog", [1] * 5),
        ("hen, 0", [2, 0, 2, 0, 2]),
        ("3", [3] * 5),
        (" dog ,cat", [1, 0, 1, 0, 1]),
    ],
)
def test_labels_cycle(text, expected):
    run = run_with_classes()
    labels = None if text is None else conditioning.parse_labels(run, text)
    assert conditioning.expand_labels(run, labels, range(5)) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("4", "label 4 is out of range: the run has labels 0 to 2 (and 3 for none)"),
        ("0-9", "label 4 is out of range"),
        ("cow", "no such class"),
        ("", "no such class"),
        ("2-1", "write numbers"),
        ("-1", "no such class"),
    ],
)
def test_invalid_labels(text, message):
    with pytest.raises(UsageError) as refused:
        conditioning.expand_labels(run_with_classes(), conditioning.parse_labels(run_with_classes(), text), range(5))
    assert message in str(refused.value)


def test_null_label_requires_condition_dropout():
    run = run_with_classes(**{"dropout.both": 0, "sample.guidance": 1})
    with pytest.raises(UsageError, match=r"label 3 is out of range: the run has labels 0 to 2$"):
        conditioning.expand_labels(run, [3], range(1))


@pytest.mark.parametrize("semantic", [0.0, 0.05])
def test_unlabelled_samples_drop_control_unless_trained(semantic):
    """(control, no semantic condition) is a separate condition, trained by dropout.semantic."""
    run = run_with("size", **{"guidance": 1})
    run = with_settings(run, **{"dropout.semantic": semantic})
    rows, labels = torch.tensor([[8.0, 8.0]]), [3, 10, 10, 0]
    cond, _ = sampling.build_cond(run, range(4), rows, labels)
    displayed = [True] * 4 if cond.has_control is None else cond.has_control.tolist()
    assert displayed == ([True] * 4 if semantic else [True, False, False, True])
    cond, _ = sampling.build_cond(run, range(4), rows, labels, None, {"size": "8x8"})
    assert cond.has_control is None  # the user names them
    arguments = with_settings(run, **{"semantic.kind": "text"})
    cond, _ = sampling.build_cond(arguments, range(2), rows, None, ["seven", ""])
    assert (cond.has_control is None) if semantic else cond.has_control.tolist() == [True, False]


def test_labels_and_prompts_for_the_wrong_run():
    arguments = with_settings(small_run(), **{"semantic.kind": "text", "data.num_classes": 10})
    unconditional = with_settings(
        small_run(), **{"semantic.kind": "none", "data.num_classes": 10, "sample.guidance": 1}
    )
    with pytest.raises(UsageError, match="trained with text: use --prompt"):
        conditioning.expand_labels(arguments, [3], range(1))
    with pytest.raises(UsageError, match="no classes: it takes no label"):
        conditioning.expand_labels(unconditional, [3], range(1))
    with pytest.raises(UsageError, match="--prompt 'a cat': this run was trained with classes: use --label"):
        conditioning.expand_prompts(run_with_classes(), ["a cat"], range(1))
    with pytest.raises(UsageError, match="neither classes nor text"):
        conditioning.expand_prompts(unconditional, ["a cat"], range(1))
    assert (
        conditioning.expand_labels(arguments, None, range(3)) is None
        and conditioning.expand_prompts(run_with_classes(), [], range(3)) is None
    )


def test_prompts_cycle_or_default_to_the_run():
    run = with_settings(small_run(), **{"semantic.kind": "text"})
    assert conditioning.expand_prompts(run, ["a", "b"], range(3)) == ["a", "b", "a"]
    assert conditioning.expand_prompts(run, [], range(2)) == ["", ""]
    run = with_settings(run, **{"data.example_captions": '["x","y"]'})
    assert conditioning.expand_prompts(run, [], range(3)) == ["x", "y", "x"]


def test_truncated_prompt_warns_once():
    run = with_settings(small_run(), **{"semantic.kind": "text", "semantic.max_tokens": 3, "data.num_classes": 10})
    long = "A fine-haired cat, asleep"
    cond, warnings = sampling.build_cond(run, [0, 1, 2], None, prompts=[long, "a cat", long])
    assert warnings == [
        "warning: 'A fine-haired cat, asleep': only the first 3 of 5 words are used, truncated at 'cat'",
    ]
    short = "a fine haired"
    same, none = sampling.build_cond(run, [0, 1, 2], None, prompts=[short, "A CAT!", short])
    assert none == [] and cond.text.shape == (3, 3, 64)
    assert cond.text.equal(same.text)


def test_word_embeddings_are_unit_vectors_of_word_and_position():
    arguments = WordVectors(small_run(**{"semantic.max_tokens": 4, "semantic.embed_dim": 512}).semantic)
    tokens, lengths, _ = arguments(["red cat", "cat", "dog red cat", ""])
    assert lengths.tolist() == [2, 1, 3, 0] and not tokens[3].any() and not tokens[1, 1:].any()
    assert tokens[tokens.any(2)].square().mean(1).sub(1).abs().max() < 0.25
    single, _, _ = WordVectors(small_run(**{"semantic.max_tokens": 4, "semantic.embed_dim": 512}).semantic)(["xy cat"])
    assert single[0, 1].equal(tokens[0, 1])  # another vocabulary
    position = tokens[2, 2] - tokens[0, 1]  # cat in places 2 and 1
    assert position.abs().max() > 0.1
    torch.testing.assert_close(position - (tokens[0, 1] - tokens[1, 0]), tokens[2, 2] - 2 * tokens[0, 1] + tokens[1, 0])


# Refused before any work: by the settings.


def error_message(*settings: str, recipe: str = "digits") -> str:
    with pytest.raises(UsageError) as refused:
        recipes.resolve(recipe, list(settings))
    return str(refused.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["dropout.both=0"], "sample.guidance=1.5 needs a network that also learned without label or text"),
        (["dropout.both=0", "sample.guide_run=self", "sample.guide_nimg=5"], "also learned without label or text"),
        (["semantic.kind=none", "data.num_classes=10"], "has nothing to guide towards"),
        (["data.num_classes=0"], "has nothing to guide towards"),
        (["sample.control_guidance=1.4"], "sample.control_guidance=1.4 needs"),
        (
            [
                "sample.control_guidance=1.4",
                "control.variables=size",
                "dropout.control=0",
                "dropout.semantic=.1",
                "sample.keep_control=true",
            ],
            "sample.control_guidance=1.4 needs",
        ),
        (
            ["control.variables=size", "dropout.both=0"],
            "also learned without label or text and control variables: set dropout.both",
        ),
        (["control.variables=size", "dropout.both=0", "dropout.semantic=.2"], "set dropout.both above 0"),
        (
            ["control.variables=size", "sample.keep_control=true"],
            "(sample.keep_control=true): set dropout.semantic above 0",
        ),
        (["dropout.both=.5", "dropout.control=.3", "dropout.semantic=.3"], "is 1.1, above 1: set them lower"),
        (["dropout.both=-.1"], "dropout.both"),
        (["semantic.dropout=0.2"], "semantic.dropout = 0.2: no such setting"),
        (["control.dropout=0"], "control.dropout = 0: no such setting"),
        (["control.variables=[size,colour]"], "control.variables"),
        (['control.variables=[["size"]]'], "control.variables"),
        (["control.variables=size", "control.mlp=joint"], "control.schedule=cosine weights the low level"),
        (["net.name=edm2-ladder", "control.variables=size"], "takes no control variables"),
        (["net.name=dit", "semantic.kind=text"], "net.name=dit takes no text"),
        (["sample.resolution=9"], "sample.resolution=9 is not a multiple of 2, which net.name=mmdit++ needs"),
        (["sample.resolution=0"], "greater than 0"),
        (["sample.guidance_interval=[2,1]"], "does not rise"),
        (["sample.guidance_interval=[1,1]"], "does not rise"),
        (["sample.guidance_interval=[-1,1]"], "greater than or equal to 0"),
        (["sample.size_range=[9,8]"], "falls"),
        (["sample.sigma_rel=0.2887"], "less than 0.288"),
        (["sample.sigma_rel=0"], "greater than 0"),
        (["sample.guide_run=self", "sample.guide_sigma_rel=0.3"], "less than 0.288"),
        (["sample.guide_sigma_rel=0.1"], "describe another network"),
        (["sample.guide_conditioning=all"], "describe another network"),
        (["sample.steps=0"], "greater than 0"),
        (["sample.steps=-3"], "greater than 0"),
        (["semantic.padding=repeat"], "'noisy'"),
        (["semantic.padding_noise=-1"], "greater than or equal to 0"),
        (["semantic.max_tokens=0"], "greater than 0"),
        (["control.alpha=0"], "greater than 0"),
        (["control.step_sigma=-2"], "greater than 0"),
    ],
)
def test_invalid_condition_settings(settings, message):
    text = error_message(*settings)
    assert message in text and len(text.splitlines()) <= 2


def test_sizes_by_network():
    assert "not a multiple of 2, which net.name=edm2" in error_message("sample.resolution=9", recipe="digits-edm2")
    deep = ["net.channel_mult=[1,1,1]", "net.transformer_depth=[0,0,1]"]
    assert "multiple of 4, which net.name=unet" in error_message("sample.resolution=6", *deep, recipe="digits-unet")
    table = ["net.pos_embed_max_size=8"]
    assert "above 16, the maximum of net.pos_embed_max_size=8" in error_message(
        "sample.resolution=18", *table, recipe="digits-mmdit"
    )
    recipes.resolve("digits-mmdit", ["sample.resolution=16", *table])


def test_shared_pooled_mlp_and_split_control():
    settings = ["net.pooled_mlp=shared", "semantic.kind=text", "control.variables=size"]
    assert "set control.mlp=joint" in error_message(*settings, recipe="digits-unet")
    recipes.resolve("digits-unet", [*settings, "control.mlp=joint", "control.schedule=uniform"])


def test_guidance_without_condition_dropout():
    recipes.resolve("digits", ["dropout.both=0", "sample.guidance=1"])
    recipes.resolve("digits", ["dropout.both=0", "sample.guide_run=runs/other"])
    recipes.resolve("digits", ["dropout.both=0", "dropout.semantic=.1"])  # without control that is no condition at all
    settings_ = ["control.variables=size", "dropout.both=0", "dropout.control=0", "dropout.semantic=.05"]
    recipes.resolve("digits", [*settings_, "sample.keep_control=true"])
    recipes.resolve("digits", ["control.variables=size", "dropout.control=0"])


def test_training_rejects_unavailable_noise_levels_early(monkeypatch):
    monkeypatch.setattr(factory, "open_source", None)  # no image is read
    for update, message in (
        ({"sample.schedule": "trailing"}, "this process has karras"),
        ({"process.name": "rf", "sample.schedule": "leading"}, "this process has linear, sd3, karras"),
        ({"process.name": "vp", "sample.steps": 2000}, "allows at most 1000 steps"),
        ({"sample.final_level": "sigma_min"}, "only process.name=vp"),
        ({"sample.shift": 3}, "above 40"),
    ):
        with pytest.raises(UsageError, match=message):
            open_dataset_for_run(small_run(**update), Console(quiet=True))


@pytest.mark.parametrize("update", [{"semantic.kind": "none"}, {"semantic.kind": "none", "sample.guidance": 3}])
def test_training_without_guidable_conditions_notes_it(update, capsys):
    run, _ = open_dataset_for_run(small_run(**update), Console(width=200))
    assert (
        run.sample.guidance == 1 and "sample.guidance=1, because the images have no classes" in capsys.readouterr().out
    )


# Refused before any work: on the command line.


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "classes")
    write_run(root / "sized", **{"control.variables": "flip,size"})
    write_run(root / "words", **{"semantic.kind": "text", "semantic.max_tokens": 4})
    write_run(root / "edm2", "digits-edm2")
    return root


@pytest.fixture
def sample(folders, monkeypatch, capsys, tmp_path):
    def type_in(folder: str, *arguments: str) -> tuple[int, str, str]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        typed = ["gesso", "sample", folders / folder, *arguments, "--seeds", "0-1", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in typed])
        monkeypatch.setattr(cli, "console", Console(width=200))
        monkeypatch.setattr(cli, "errors", Console(stderr=True, width=200))
        with pytest.raises(SystemExit) as end:
            cli.main()
        message = capsys.readouterr()
        return end.value.code or 0, message.out, message.err

    return type_in


@pytest.mark.parametrize(
    "folder, arguments, message",
    [
        ("classes", ["--prompt", "a cat"], "was trained with classes: use --label"),
        ("words", ["--label", "3"], "was trained with text: use --prompt"),
        ("classes", ["--label", "11"], "the run has labels 0 to 9 (and 10 for none)"),
        ("classes", ["--size", "8x8"], "this run was not trained with size; its control variables: none"),
        ("sized", ["--crop", "full"], "not trained with crop; its control variables: flip, size"),
        ("sized", ["--control", "sise=8x8"], "did you mean size?"),
        ("sized", ["--control", "size"], "write HEIGHTxWIDTH"),
        ("classes", ["sample.schedule=trailing"], "this process has karras"),
        ("sized", ["--size", "8"], "write HEIGHTxWIDTH"),
        ("sized", ["--flip", "maybe"], "write yes or no"),
        ("sized", ["sample.control_guidance=nan"], "finite"),
        ("classes", ["sample.control_guidance=2"], "needs a network that learned with and without control"),
        ("classes", ["sample.resolution=9"], "not a multiple of 2"),
        ("edm2", ["sample.resolution=9"], "not a multiple of 2, which net.name=edm2 needs"),
        ("classes", ["sample.guide_run=self"], "is the same network"),
        ("classes", ["sample.guide_run=nowhere"], "holds no snapshots"),
        ("classes", ["dropout.control=0"], "fixed by training"),
        ("classes", ["sample.guidance_interval=[3,1]"], "does not rise"),
        ("classes", ["sample.sigma_rel=0.2887"], "less than"),
        ("classes", ["sample.steps=0"], "greater than 0"),
    ],
)
def test_sample_command_errors(sample, monkeypatch, folder, arguments, message, tmp_path):
    monkeypatch.setattr(snapshot, "denoiser_from_weights", None)  # no network is built
    code, _, err = sample(folder, *arguments)
    assert code == 2 and message in err and "Traceback" not in err and len(err.strip().splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_sample_options_reach_the_network(sample, monkeypatch):
    calls = []
    build = sampling.build_cond
    monkeypatch.setattr(sampling, "build_cond", lambda *a, **k: calls.append(build(*a, **k)) or calls[-1])
    for arguments in ([], ["--size", "4x8"], ["--control", "size=4x8", "--flip", "yes"]):
        code, out, _ = sample("sized", *arguments)
        assert code == 0 and "wrote 2 images" in out
    silent, sized, both = (cond for cond, _ in calls)
    assert silent.control_low.tolist() == [[8, 8]] * 2 and not silent.control_high.any()
    assert sized.control_low.tolist() == [[4, 8]] * 2 and not sized.control_high.any()
    assert both.control_low.tolist() == [[4, 8]] * 2 and (both.control_high == 1000).all()


def test_different_sample_settings_use_different_folders(folders):
    """Settings that differ from the run's are in the name, so that samples do not overwrite each other."""
    run = config.load_config(folders / "sized" / "run.yaml")
    settings_lists = [
        {"guidance": 2},
        {"steps": 4},
        {"eta": 0.5, "sampler": "euler"},
        {"S_churn": 10, "sampler": "heun"},
        {"shift": 0.5},
        {"schedule": "karras"},
        {"guidance_interval": "[0.1,2]"},
        {"size_conditioning": "free"},
        {"resolution": 12},
        {"guide_run": "runs/a", "guidance": 2},
    ]
    variants = [
        SampleArgs(label="3"),
        SampleArgs(label="3", control={"size": "4x8"}),
        SampleArgs(control={"size": "4x8"}),
        SampleArgs(prompts=("a/b",)),
        SampleArgs(prompts=("a very " * 30 + "one",)),
        SampleArgs(prompts=("a very " * 30 + "two",)),
    ]
    folder = folders / "sized"
    names = [sample_files._samples_folder_name(folder, run, args, 640) for args in (SampleArgs(), *variants)]
    for update in settings_lists:
        changed = with_settings(run, **{f"sample.{name}": value for name, value in update.items()})
        names += [sample_files._samples_folder_name(folder, changed, args, 640) for args in (SampleArgs(), variants[0])]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 80
    assert not any("/" in name or name.startswith((".", "-")) for name in names)
    assert names[:2] == ["default-nimg640", "label3-nimg640"] and "guidance-2.0-nimg640" in names
    assert sample_files._samples_folder_name(folder, run, SampleArgs(), 320) == "default-nimg320"


def test_inaccurate_ema_reconstruction_warns(sample):
    assert "warning" not in sample("sized")[1]
    assert (
        "warning: the stored snapshots cannot reconstruct half-life 1,000,000 accurately"
        in sample("sized", "sample.halflife=1M")[1]
    )


def test_truncated_prompt_warns_on_the_command_line(sample):
    code, out, _ = sample("words", "--prompt", "a very long word for three")
    assert (
        code == 0
        and "warning: 'a very long word for three': only the first 4 of 6 words are used, truncated at 'for'" in out
    )


# Networks called on what they were not built for.


@pytest.mark.parametrize(
    "recipe",
    [
        "digits",
        "digits-dit",
        "digits-dit-att",
        "digits-pixart",
        "digits-mdt",
        "digits-mmdit",
        "digits-mp-dit",
        "digits-mp-mmdit++",
        "digits-unet",
        "digits-edm2",
    ],
)
@pytest.mark.parametrize("size", [(7, 9), (8, 9), (9, 8)])
def test_size_error_names_the_required_multiple(recipe, size):
    run = small_run(recipe)
    net = models.build_network(run.net, InputSpec(1, 8))
    level = torch.full((1,), 0.5)
    with pytest.raises(ValueError, match=f"multiples of 2, but was given {size[0]} x {size[1]}"):
        net(torch.zeros(1, 1, *size), level, level, sampling.Cond())


def test_ladder_size_error_names_the_required_multiple():
    for step in "AG":
        net = models.build_network(
            small_run(
                "digits-edm2",
                **{"net.name": "edm2-ladder", "net.config": step, "net.channels": 32, "net.channels_per_head": 16},
            ).net,
            InputSpec(1, 8),
        )
        with pytest.raises(ValueError, match="multiples of 2, but was given 7 x 8"):
            net(torch.zeros(1, 1, 7, 8), torch.zeros(1), torch.zeros(1), sampling.Cond())


@pytest.mark.parametrize(
    "cfg",
    [
        MMDiTConfig(hidden_size=32, depth=1, num_heads=2),
        UNetConfig(
            channels=16,
            channel_mult=(1, 2),
            num_blocks=1,
            transformer_depth=(0, 1),
            channels_per_head=8,
            norm_num_groups=8,
        ),
    ],
)
def test_missing_pooled_text(cfg):
    net, level = models.build_network(cfg, InputSpec(1, 8, text_dim=6, pooled_dim=6)), torch.full((1,), 0.5)
    cond = sampling.Cond(text=torch.zeros(1, 3, 6))
    for withheld in (cond, cond.without(semantic=True)):
        with pytest.raises(ValueError, match=r"built for pooled text needs Cond\.pooled"):
            net(torch.zeros(1, 1, 8, 8), level, level, withheld)
