"""Every recipe resolves, and its numbers are the paper's."""

import re

import pytest
import torch

from gesso import nets, recipes
from gesso.nets.published import TABLE_A1
from gesso.recipes import imagenet
from gesso.recipes.imagenet import CONTROL, IN1K, ROWS

AT_SCALE = [name for name in recipes.RECIPES if re.match(r"in1k|cc12m|table", name)]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_resolves_and_says_what_it_is(name):
    run, notes = recipes.resolve(name, [])
    assert run.recipe == name and notes == []
    said = recipes.RECIPES[name].__doc__.strip().splitlines()
    assert len(said[0]) < 130 and said[0].endswith((".", "do.")) and len(said) > 1
    if name in AT_SCALE:
        assert f"gesso train {name} data.source=caches/" in "\n".join(said) and "gesso cache " in "\n".join(said)


@pytest.mark.parametrize("name", [name for name in AT_SCALE if "512" in name])
def test_at_512_the_command_starts_from_256(name):
    said = re.search(r" (init=\S+)((?: init\.\S+)*)", recipes.RECIPES[name].__doc__)
    run = recipes.resolve(name, [said[1], *said[2].split()])[0]
    assert run.init.source.split("@")[0].removesuffix("-local") == f"runs/{name.replace('512', '256')}"
    # Of what transfer would do at twice the resolution only what the network's own paper does.
    assert run.init.noise == ("scaled" if run.process.scale == 2 else "kept")
    assert run.init.positions == ("extrapolated" if name.endswith(("dit-att", "-dit")) else "resampled")


@pytest.mark.parametrize("name", AT_SCALE)
def test_the_setting_of_all(name):
    """Section 3.1, Appendix C."""
    run, large = recipes.resolve(name, [])[0], "512" in name or name == "table-4c"
    assert run.data.resolution == (512 if large else 256) and run.factor == 8
    assert run.train.batch_size == run.optim.tuned_at_batch == (384 if large else 2048)
    assert run.train.precision == "bfloat16"
    assert (run.optim.lr, run.optim.schedule, run.optim.warmup_images) == (1e-4, "constant", 0)
    assert (run.sample.steps, run.sample.sampler) == (250, "euler")
    assert run.sample.guidance == (2.0 if large else 1.5) and run.sample.tuned_at == run.data.resolution
    ours = "ours" in name or name in ("table-2a", "table-2c", "table-3")
    optim = run.optim.name, run.optim.betas, run.optim.weight_decay
    if ours:
        assert optim == ("adamw", (0.9, 0.95), 0.03)  # Table A4
    elif "sd3" in name:
        assert optim == ("adamw", (0.9, 0.999), 0)
    else:
        assert optim == ("adam", (0.9, 0.999), 0)
    if run.process.name == "vp":
        assert (run.process.beta_start, run.process.beta_end, run.process.prediction) == (0.00085, 0.012, "eps")
    rescaled = large and (ours or "sd3" in name)
    assert run.process.scale == (2 if rescaled else 1)
    text = name.startswith("cc12m") or name in ("table-2c", "table-3")
    assert run.semantic.kind == ("text" if text else "label")
    assert run.semantic.tokens == (77 if text else 16)


@pytest.mark.parametrize(
    "name, thousands",
    [("in1k-256-unet", 750), ("in1k-512-unet", 250), ("in1k-512-mmdit", 150), ("in1k-256-mmdit", 600), ("table-2a", 120),
     ("table-2c", 124), ("table-a2", 70), ("table-4c", 500), ("cc12m-256-sd3", 600), ("cc12m-256-ours", 400)],
)  # fmt: skip
def test_steps(name, thousands):
    run = recipes.resolve(name, [])[0]
    assert run.train.total_images == 1000 * thousands * run.train.batch_size


def test_steps_lie_where_the_paper_says():
    """500k to 1M on ImageNet-1k, of both resolutions together where one starts from the other; 300k to 500k on CC12M, and
    600k of Table 4a's mmDiT."""
    for name, row in IN1K.items():
        assert 500 <= sum(row.steps) <= 1000, name
    for net in ("sdxl", "ours"):
        steps = [recipes.resolve(f"cc12m-{size}-{net}", [])[0].train for size in (256, 512)]
        assert 300_000 <= sum(train.total_images // train.batch_size for train in steps) <= 500_000


@pytest.mark.parametrize("name", [n for n in AT_SCALE if n.startswith("cc12m-256") or n.startswith("in1k-256")])
def test_networks_have_the_sizes_of_table_a1(name):
    """Which counts one MLP over 6 control variables: the networks are built with those."""
    run = recipes.resolve(name, ["data.num_classes=1000", "semantic.width=768"])[0]
    kind = {"sdxl": "unet", "sd3": "mmdit", "ours": "mmdit"}.get(
        name[name.index("256-") + 4 :], name[name.index("256-") + 4 :]
    )
    if name == "in1k-256-mmdit" or name.endswith("ours"):
        return  # a copied cell of the paper (nets/published.py); mmDiT++ has none
    cell = next(p for p in TABLE_A1 if p.name == f"a1-{kind}-{'text' if 'cc12m' in name else 'class'}")
    inputs = cell.inputs._replace(resolution=run.inputs.resolution)
    with torch.device("meta"):
        ours = sum(p.numel() for p in nets.build(run.net, inputs).parameters())
        theirs = sum(p.numel() for p in nets.build(cell.net, inputs).parameters())
    assert ours == theirs
    assert ours + sum(cell.elsewhere.values()) == pytest.approx(cell.figures[0].value, rel=0.012)


@pytest.mark.parametrize("name", [n for n in AT_SCALE if n.startswith("cc12m-256") or n.startswith("in1k-256")])
def test_control_and_pooled_text_are_as_the_page_says(name):
    """With control over it the run's own network has Table A1's size; with pooled text it has one MLP more."""
    net = name[name.index("256-") + 4 :]
    opened = ["data.num_classes=1000", "semantic.width=768", "semantic.pooled_width=768"]
    run = recipes.resolve(name, opened)[0]
    sized = recipes.resolve(name, [*opened, *(() if net in ("mdt", "ours") else CONTROL)])[0]

    def parameters(run) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in nets.build(run.net, run.inputs).parameters())

    assert bool(run.control.variables) == (net in ("unet", "sdxl", "ours")) and run.inputs.pooled_width == 0
    says = recipes.RECIPES[name].__doc__
    assert (" ".join(CONTROL) in says) == (net in ("dit", "dit-att", "pixart") or name.endswith("mmdit"))
    if net == "ours" or name == "in1k-256-mmdit":
        return
    kind = {"sdxl": "unet", "sd3": "mmdit"}.get(net, net)
    cell = next(p for p in TABLE_A1 if p.name == f"a1-{kind}-{'text' if 'cc12m' in name else 'class'}")
    inputs = cell.inputs._replace(resolution=run.inputs.resolution)
    with torch.device("meta"):
        assert parameters(sized) == sum(p.numel() for p in nets.build(cell.net, inputs).parameters())
    width = getattr(run.net, "width", None) or 4 * run.net.channels if hasattr(run.net, "pooled_mlp") else 0
    if "cc12m" in name and width:
        own = recipes.resolve(name, [*opened, "net.pooled_mlp=own"])[0]
        due = (768 * width + width) + (width * width + width)
        assert parameters(own) - parameters(run) == due


CELLS = [(table, i) for table, cells in ROWS.items() for i in range(len(cells))]


@pytest.mark.parametrize("table, i", CELLS)
def test_rows_of_tables_resolve_to_different_runs(table, i):
    cell = ROWS[table][i]
    run, notes = recipes.resolve(table, list(cell.settings))
    assert all("left behind" in note for note in notes)
    others = [recipes.resolve(table, list(other.settings))[0] for j, other in enumerate(ROWS[table]) if j != i]
    assert run not in others
    if table == "table-a2":
        assert run.train.total_images == 70_000 * run.train.batch_size and run.ema.halflives == (1,)


# As the paper prints them. Table 1: ImageNet-1k at 256 and 512; on CC12M FID and CLIP at 256, FID, FID on COCO, CLIP at 512.
TABLE_1 = {
    "unet": "2.05 4.81 8.53 25.36 12.56 7.26 24.79",
    "dit": "1.95 2.85",
    "dit-att": "1.71 x x x x x x",
    "mdt": "2.51 3.75",
    "pixart": "2.06 3.05 x x x x x",
    "mmdit": "1.71 3.02 7.54 24.78 11.24 6.78 26.01",
    "ours": "1.59 2.76 6.79 26.60 6.27 6.69 26.17",
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
    """The numbers that a recipe's docstring reports."""
    said = recipes.RECIPES[name].__doc__.split("Published:")[1].splitlines()[0]
    return "x" if "diverged" in said else " ".join(re.findall(r"\d+\.\d\d", said))


@pytest.mark.parametrize("net", TABLE_1)
def test_published_numbers_of_table_1(net):
    numbers = TABLE_1[net].split()
    assert [published(f"in1k-{size}-{net}") for size in (256, 512)] == numbers[:2]
    for text in {"unet": ["sdxl"], "mmdit": ["mmdit", "sd3"]}.get(net, [net]) if numbers[2:] else ():
        at = published(f"cc12m-256-{text}"), published(f"cc12m-512-{text}")
        assert at == (("x", "x") if numbers[2] == "x" else (" ".join(numbers[2:4]), " ".join(numbers[4:])))


def test_table_a2_has_every_cell_that_did_not_diverge():
    wanted = []
    for i, line in enumerate(TABLE_A2.split("\n")[1:-1]):
        batch, *fids = line.split()
        net = ("net.name=unet",) if i < 5 else ()
        for rate, fid in zip(("1e-3", "5e-4", "1e-4", "1e-5", "1e-6"), fids, strict=True):
            if fid not in "x-":
                total = f"train.total_images={70_000 * int(batch)}"
                settings = (f"train.batch_size={batch}", total, f"optim.tuned_at_batch={batch}", f"optim.lr={rate}")
                wanted.append(((*net, *settings), {"fid": float(fid)}))
    assert [tuple(cell) for cell in ROWS["table-a2"]] == wanted and len(wanted) == 33
    assert imagenet.table_a2().sample.halflife == 1
