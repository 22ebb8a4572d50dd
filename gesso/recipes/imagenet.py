"""Table 1 of Berrada et al. 2024 on ImageNet-1k, CC12M's other networks, and the trainings behind Tables 2, 3, 4 and A2.

One setting for all networks (Section 3.1, Appendix C): eps-prediction in DDPM's process, Adam(0.9, 0.999), a constant 1e-4,
bfloat16, batches of 2048 at 256x256 and of 384 at 512x512. Runs at 512 start from one at 256; ours alone rescales noise levels
and resamples positions, the others have those of their own papers (Table A4 says it of SDXL and SD3). What the paper is silent
on is marked "our choice". Imported weights of DiT, MDT and PixArt bring their own process, of linear betas (init.process). Faces are blurred in its data; image-net.org offers such a version, for which leave out --blur-faces.

Table A1's sizes hold an MLP of control in every network but mDT's, and no pooled text. Which of the two the numbers of
Table 1 belong to the paper does not say, and what it says does not agree:
  control      Table A3 starts from DiT at 1.95, Table 1's number, and adds control later; Table A4 has none in SD3 and has it
               in SD-XL. But A3 comes to mmDiT's 1.71 and 7.54 of Table 1 with control. Here: UNet (SDXL) with, the others
               without; CONTROL, laid over a recipe, is the other reading, of Table A1's size.
  pooled text  The paper speaks of none, and Table A1's UNet and mmDiT hold none to .01 %. Here: none. SDXL and SD3
               themselves have it: net.pooled_mlp=own is that reading.

A table whose rows are one training with other settings is one recipe; ROWS has the settings and what each gave.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from gesso.config import (
    MDT,
    VP,
    Controls,
    DiT,
    DiTAtt,
    Ema,
    Loss,
    MMDiT,
    Net,
    Optim,
    PixArt,
    Run,
    Sample,
    Semantic,
    UNet,
    mmditpp,
)
from gesso.recipes.berrada import CC12M as TABLE_A4
from gesso.recipes.berrada import CLIP, DDIM, XL, at_scale, cc12m, described, ours, reported, sdxl

ADAM = Optim(name="adam", lr=1e-4, betas=(0.9, 0.999))
GLOBAL = (0.9, 1.0)


class Row(NamedTuple):
    """A row of Table 1. steps: thousands at 256, then at 512; published: FID at 256 and 512, None: the run diverged."""

    net: Net
    what: str
    published: tuple[float | None, float | None]
    steps: tuple[int, int] = (600, 150)


# Steps of UNet and mmDiT at 512 are Table 4c's, which has their distances of Table 1. At 256 the paper says 500k to 1M (Section
# 3.1) and 600k of the ImageNet model that Table 4a starts from; 600k, and at 512 the 150k of mmDiT, elsewhere are our choice.
IN1K = {
    "unet": Row(UNet(), "UNet (SDXL)", (2.05, 4.81), (750, 250)),
    "dit": Row(DiT(**XL, positions="extrapolated"), "DiT-XL/2 w/ LN", (1.95, 2.85)),
    "dit-att": Row(DiTAtt(**XL, positions="extrapolated"), "DiT-XL/2 w/ Att", (1.71, None)),
    "mdt": Row(MDT(**XL), "mDT-v2-XL/2 w/ LN", (2.51, 3.75)),
    "pixart": Row(PixArt(**XL, positions="proportional"), "PixArt-alpha-XL/2", (2.06, 3.05)),
    "mmdit": Row(MMDiT(**XL, positions="interpolated", pooled_mlp="none"), "mmDiT-XL/2 (SD3)", (1.71, 3.02)),
    "ours": Row(mmditpp("XL/2"), "mmDiT-XL/2 (ours)", (1.59, 2.76)),
}
# FID against the validation set and CLIP score on COCO; UNet, mmDiT and ours are Table A4's columns in berrada.py.
CC12M = ("dit-att", "pixart", "mmdit")
CONTROL = ("control.variables=[crop,size]", "control.mlp=joint", "control.schedule=uniform")
"""as Table A1 counts it"""
KEPT_CONTROL = ("sample.keep_control=true", "dropout.semantic=.05")
"""guidance as SDXL has it"""


def one_setting(**changes: Any) -> dict[str, Any]:
    """What all networks of Table 1's second block share."""
    return dict(process=VP(), optim=ADAM, semantic=Semantic(), sample=Sample(**DDIM, guidance=1.5)) | changes


def in1k(name: str, resolution: int) -> Run:
    """A row of Table 1 on ImageNet-1k. Mirrored images and crops of .9 to 1 are our choice, as is MDT's loss, its own."""
    row, k = IN1K[name], resolution // 256
    settings = one_setting(net=row.net)
    if name == "ours":  # Table A4's column with classes. Of flips as a control variable Table A3 has no row here.
        column = ours()
        control = column["control"].model_copy(update={"variables": ("crop", "size")})
        settings |= column | dict(semantic=Semantic(), control=control, process=VP(scale=k))
    if name == "unet":  # Table A4's column with classes, which has control
        column = sdxl()
        settings |= {block: column[block] for block in ("control", "dropout", "sample")}
    if name == "mdt":
        settings["loss"] = Loss(weighting="min-snr")
    steps = 1000 * row.steps[k - 1]
    return at_scale(f"in1k-{resolution}-{name}", resolution, steps, GLOBAL, flip=True, **settings)


def readings(run: Run) -> str:
    """Return the settings of the other reading of control and pooled text, for a recipe's docstring."""
    other = () if run.control.variables or isinstance(run.net, MDT) else CONTROL
    pooled = isinstance(run.net, MMDiT) and run.semantic.kind == "text"
    lines = [f"With control, as Table A1's size has it: {' '.join(other)}"] * bool(other)
    lines += ["With pooled text, as SD3 itself has it: net.pooled_mlp=own"] * pooled
    return "".join(f"\n    {line}" for line in lines)


def in1k_described(name: str, resolution: int) -> Callable[[], Run]:
    row, large = IN1K[name], resolution == 512
    published = row.published[large]
    result = f"Published: FID {published:.2f}." if published else "Published: the run diverged."
    # What Table 4c's mmDiT starts from had seen 350k steps; ours, crops of .4 to .6 (Table A4, Figure 8c).
    told = {"mmdit": "@716.8M", "ours": "-local"}.get(name, "") if large else ""
    if name == "ours" and large:
        result += "\n    runs/in1k-256-ours-local is in1k-256-ours with data.crop_scale=.4,.6 and such a cache."
    return described(
        partial(in1k, name, resolution),
        f"Table 1's {row.what} on ImageNet-1k at {resolution}x{resolution}.{readings(in1k(name, resolution))}",
        result,
        before=f"in1k-256-{name}{told}" if large else "",
    )


def text(name: str, resolution: int) -> Run:
    """Another network of Table 1 on CC12M under the setting of all. Steps: as Table 4a's 600k; at 512 100k (our choice)."""
    settings = one_setting(net=IN1K[name].net, semantic=Semantic(kind="text", **CLIP))
    steps = 600_000 if resolution == 256 else 100_000
    return at_scale(f"cc12m-{resolution}-{name}", resolution, steps, GLOBAL, flip=False, **settings)


def text_described(name: str, resolution: int) -> Callable[[], Run]:
    return described(
        partial(text, name, resolution),
        f"Table 1's {IN1K[name].what} on CC12M at {resolution}x{resolution}.{readings(text(name, resolution))}",
        reported(TABLE_A4["sd3", resolution]) if name == "mmdit" else "Published: the run diverged.",
        before=f"cc12m-256-{name}" if resolution == 512 else "",
    )


def renamed(run: Run, name: str, steps: int, **blocks: Any) -> Run:
    train = run.train.model_copy(update={"total_images": steps * run.train.batch_size})
    return run.model_copy(update=dict(recipe=name, train=train) | blocks)


def whole(run: Run) -> Run:
    """On nearly whole images: crops of .4 to .6 are for what is trained on at 512 (Figure 8c)."""
    return run.model_copy(update={"data": run.data.model_copy(update={"crop_scale": GLOBAL})})


def table_2a() -> Run:
    """The size of the image as control of mmDiT++ on ImageNet-1k at 256, 120k steps. Which network is our choice, and that
    control is not guided by, as in Table 2c."""
    run = in1k("ours", 256)
    control = Controls(variables=("size",), mlp="split", schedule="cosine", alpha=8.0)
    sample = run.sample.model_copy(update={"control_guidance": 1.0})
    return renamed(run, "table-2a", 120_000, control=control, sample=sample)


def table_2c() -> Run:
    """Crops, and crops and flips, as control of mmDiT++ on CC12M at 256, 124k steps. Images are mirrored in both rows, as
    Figure 6 says of a model that is not told; crops of .9 to 1 (our choice)."""
    run = whole(cc12m("ours", 256))
    control = run.control.model_copy(update={"variables": ("flip", "crop")})
    sample = run.sample.model_copy(update={"control_guidance": 1.0})
    return renamed(run, "table-2c", 124_000, control=control, sample=sample)


def table_3() -> Run:
    """Padding of text: mmDiT++ on CC12M at 256, crops of .9 to 1 (our choice)."""
    return whole(cc12m("ours", 256)).model_copy(update={"recipe": "table-3"})


def in22k(resolution: int) -> Run:
    """What Tables 4a and 4b train on ImageNet-22k from nothing: 375k steps at 256, 200k at 512. Which network is our choice."""
    steps = {256: 375_000, 512: 200_000}[resolution]
    return renamed(in1k("mmdit", resolution), f"in22k-{resolution}-mmdit", steps)


def table_4c() -> Run:
    """mmDiT on ImageNet-1k at 512 from scratch, 500k steps; in1k-512-mmdit and in1k-512-unet are its other half."""
    return renamed(in1k("mmdit", 512), "table-4c", 500_000)


def table_a2() -> Run:
    """Rate and batch of DiT and UNet on ImageNet-1k at 256: 70k steps, the weights themselves, no EMA.

    A half-life of one image keeps nothing of the past. Every cell has as many steps: train.total_images is 70k batches.
    """
    run = in1k("dit", 256)
    sample = run.sample.model_copy(update={"halflife": 1})
    return renamed(run, "table-a2", 70_000, ema=Ema(sigma_rels=(), halflives=(1,)), sample=sample)


class Cell(NamedTuple):
    """Settings laid over the recipe, and what the paper reports of them."""

    settings: tuple[str, ...]
    published: dict[str, float]


def row_2a(how: str, *values: float) -> Cell:
    return Cell(tuple(how.split()), dict(zip(("fid", "lpips", "lpips_hr"), values, strict=False)))


RATES_A2 = ("1e-3", "5e-4", "1e-4", "1e-5", "1e-6")
TABLE_A2 = {  # FID by rate; x: diverged, -: no number
    ("unet", 64): "x 126.68 57.56 59.50 104.73",
    ("unet", 512): "x 27.26 19.83 37.98 80.26",
    ("unet", 1024): "x 18.01 19.25 30.00 62.82",
    ("unet", 2048): "x 14.63 14.73 24.24 61.89",
    ("unet", 4096): "x 49.24 9.26 15.71 -",
    ("dit", 64): "x x 59.26 104.55 -",
    ("dit", 256): "x 39.53 37.08 86.51 -",
    ("dit", 512): "x 22.48 23.61 83.6 -",
    ("dit", 1024): "x 12.03 17.13 76.15 -",
    ("dit", 2048): "x 10.19 12.36 82.62 -",
}


def settings_a2(net: str, batch: int, rate: str) -> tuple[str, ...]:
    train = (f"train.batch_size={batch}", f"train.total_images={70_000 * batch}", f"optim.tuned_at_batch={batch}")
    return (*(() if net == "dit" else ("net.name=unet",)), *train, f"optim.lr={rate}")


ROWS: dict[str, list[Cell]] = {
    "table-2a": [
        row_2a("control.variables=[]", 3.29),
        row_2a("control.schedule=uniform", 3.08, 0.33, 0.210),
        row_2a("control.alpha=1", 3.08, 0.23, 0.076),
        row_2a("control.alpha=2", 3.09, 0.18, 0.045),
        row_2a("control.alpha=4", 3.05, 0.13, 0.025),
        row_2a("control.alpha=8", 3.04, 0.04, 0.009),
    ],
    "table-2c": [
        Cell(("control.variables=[crop]",), {"fid": 8.43, "clip": 23.59}),
        Cell((), {"fid": 8.40, "clip": 23.68}),
    ],
    "table-3": [
        Cell(("semantic.padding=zero",), {"fid": 7.19, "clip": 26.25}),
        Cell(("semantic.padding=replicate",), {"fid": 6.93, "clip": 26.47}),
        Cell((), {"fid": 6.79, "clip": 26.60}),
        Cell(("semantic.noise=0.05",), {"fid": 6.82, "clip": 26.58}),
        Cell(("semantic.noise=0.1",), {"fid": 7.01, "clip": 26.47}),
        Cell(("semantic.noise=0.2",), {"fid": 7.02, "clip": 26.41}),
    ],
    "table-4c": [
        Cell((), {"fid": 3.98}),
        Cell(("net.name=unet", *CONTROL, *KEPT_CONTROL, "train.total_images=384M"), {"fid": 6.80}),
    ],
    "table-a2": [
        Cell(settings_a2(net, batch, rate), {"fid": float(fid)})
        for (net, batch), fids in TABLE_A2.items()
        for rate, fid in zip(RATES_A2, fids.split(), strict=True)
        if fid not in "x-"
    ],
}  # fmt: skip


def tabled(name: str, make: Callable[[], Run], title: str) -> Callable[[], Run]:
    """The recipe of a table, whose docstring has its rows."""
    lines = [
        " ".join(cell.settings or ("(as it is)",)) + "  " + ", ".join(f"{k} {v:g}" for k, v in cell.published.items())
        for cell in ROWS[name]
    ]
    rows = "\n    ".join(lines)
    return described(make, f"{title}\n\n    {(make.__doc__ or '').strip()}", f"Published:\n    {rows}")


RECIPES: dict[str, Callable[[], Run]] = {
    **{f"in1k-{size}-{name}": in1k_described(name, size) for size in (256, 512) for name in IN1K},
    **{f"cc12m-{size}-{name}": text_described(name, size) for size in (256, 512) for name in CC12M},
    **{
        f"in22k-{size}-mmdit": described(
            partial(in22k, size),
            f"Table {table}'s mmDiT-XL/2 on ImageNet-22k at {size}x{size}.",
            "Published: FID 5.80.",
        )
        for size, table in ((256, "4a"), (512, "4b"))
    },
    "table-2a": tabled("table-2a", table_2a, "Tables 2a and 2b: size as control, by its weight over time."),
    "table-2c": tabled("table-2c", table_2c, "Table 2c: crops and flips as control."),
    "table-3": tabled("table-3", table_3, "Table 3: padding of text."),
    "table-4c": tabled("table-4c", table_4c, "Table 4c: 512x512 from scratch."),
    "table-a2": tabled("table-a2", table_a2, "Table A2: learning rate and batch size."),
}
