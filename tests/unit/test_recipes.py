"""Every recipe resolves, and its settings and published numbers are those of the papers."""

import math
import re

import pytest
import torch

from gesso import models, recipes
from gesso.models.published import TABLE_A1_MODELS
from gesso.published import read_table
from gesso.recipes import imagenet
from gesso.recipes.imagenet import CONTROL, IN1K_ROWS, TABLE_SETTINGS, table_a2_settings

PAPER_SCALE = [name for name in recipes.RECIPES if re.match(r"in1k|cc12m|table", name)]
AT_256 = [name for name in PAPER_SCALE if name.startswith(("cc12m-256", "in1k-256"))]


def network_of(name: str) -> str:
    """Return the part of a recipe's name after the resolution."""
    return name[name.index("256-") + 4 :]


def table_a1_cell(name: str):
    """Return the published cell of Table A1 for a recipe at 256x256."""
    network = network_of(name)
    kind = {"sdxl": "unet", "sd3": "mmdit"}.get(network, network)
    return next(p for p in TABLE_A1_MODELS if p.name == f"a1-{kind}-{'text' if 'cc12m' in name else 'class'}")


def num_parameters(config, inputs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in models.build_network(config, inputs).parameters())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_resolves_and_is_documented(name):
    run, notes = recipes.resolve(name, [])
    assert run.recipe == name and notes == []
    lines = recipes.RECIPES[name].__doc__.strip().splitlines()
    assert len(lines[0]) < 130 and lines[0].endswith(".") and len(lines) > 1
    if name in PAPER_SCALE:
        text = "\n".join(lines)
        assert f"gesso train {name} data.source=caches/" in text and "gesso cache " in text


@pytest.mark.parametrize("name", [name for name in PAPER_SCALE if "512" in name])
def test_documented_command_at_512_starts_from_256(name):
    command = re.search(r" (init=\S+)((?: init\.\S+)*)", recipes.RECIPES[name].__doc__)
    run = recipes.resolve(name, [command[1], *command[2].split()])[0]
    assert run.init.source.split("@")[0].removesuffix("-local") == f"runs/{name.replace('512', '256')}"
    # Only the changes at twice the resolution that the network's own paper makes.
    assert run.init.noise_levels == ("scale" if run.process.resolution_scale == 2 else "keep")
    assert run.init.pos_embed == ("extrapolated" if name.endswith(("dit-att", "-dit")) else "resampled")


@pytest.mark.parametrize("name", PAPER_SCALE)
def test_shared_settings_are_those_of_the_paper(name):
    """Section 3.1 and Appendix C."""
    run, is_512 = recipes.resolve(name, [])[0], "512" in name or name == "table-4c"
    assert run.data.resolution == (512 if is_512 else 256) and run.downsample_factor == 8
    assert run.train.batch_size == run.optim.base_batch_size == (384 if is_512 else 2048)
    assert run.train.precision == "bfloat16"
    assert (run.optim.lr, run.optim.schedule, run.optim.warmup_images) == (1e-4, "constant", 0)
    assert (run.sample.steps, run.sample.sampler) == (250, "euler")
    assert run.sample.guidance == (2.0 if is_512 else 1.5)
    assert run.sample.guidance_base_resolution == run.data.resolution
    berrada = "berrada" in name or name in ("table-2a", "table-2c", "table-3")
    optim = run.optim.name, run.optim.betas, run.optim.weight_decay
    if berrada:
        assert optim == ("adamw", (0.9, 0.95), 0.03)  # Table A4
    elif "sd3" in name:
        assert optim == ("adamw", (0.9, 0.999), 0)
    else:
        assert optim == ("adam", (0.9, 0.999), 0)
    if run.process.name == "vp":
        assert (run.process.beta_start, run.process.beta_end, run.process.prediction) == (0.00085, 0.012, "eps")
    rescaled = is_512 and (berrada or "sd3" in name)
    assert run.process.resolution_scale == (2 if rescaled else 1)
    text = name.startswith("cc12m") or name in ("table-2c", "table-3")
    assert run.semantic.kind == ("text" if text else "label")
    assert run.semantic.max_tokens == (77 if text else 16)


@pytest.mark.parametrize(
    "name, thousands",
    [("in1k-256-unet", 750), ("in1k-512-unet", 250), ("in1k-512-mmdit", 150), ("in1k-256-mmdit", 600),
     ("table-2a", 120),
     ("table-2c", 124), ("table-a2", 70), ("table-4c", 500), ("cc12m-256-sd3", 600), ("cc12m-256-berrada", 400)],
)  # fmt: skip
def test_number_of_steps(name, thousands):
    run = recipes.resolve(name, [])[0]
    assert run.train.total_images == 1000 * thousands * run.train.batch_size


def test_number_of_steps_is_in_the_paper_s_range():
    """500k to 1M on ImageNet-1k over both resolutions; 300k to 500k on CC12M, except 600k of Table 4a's mmDiT."""
    for name, row in IN1K_ROWS.items():
        assert 500 <= sum(row.steps) <= 1000, name
    for net in ("sdxl", "berrada"):
        steps = [recipes.resolve(f"cc12m-{size}-{net}", [])[0].train for size in (256, 512)]
        assert 300_000 <= sum(train.total_images // train.batch_size for train in steps) <= 500_000


@pytest.mark.parametrize("name", AT_256)
def test_networks_have_the_sizes_of_table_a1(name):
    """Table A1 counts one MLP over 6 control variables: the networks are built with those."""
    run = recipes.resolve(name, ["data.num_classes=1000", "semantic.embed_dim=768"])[0]
    if name == "in1k-256-mmdit" or name.endswith("berrada"):
        return  # the paper copied this cell (models/published.py), and has none for mmDiT++
    cell = table_a1_cell(name)
    inputs = cell.inputs._replace(resolution=run.input_spec.resolution)
    actual = num_parameters(run.net, inputs)
    assert actual == num_parameters(cell.net, inputs)
    assert actual + sum(cell.extra_parameters.values()) == pytest.approx(cell.numbers[0].value, rel=0.012)


@pytest.mark.parametrize("name", AT_256)
def test_documented_variants_of_control_and_pooled_text_have_their_sizes(name):
    """The network has Table A1's size with CONTROL, and one more MLP with pooled text."""
    net = network_of(name)
    opened = ["data.num_classes=1000", "semantic.embed_dim=768", "semantic.pooled_dim=768"]
    run = recipes.resolve(name, opened)[0]
    with_control = recipes.resolve(name, [*opened, *(() if net in ("mdt", "berrada") else CONTROL)])[0]
    assert bool(run.control.variables) == (net in ("unet", "sdxl", "berrada")) and run.input_spec.pooled_dim == 0
    text = recipes.RECIPES[name].__doc__
    assert (" ".join(CONTROL) in text) == (net in ("dit", "dit-att", "pixart") or name.endswith("mmdit"))
    if net == "berrada" or name == "in1k-256-mmdit":
        return
    cell = table_a1_cell(name)
    inputs = cell.inputs._replace(resolution=run.input_spec.resolution)
    assert num_parameters(with_control.net, with_control.input_spec) == num_parameters(cell.net, inputs)
    if "cc12m" in name and hasattr(run.net, "pooled_mlp"):
        width = getattr(run.net, "hidden_size", None) or 4 * run.net.channels
        pooled = recipes.resolve(name, [*opened, "net.pooled_mlp=separate"])[0]
        added = num_parameters(pooled.net, pooled.input_spec) - num_parameters(run.net, run.input_spec)
        assert added == (768 * width + width) + (width * width + width)


CELLS = {
    **{(table, row): settings for table, rows in TABLE_SETTINGS.items() for row, settings in rows.items()},
    **{
        ("table-a2", f"{row}, {lr}"): table_a2_settings(row, lr)
        for row, numbers in read_table("berrada2024", "table_a2").items()
        for lr, fid in numbers.items()
        if math.isfinite(fid)
    },
}


@pytest.mark.parametrize("table, row", CELLS)
def test_rows_of_tables_resolve_to_different_runs(table, row):
    run, notes = recipes.resolve(table, list(CELLS[table, row]))
    assert all("dropped" in note or "optim.lr" in note for note in notes)
    others = [recipes.resolve(t, list(settings))[0] for (t, r), settings in CELLS.items() if t == table and r != row]
    assert run not in others
    if table == "table-a2":
        assert run.train.total_images == 70_000 * run.train.batch_size and run.ema.halflives == (1,)


@pytest.mark.parametrize("table", TABLE_SETTINGS)
def test_rows_with_settings_are_the_published_ones(table):
    assert set(TABLE_SETTINGS[table]) == set(read_table("berrada2024", table.replace("-", "_")))


# As printed in the paper. Table 1: ImageNet-1k at 256 and 512; on CC12M FID, CLIP at 256 and FID, FID on COCO, CLIP at
# 512. x: the run diverged.
TABLE_1 = {
    "unet": "2.05 4.81 8.53 25.36 12.56 7.26 24.79",
    "dit": "1.95 2.85",
    "dit-att": "1.71 x x x x x x",
    "mdt": "2.51 3.75",
    "pixart": "2.06 3.05 x x x x x",
    "mmdit": "1.71 3.02 7.54 24.78 11.24 6.78 26.01",
    "berrada": "1.59 2.76 6.79 26.60 6.27 6.69 26.17",
}
TABLE_A2 = """
64 x 126.68 57.56 59.50 104.73
512 x 27.26 19.83 37.98 80.26
1024 x 18.01 19.25 30.00 62.82
2048 x 14.63 14.73 24.24 61.89
4096 x 49.24 9.26 15.71 -
64 x x 59.26 104.55 -
256 x 39.53 37.08 86.51 -
512 x 22.48 23.61 83.6 -
1024 x 12.03 17.13 76.15 -
2048 x 10.19 12.36 82.62 -
"""


def published(name: str) -> str:
    """Return the published numbers in a recipe's docstring, separated by spaces."""
    text = recipes.RECIPES[name].__doc__.split("Published:")[1].splitlines()[0]
    return "x" if "diverged" in text else " ".join(re.findall(r"\d+\.\d\d", text))


@pytest.mark.parametrize("net", TABLE_1)
def test_published_numbers_of_table_1(net):
    numbers = TABLE_1[net].split()
    assert [published(f"in1k-{size}-{net}") for size in (256, 512)] == numbers[:2]
    for text in {"unet": ["sdxl"], "mmdit": ["mmdit", "sd3"]}.get(net, [net]) if numbers[2:] else ():
        both = published(f"cc12m-256-{text}"), published(f"cc12m-512-{text}")
        assert both == (("x", "x") if numbers[2] == "x" else (" ".join(numbers[2:4]), " ".join(numbers[4:])))


def test_table_a2_has_every_cell_that_did_not_diverge():
    expected = {}
    for i, line in enumerate(TABLE_A2.split("\n")[1:-1]):
        batch, *fids = line.split()
        for rate, fid in zip(("1e-3", "5e-4", "1e-4", "1e-5", "1e-6"), fids, strict=True):
            if fid not in "x-":
                net = ("net.name=unet",) if i < 5 else ()
                total = f"train.total_images={70_000 * int(batch)}"
                settings = (f"train.batch_size={batch}", total, f"optim.base_batch_size={batch}", f"optim.lr={rate}")
                expected[(*net, *settings)] = float(fid)
    actual = {
        table_a2_settings(row, lr): fid
        for row, numbers in read_table("berrada2024", "table_a2").items()
        for lr, fid in numbers.items()
        if math.isfinite(fid)
    }
    assert actual == expected and len(expected) == 33
    assert imagenet.table_a2().sample.halflife == 1
