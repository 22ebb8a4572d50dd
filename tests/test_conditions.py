"""What a user says of a sample, and what is drawn where the user is silent; and what is refused before any work."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import folder_of_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from written import changed, small, written

from gesso import __main__ as cli
from gesso import conditions, config, generate, nets, recipes, snapshot
from gesso.config import CONTROLS, Data, Inputs, MMDiT, UNet
from gesso.data import crops, dataset
from gesso.data.batches import Batches
from gesso.data.text import Words
from gesso.errors import UsageError
from gesso.train.start import opened

ALL = "flip,crop,aspect,size,brightness,contrast"
COLUMNS = [
    "flip", "crop_top", "crop_left", "crop_bottom", "crop_right", "aspect", "height", "width", "brightness", "contrast",
]  # fmt: skip


def run_with(variables: str = ALL, **sample: object):
    """A run as if its data had been opened."""
    run = small(**{"control.variables": variables, "data.num_classes": 10})
    return changed(run, **{f"sample.{k}": v for k, v in sample.items()})


def training_rows(n: int = 50) -> torch.Tensor:
    """Every number tells its row: i + column / 100. No flip of the rows is 0, no crop full."""
    return 100.0 + torch.arange(n)[:, None] + torch.arange(10) / 100


def drawn(run, seeds=range(40), rows=None, **control: str) -> dict[str, torch.Tensor]:
    cond, warnings = conditions.build(run, list(seeds), training_rows() if rows is None else rows, control=control)
    assert warnings == []
    values = torch.cat([v for v in (cond.control_high, cond.control_low) if v is not None], dim=1)
    columns = run.control.columns("high") + run.control.columns("low")
    return dict(zip(columns, values.T, strict=True))


# Rows of control.


def test_what_is_drawn_comes_from_one_row():
    at = drawn(run_with(), range(300))
    number = at["aspect"].floor()
    for name in ("aspect", "height", "width", "brightness", "contrast"):
        torch.testing.assert_close(at[name], number + COLUMNS.index(name) / 100)
    assert len(number.unique()) > 45  # all rows, evenly
    assert torch.bincount((number - 100).long(), minlength=50).max() < 20


def test_the_default_flip_is_no():
    assert not drawn(run_with())["flip"].any()


def box_of(at: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([at[column] for column in crops.BOX], dim=1)


def oblong_rows(n: int = 60) -> torch.Tensor:
    """Rows of ALL for pictures of many aspects, with the random boxes of training."""
    u = torch.rand(n, crops.UNIFORMS + 2, generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for *view, tall, wide in u:
        height, width = 40 + int(400 * tall), 40 + int(400 * wide)
        box = crops.drawn(Data(crop_scale=(0.4, 1.0)), height, width, view)[:4]
        rows.append([0, *(1000 * edge for edge in box), 1000 * width / height, height, width, 100, 50])
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("how", ["train", "fixed", "square", "free"])
@pytest.mark.parametrize("aspect", [None, "3:2"])
def test_the_default_crop_is_the_centred_box_of_the_size_that_is_drawn(how, aspect):
    """Training shows square boxes: of a picture twice as wide as high the whole is never one of them."""
    run = run_with(size=how, size_range="[30,300]", **({"aspect": aspect} if aspect else {}))
    at = drawn(run, range(300), oblong_rows())
    height, width = run.canvas
    for box, h, w in zip(box_of(at), at["height"].tolist(), at["width"].tolist(), strict=True):
        torch.testing.assert_close(box, 1000 * torch.tensor(crops.centred(h, w, width / height)[:4]), rtol=0, atol=1e-4)
        shape = float((box[3] - box[1]) * w / ((box[2] - box[0]) * h))
        assert shape == pytest.approx(width / height, rel=1e-5)
    whole = (box_of(at) == torch.tensor([0.0, 0.0, 1000.0, 1000.0])).all(1)
    assert whole.all() if how in ("fixed", "square") and aspect is None else whole.float().mean() < 0.2


@pytest.mark.parametrize("variables", ["crop", "crop,aspect", "flip,crop,size"])
def test_the_default_crop_with_some_of_the_variables(variables):
    """The same box from the size, from the aspect, or from the row's own box."""
    rows, run = oblong_rows(), run_with(variables)
    columns = run.control.columns("high") + run.control.columns("low")
    at = drawn(run, range(300), rows[:, [COLUMNS.index(column) for column in columns]])
    due = torch.tensor([crops.centred(*size)[:4] for size in rows[:, 6:8].tolist()]) * 1000
    distance = (box_of(at)[:, None] - due).abs().amax(2).min(1).values
    assert distance.max() < 0.01 and len(box_of(at).unique(dim=0)) > 40


def test_the_default_crop_is_among_those_of_training(tmp_path):
    """Of a folder of oblong pictures, through the rows that training itself stores."""
    for i, size in enumerate([(20, 40), (40, 20), (20, 30), (30, 30)]):
        folder_of_images(tmp_path / "all" / str(i), {"a": 2}, size=40)
        for path in (tmp_path / "all" / str(i)).rglob("*.png"):
            Image.open(path).crop((0, 0, *size)).save(path)
    run = small("digits-dit", **{"data.source": tmp_path / "all", "data.resolution": 16, "data.channels": 3,
                                 "control.variables": "crop,size", "eval.features": "none"})  # fmt: skip
    run, loaded = opened(run, Console(quiet=True))
    batches = Batches(loaded, run, 0.5, torch.device("cpu"))
    shown = batches.rows(torch.arange(len(loaded)))
    cond, _ = conditions.build(run, range(100), shown, labels=[0] * 100)
    made = torch.cat([cond.control_high, cond.control_low], dim=1)
    assert all((row == shown).all(1).any() for row in made) and len(made.unique(dim=0)) == 4


def test_the_default_crop_of_a_run_on_local_crops_is_the_largest_that_it_was_shown():
    """Crops of .4 to .6 of the area never show a whole picture."""
    run = changed(run_with(), **{"data.crop_scale": "[.4,.6]"})
    at = drawn(run, range(200), oblong_rows())
    box = box_of(at) / 1000
    sides = (box[:, 2:] - box[:, :2]) * torch.stack([at["height"], at["width"]], 1)
    least = torch.minimum(at["height"], at["width"])
    torch.testing.assert_close(sides, (0.6**0.5 * least)[:, None].expand(-1, 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(box[:, :2] + box[:, 2:], torch.ones(200, 2))
    for scale in ("null", "[.4,1]", "[.9,1]"):
        other = changed(run_with(), **{"data.crop_scale": scale})
        assert box_of(drawn(other, rows=oblong_rows())).equal(box_of(drawn(run_with(), rows=oblong_rows())))


def test_crop_full_is_the_whole_picture():
    at = drawn(run_with(), rows=oblong_rows(), crop="full")
    assert box_of(at).unique(dim=0).tolist() == [[0.0, 0.0, 1000.0, 1000.0]]


def test_a_run_on_buckets_draws_rows_of_the_bucket_that_is_sampled():
    """A square canvas is never that of a picture twice as wide as high, which training puts into another bucket."""
    buckets = {"data.buckets": "[[12,6],[8,8],[6,12]]"}
    for aspect, (height, width) in [(None, (8, 8)), ("2:1", (6, 12)), ("1:2", (12, 6))]:
        run = changed(run_with(**({"aspect": aspect} if aspect else {})), **buckets)
        assert run.canvas == (height, width)
        at = drawn(run, range(200), oblong_rows())
        wide = (at["width"] / at["height"]).log()
        nearest = (wide[:, None] - torch.tensor([0.5, 1.0, 2.0]).log()).abs().argmin(1)
        assert nearest.unique().tolist() == [[0.5, 1.0, 2.0].index(width / height)]
        for box, h, w in zip(box_of(at), at["height"].tolist(), at["width"].tolist(), strict=True):
            due = 1000 * torch.tensor(crops.centred(h, w, width / height)[:4])
            torch.testing.assert_close(box, due, rtol=0, atol=1e-4)


SAID = {
    "flip": ("yes", [1000]),
    "crop": ("0.1,0.2,0.9,1", [100, 200, 900, 1000]),
    "aspect": ("3:2", [1500]),
    "size": ("256x384", [256, 384]),
    "brightness": ("128.5", [128.5]),
    "contrast": ("0", [0]),
}


@settings(max_examples=40, deadline=None)
@given(names=st.sets(st.sampled_from(list(SAID))))
def test_what_the_user_says_replaces_the_row_and_nothing_else_does(names):
    silent, at = drawn(run_with()), drawn(run_with(), **{name: SAID[name][0] for name in names})
    said = {column for name in names for column in CONTROLS[name].columns}
    if "size" in names:  # the aspect and the centred box are those of the size
        said |= {"aspect", *crops.BOX}
    elif "aspect" in names:  # as many pixels in this aspect
        said |= {"height", "width", *crops.BOX}
        torch.testing.assert_close(at["width"] / at["height"], torch.full((40,), 1.5), rtol=0.02, atol=0)
        torch.testing.assert_close(at["width"] * at["height"], silent["width"] * silent["height"], rtol=0.02, atol=0)
    for name in names:
        for column, value in zip(CONTROLS[name].columns, SAID[name][1], strict=True):
            torch.testing.assert_close(at[column], torch.full((40,), float(value)))
    for column in set(COLUMNS) - said:
        assert at[column].equal(silent[column])
    if "size" in names and "aspect" not in names:
        assert (at["aspect"] == 1500).all()


@settings(max_examples=30, deadline=None)
@given(low=st.integers(1, 3000), more=st.integers(0, 50), how=st.sampled_from(["fixed", "square", "free"]))
def test_the_other_samplers_of_table_2b(low, more, how):
    at = drawn(run_with(size=how, size_range=f"[{low},{low + more}]"), range(400))
    h, w = at["height"], at["width"]
    for side in (h, w):
        assert side.frac().abs().max() == 0 and side.min() >= low and side.max() <= low + more
    torch.testing.assert_close(at["aspect"], 1000 * w / h)
    if how == "fixed":
        assert (h == low).all() and (w == low).all()
    elif how == "square":
        assert h.equal(w)
    elif more > 3:
        assert abs(float(torch.corrcoef(torch.stack([h, w]))[0, 1])) < 0.25
    if how != "fixed" and more <= 10:
        assert set(h.tolist()) == set(map(float, range(low, low + more + 1)))  # both ends are drawn
    rows = at["brightness"] - 0.08
    torch.testing.assert_close(rows, rows.round())  # the rest still comes from training rows


def test_the_users_size_goes_over_the_sampler():
    at = drawn(run_with(size="free"), size="64x32")
    assert (at["height"] == 64).all() and (at["width"] == 32).all() and (at["aspect"] == 500).all()


@pytest.mark.parametrize("how", ["train", "fixed", "square", "free"])
def test_a_sample_depends_on_its_own_seed(how):
    run = run_with(size=how)
    whole = drawn(run, range(100, 140))
    for part in ([117], [139, 100], [105, 105]):
        for name, values in drawn(run, part).items():
            assert values.equal(whole[name][[seed - 100 for seed in part]])


def test_a_run_with_some_of_the_variables():
    rows = torch.tensor([[0.0, 4, 5], [1000.0, 6, 7]])
    at = drawn(run_with("flip,size"), rows=rows)
    assert list(at) == ["flip", "height", "width"] and not at["flip"].any()
    assert at["width"].equal(at["height"] + 1) and set(at["height"].tolist()) == {4.0, 6.0}
    cond, _ = conditions.build(run_with("flip"), [0], rows[:, :1])
    assert cond.control_low is None and cond.control_high.shape == (1, 1)


def test_a_snapshot_without_its_rows():
    with pytest.raises(UsageError, match="lacks its rows"):
        conditions.build(run_with(), [0], None)


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
            drawn(run_with(), **{name: text})
        assert str(refused.value) == f"{name}={text}: write {CONTROLS[name].written}"


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(CONTROLS)), text=st.text(alphabet="0123456789.,:xe-+ ninfayo", max_size=12))
def test_any_text_is_a_number_or_refused(name, text):
    try:
        at = drawn(run_with(), [0], **{name: text})
    except UsageError:
        return
    assert all(value.isfinite().all() for value in at.values())


def test_unknown_controls_and_those_that_the_run_lacks():
    with pytest.raises(UsageError, match=r"sise=4x4: no such control variable; did you mean size\?"):
        drawn(run_with(), sise="4x4")
    with pytest.raises(UsageError, match="not trained with crop; its control variables: flip, size"):
        drawn(run_with("flip,size"), rows=torch.zeros(1, 3), crop="full")
    with pytest.raises(UsageError, match="its control variables: none"):
        conditions.build(changed(small(), **{"data.num_classes": 10}), [0], None, control={"size": "4x4"})


# Labels and prompts.


def classes(names=("cat", "dog", "hen"), **settings):
    run = changed(small(), **{"data.num_classes": len(names), **settings})
    return run.model_copy(update={"data": run.data.model_copy(update={"class_names": tuple(names)})})


@pytest.mark.parametrize(
    "text, wanted",
    [
        (None, [0, 1, 2, 0, 1]),
        ("2", [2] * 5),
        ("0-2", [0, 1, 2, 0, 1]),
        ("dog", [1] * 5),
        ("hen, 0", [2, 0, 2, 0, 2]),
        ("3", [3] * 5),
    ],
)
def test_labels_go_round(text, wanted):
    assert conditions.labels_for(classes(), text, 5) == wanted


@pytest.mark.parametrize(
    "text, said",
    [
        ("4", "label 4 is out of range: the run has labels 0 to 2 (and 3 for none)"),
        ("0-9", "label 4 is out of range"),
        ("cow", "no such class"),
        ("", "no such class"),
        ("2-1", "write numbers"),
        ("-1", "no such class"),
    ],
)
def test_labels_that_are_refused(text, said):
    with pytest.raises(UsageError) as refused:
        conditions.labels_for(classes(), text, 5)
    assert said in str(refused.value)


def test_no_label_where_none_was_never_trained():
    run = classes(**{"dropout.both": 0, "sample.guidance": 1})
    with pytest.raises(UsageError, match=r"label 3 is out of range: the run has labels 0 to 2$"):
        conditions.labels_for(run, "3", 1)


@pytest.mark.parametrize("semantic", [0.0, 0.05])
def test_samples_without_label_are_without_control_unless_training_shows_that(semantic):
    """(control, none) is a condition of its own, which dropout.semantic trains."""
    run = run_with("size", **{"guidance": 1})
    run = changed(run, **{"dropout.semantic": semantic})
    rows, labels = torch.tensor([[8.0, 8.0]]), [3, 10, 10, 0]
    cond, _ = conditions.build(run, range(4), rows, labels)
    shown = [True] * 4 if cond.has_control is None else cond.has_control.tolist()
    assert shown == ([True] * 4 if semantic else [True, False, False, True])
    cond, _ = conditions.build(run, range(4), rows, labels, None, {"size": "8x8"})
    assert cond.has_control is None  # the user names them
    words = changed(run, **{"semantic.kind": "text"})
    cond, _ = conditions.build(words, range(2), rows, None, ["seven", ""])
    assert (cond.has_control is None) if semantic else cond.has_control.tolist() == [True, False]


def test_labels_and_prompts_to_the_wrong_run():
    words = changed(small(), **{"semantic.kind": "text", "data.num_classes": 10})
    nothing = changed(small(), **{"semantic.kind": "none", "data.num_classes": 10, "sample.guidance": 1})
    with pytest.raises(UsageError, match="trained with words: say --prompt"):
        conditions.labels_for(words, "3", 1)
    with pytest.raises(UsageError, match="no classes: it takes no label"):
        conditions.labels_for(nothing, "3", 1)
    with pytest.raises(UsageError, match="--prompt 'a cat': this run was trained with classes: say --label"):
        conditions.prompts_for(classes(), ["a cat"], 1)
    with pytest.raises(UsageError, match="neither classes nor text"):
        conditions.prompts_for(nothing, ["a cat"], 1)
    assert conditions.labels_for(words, None, 3) is None and conditions.prompts_for(classes(), [], 3) is None


def test_prompts_go_round_or_are_the_runs_own():
    run = changed(small(), **{"semantic.kind": "text"})
    assert conditions.prompts_for(run, ["a", "b"], 3) == ["a", "b", "a"]
    assert conditions.prompts_for(run, [], 2) == ["", ""]
    run = changed(run, **{"data.examples": '["x","y"]'})
    assert conditions.prompts_for(run, [], 3) == ["x", "y", "x"]


def test_what_is_cut_is_said_once():
    run = changed(small(), **{"semantic.kind": "text", "semantic.tokens": 3, "data.num_classes": 10})
    long = "A fine-haired cat, asleep"
    cond, warnings = conditions.build(run, [0, 1, 2], None, prompts=[long, "a cat", long])
    assert warnings == [
        "warning: 'A fine-haired cat, asleep': of 5 words the first 3 are seen, cut from 'cat' on",
    ]
    short = "a fine haired"
    same, none = conditions.build(run, [0, 1, 2], None, prompts=[short, "A CAT!", short])
    assert none == [] and cond.text.shape == (3, 3, 64)
    assert cond.text.equal(same.text)


def test_words_are_unit_vectors_that_depend_on_the_word_and_its_place_alone():
    words = Words(small(**{"semantic.tokens": 4, "semantic.width": 512}).semantic)
    tokens, lengths, _ = words(["red cat", "cat", "dog red cat", ""])
    assert lengths.tolist() == [2, 1, 3, 0] and not tokens[3].any() and not tokens[1, 1:].any()
    assert tokens[tokens.any(2)].square().mean(1).sub(1).abs().max() < 0.25
    alone, _, _ = Words(small(**{"semantic.tokens": 4, "semantic.width": 512}).semantic)(["xy cat"])
    assert alone[0, 1].equal(tokens[0, 1])  # another vocabulary
    position = tokens[2, 2] - tokens[0, 1]  # cat in places 2 and 1
    assert position.abs().max() > 0.1
    torch.testing.assert_close(position - (tokens[0, 1] - tokens[1, 0]), tokens[2, 2] - 2 * tokens[0, 1] + tokens[1, 0])


# Refused before any work: by the settings.


def complaint(*settings: str, recipe: str = "digits") -> str:
    with pytest.raises(UsageError) as refused:
        recipes.resolve(recipe, list(settings))
    return str(refused.value)


@pytest.mark.parametrize(
    "settings, said",
    [
        (["dropout.both=0"], "sample.guidance=1.5 needs a network that also learned without label or text"),
        (["dropout.both=0", "sample.guide=self", "sample.guide_nimg=5"], "also learned without label or text"),
        (["semantic.kind=none", "data.num_classes=10"], "has nothing to guide towards"),
        (["data.num_classes=0"], "has nothing to guide towards"),
        (["sample.control_guidance=1.4"], "sample.control_guidance=1.4 needs"),
        (["sample.control_guidance=1.4", "control.variables=size", "dropout.control=0", "dropout.semantic=.1",
          "sample.keep_control=true"], "sample.control_guidance=1.4 needs"),
        (["control.variables=size", "dropout.both=0"], "also learned without label or text and control variables: set dropout.both"),
        (["control.variables=size", "dropout.both=0", "dropout.semantic=.2"], "set dropout.both above 0"),
        (["control.variables=size", "sample.keep_control=true"], "(sample.keep_control=true): set dropout.semantic above 0"),
        (["dropout.both=.5", "dropout.control=.3", "dropout.semantic=.3"], "is 1.1, above 1: set them lower"),
        (["dropout.both=-.1"], "dropout.both"),
        (["semantic.dropout=0.2"], "semantic.dropout=0.2: no such setting; set dropout.both"),
        (["control.dropout=0"], "control.dropout=0: no such setting; set dropout.both"),
        (["control.variables=[size,colour]"], "control.variables"),
        (['control.variables=[["size"]]'], "control.variables"),
        (["control.variables=size", "control.mlp=joint"], "control.schedule=cosine weighs the low level"),
        (["net.name=edm2-ladder", "control.variables=size"], "takes no control variables"),
        (["net.name=dit", "semantic.kind=text"], "net.name=dit takes no text"),
        (["sample.resolution=9"], "sample.resolution=9 is not a multiple of 2, which net.name=mmdit++ needs"),
        (["sample.resolution=0"], "greater than 0"),
        (["sample.interval=[2,1]"], "does not rise"),
        (["sample.interval=[1,1]"], "does not rise"),
        (["sample.interval=[-1,1]"], "greater than or equal to 0"),
        (["sample.size_range=[9,8]"], "falls"),
        (["sample.sigma_rel=0.2887"], "less than 0.288"),
        (["sample.sigma_rel=0"], "greater than 0"),
        (["sample.guide=self", "sample.guide_sigma_rel=0.3"], "less than 0.288"),
        (["sample.guide_sigma_rel=0.1"], "describe another network"),
        (["sample.guide_sees=all"], "describe another network"),
        (["sample.steps=0"], "greater than 0"),
        (["sample.steps=-3"], "greater than 0"),
        (["semantic.padding=repeat"], "'noisy'"),
        (["semantic.noise=-1"], "greater than or equal to 0"),
        (["semantic.tokens=0"], "greater than 0"),
        (["control.alpha=0"], "greater than 0"),
        (["control.edge=-2"], "greater than 0"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(settings, said):
    text = complaint(*settings)
    assert said in text and len(text.splitlines()) <= 2


def test_sizes_by_network():
    assert "not a multiple of 2, which net.name=edm2" in complaint("sample.resolution=9", recipe="digits-edm2")
    deep = ["net.multipliers=[1,1,1]", "net.transformer_depth=[0,0,1]"]
    assert "multiple of 4, which net.name=unet" in complaint("sample.resolution=6", *deep, recipe="digits-unet")
    table = ["net.max_grid=8"]
    assert "above the 16 that net.max_grid=8 covers" in complaint("sample.resolution=18", *table, recipe="digits-mmdit")
    recipes.resolve("digits-mmdit", ["sample.resolution=16", *table])


def test_shared_pooled_mlp_and_split_control():
    settings = ["net.pooled_mlp=shared", "semantic.kind=text", "control.variables=size"]
    assert "set control.mlp=joint" in complaint(*settings, recipe="digits-unet")
    recipes.resolve("digits-unet", [*settings, "control.mlp=joint", "control.schedule=uniform"])


def test_guidance_that_needs_no_withheld_condition():
    recipes.resolve("digits", ["dropout.both=0", "sample.guidance=1"])
    recipes.resolve("digits", ["dropout.both=0", "sample.guide=runs/other"])
    recipes.resolve("digits", ["dropout.both=0", "dropout.semantic=.1"])  # without control that is no condition at all
    kept = ["control.variables=size", "dropout.both=0", "dropout.control=0", "dropout.semantic=.05"]
    recipes.resolve("digits", [*kept, "sample.keep_control=true"])
    recipes.resolve("digits", ["control.variables=size", "dropout.control=0"])


def test_training_with_levels_that_the_process_lacks_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(dataset, "open_source", None)  # no image is read
    for update, said in (
        ({"sample.grid": "trailing"}, "this process has karras"),
        ({"process.name": "rf", "sample.grid": "leading"}, "this process has linear, sd3, karras"),
        ({"process.name": "vp", "sample.steps": 2000}, "has 1000 levels"),
        ({"sample.last": "first"}, "only process.name=vp"),
        ({"sample.shift": 3}, "above 40"),
    ):
        with pytest.raises(UsageError, match=said):
            opened(small(**update), Console(quiet=True))


@pytest.mark.parametrize("update", [{"semantic.kind": "none"}, {"semantic.kind": "none", "sample.guidance": 3}])
def test_training_without_anything_to_guide_towards_says_so(update, capsys):
    run, _ = opened(small(**update), Console(width=200))
    assert run.sample.guidance == 1 and "sample.guidance=1, as there are" in capsys.readouterr().out


# Refused before any work: on the command line.


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    written(root / "classes")
    written(root / "sized", **{"control.variables": "flip,size"})
    written(root / "words", **{"semantic.kind": "text", "semantic.tokens": 4})
    written(root / "edm2", "digits-edm2")
    return root


@pytest.fixture
def sample(folders, monkeypatch, capsys, tmp_path):
    def type_in(folder: str, *words: str) -> tuple[int, str, str]:
        typed = ["gesso", "sample", folders / folder, *words, "--seeds", "0-1", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in typed])
        monkeypatch.setattr(cli, "console", Console(width=200))
        monkeypatch.setattr(cli, "errors", Console(stderr=True, width=200))
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return type_in


@pytest.mark.parametrize(
    "folder, words, said",
    [
        ("classes", ["--prompt", "a cat"], "was trained with classes: say --label"),
        ("words", ["--label", "3"], "was trained with words: say --prompt"),
        ("classes", ["--label", "11"], "the run has labels 0 to 9 (and 10 for none)"),
        ("classes", ["--size", "8x8"], "this run was not trained with size; its control variables: none"),
        ("sized", ["--crop", "full"], "not trained with crop; its control variables: flip, size"),
        ("sized", ["--control", "sise=8x8"], "did you mean size?"),
        ("sized", ["--control", "size"], "write HEIGHTxWIDTH"),
        ("classes", ["sample.grid=trailing"], "this process has karras"),
        ("sized", ["--size", "8"], "write HEIGHTxWIDTH"),
        ("sized", ["--flip", "maybe"], "write yes or no"),
        ("sized", ["sample.control_guidance=nan"], "finite"),
        ("classes", ["sample.control_guidance=2"], "needs a network that learned with and without control"),
        ("classes", ["sample.resolution=9"], "not a multiple of 2"),
        ("edm2", ["sample.resolution=9"], "not a multiple of 2, which net.name=edm2 needs"),
        ("classes", ["sample.guide=self"], "is the same network"),
        ("classes", ["sample.guide=nowhere"], "holds no snapshots"),
        ("classes", ["dropout.control=0"], "settled by training"),
        ("classes", ["sample.interval=[3,1]"], "does not rise"),
        ("classes", ["sample.sigma_rel=0.2887"], "less than"),
        ("classes", ["sample.steps=0"], "greater than 0"),
    ],
)
def test_refused_on_the_command_line(sample, monkeypatch, folder, words, said, tmp_path):
    monkeypatch.setattr(snapshot, "denoiser", None)  # no network is built
    code, _, err = sample(folder, *words)
    assert code == 2 and said in err and "Traceback" not in err and len(err.strip().splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_options_of_the_command_line_reach_the_network(sample, monkeypatch):
    seen = []
    build = conditions.build
    monkeypatch.setattr(conditions, "build", lambda *a, **k: seen.append(build(*a, **k)) or seen[-1])
    for words in ([], ["--size", "4x8"], ["--control", "size=4x8", "--flip", "yes"]):
        code, out, _ = sample("sized", *words)
        assert code == 0 and "wrote 2 images" in out
    silent, sized, both = (cond for cond, _ in seen)
    assert silent.control_low.tolist() == [[8, 8]] * 2 and not silent.control_high.any()
    assert sized.control_low.tolist() == [[4, 8]] * 2 and not sized.control_high.any()
    assert both.control_low.tolist() == [[4, 8]] * 2 and (both.control_high == 1000).all()


def test_samples_said_otherwise_have_folders_of_their_own(folders):
    """What differs from the run's own settings is in the name, so that nothing is overwritten by something else."""
    run, asked = config.read(folders / "sized" / "run.yaml"), generate.Asked
    sampling = [
        {"guidance": 2}, {"steps": 4}, {"eta": 0.5, "sampler": "euler"}, {"S_churn": 10, "sampler": "heun"}, {"shift": 0.5},
        {"grid": "karras"}, {"interval": "[0.1,2]"}, {"size": "free"}, {"resolution": 12}, {"guide": "runs/a", "guidance": 2},
    ]  # fmt: skip
    told = [
        asked(label="3"), asked(label="3", control={"size": "4x8"}), asked(control={"size": "4x8"}), asked(nimg="100k"),
        asked(prompts=("a/b",)), asked(prompts=("a very " * 30 + "one",)), asked(prompts=("a very " * 30 + "two",)),
    ]  # fmt: skip
    names = [generate._name(folders / "sized", run, one) for one in (asked(), *told)]
    for how in sampling:
        other = changed(run, **{f"sample.{name}": value for name, value in how.items()})
        names += [generate._name(folders / "sized", other, one) for one in (asked(), told[0])]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 80
    assert not any("/" in name or name.startswith((".", "-")) for name in names)
    assert names[:2] == ["own", "label3"] and "guidance-2.0" in names


def test_an_average_that_cannot_be_made_is_said(sample):
    assert "warning" not in sample("sized")[1]
    assert (
        "warning: the stored averages hardly make one of half-life 1,000,000"
        in sample("sized", "sample.halflife=1M")[1]
    )


def test_a_cut_prompt_is_said_on_the_command_line(sample):
    code, out, _ = sample("words", "--prompt", "a very long word for three")
    assert code == 0 and "warning: 'a very long word for three': of 6 words the first 4 are seen, cut from 'for'" in out


# Networks called on what they were not built for.


@pytest.mark.parametrize("recipe", ["digits", "digits-dit", "digits-dit-att", "digits-pixart", "digits-mdt",
                                    "digits-mmdit", "digits-mp-dit", "digits-mp-mmdit++", "digits-unet", "digits-edm2"])  # fmt: skip
@pytest.mark.parametrize("size", [(7, 9), (8, 9), (9, 8)])
def test_networks_name_the_multiple_that_they_need(recipe, size):
    run = small(recipe)
    net = nets.build(run.net, Inputs(1, 8))
    some = torch.full((1,), 0.5)
    with pytest.raises(ValueError, match=f"multiples of 2 was given {size[0]} x {size[1]}"):
        net(torch.zeros(1, 1, *size), some, some, conditions.Cond())


def test_the_ladder_names_it_too():
    for step in "AG":
        net = nets.build(small("digits-edm2", **{"net.name": "edm2-ladder", "net.step": step, "net.channels": 32,
                               "net.channels_per_head": 16}).net, Inputs(1, 8))  # fmt: skip
        with pytest.raises(ValueError, match="multiples of 2 was given 7 x 8"):
            net(torch.zeros(1, 1, 7, 8), torch.zeros(1), torch.zeros(1), conditions.Cond())


@pytest.mark.parametrize(
    "cfg",
    [
        MMDiT(width=32, depth=1, heads=2),
        UNet(channels=16, multipliers=(1, 2), blocks=1, transformer_depth=(0, 1), head_width=8, groups=8),
    ],
)
def test_pooled_text_left_out(cfg):
    net, some = nets.build(cfg, Inputs(1, 8, text_width=6, pooled_width=6)), torch.full((1,), 0.5)
    cond = conditions.Cond(text=torch.zeros(1, 3, 6))
    for withheld in (cond, cond.without(semantic=True)):
        with pytest.raises(ValueError, match=r"built for pooled text needs Cond\.pooled"):
            net(torch.zeros(1, 1, 8, 8), some, some, withheld)
