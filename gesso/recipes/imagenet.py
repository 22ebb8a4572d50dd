"""Recipes of Berrada et al. 2024: Table 1 on ImageNet-1k, the other networks on CC12M, Tables 2, 3, 4 and A2.

All networks have the same settings (Section 3.1, Appendix C): eps-prediction in DDPM's process, Adam(0.9, 0.999),
constant learning rate 1e-4, bfloat16, batch size 2048 at 256x256 and 384 at 512x512. Runs at 512x512 start from one
at 256x256. Only the paper's model rescales noise levels and resamples positions; the others follow their own papers
(Table A4 says so for SDXL and SD3). Values that the paper does not give are marked "our choice". Imported weights of
DiT, MDT and PixArt use their own process with linear betas (init.process). Faces are blurred; image-net.org offers
such a version, for which omit --blur-faces.

The sizes in Table A1 include an MLP of control variables in every network except mDT, and no pooled text. The paper
does not say which variant the numbers of Table 1 belong to, and its statements disagree:
  control      Table A3 starts from DiT at 1.95, the number of Table 1, and adds control later; Table A4 has none in
               SD3 and has it in SD-XL. But with control A3 reaches mmDiT's 1.71 and 7.54 of Table 1. Here UNet (SDXL)
               has control, the others have none; the settings CONTROL give the other variant, with the size of Table
               A1.
  pooled text  The paper does not mention it, and the UNet and mmDiT of Table A1 have none, to 0.01 %. Here: none.
               SDXL and SD3 themselves have it: net.pooled_mlp=separate gives that variant.

A table whose rows are one training with other settings is one recipe; TABLE_SETTINGS has the settings of its rows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from gesso.config import (
    ControlConfig,
    DiTAttConfig,
    DiTConfig,
    EmaConfig,
    LossConfig,
    MDTConfig,
    MMDiTConfig,
    NetConfig,
    OptimConfig,
    PixArtConfig,
    RunConfig,
    SampleConfig,
    SemanticConfig,
    UNetConfig,
    VPConfig,
    mmditpp_config,
)
from gesso.published import read_table
from gesso.recipes.berrada import (
    CLIP_SETTINGS,
    DDIM_SETTINGS,
    XL_SHAPE,
    berrada_best,
    cc12m,
    cc12m_numbers,
    document,
    paper_scale_run,
    published_result,
    sdxl,
)

ADAM = OptimConfig(name="adam", lr=1e-4, betas=(0.9, 0.999))
GLOBAL_CROP = (0.9, 1.0)


class Table1Row(NamedTuple):
    """Row of Table 1: network, title, and thousands of steps at 256x256 and 512x512."""

    net: NetConfig
    title: str
    steps: tuple[int, int] = (600, 150)


# Steps of UNet and mmDiT at 512x512 are those of Table 4c, which has their FIDs of Table 1. At 256x256 the paper gives
# 500k to 1M (Section 3.1), and 600k for the ImageNet model that Table 4a starts from. 600k, and at 512x512 the 150k of
# mmDiT for the other networks, are our choice.
IN1K_ROWS = {
    "unet": Table1Row(UNetConfig(), "UNet (SDXL)", (750, 250)),
    "dit": Table1Row(DiTConfig(**XL_SHAPE, pos_embed="extrapolated"), "DiT-XL/2 w/ LN"),
    "dit-att": Table1Row(DiTAttConfig(**XL_SHAPE, pos_embed="extrapolated"), "DiT-XL/2 w/ Att"),
    "mdt": Table1Row(MDTConfig(**XL_SHAPE), "mDT-v2-XL/2 w/ LN"),
    "pixart": Table1Row(PixArtConfig(**XL_SHAPE, pos_embed="proportional"), "PixArt-alpha-XL/2"),
    "mmdit": Table1Row(MMDiTConfig(**XL_SHAPE, pos_embed="interpolated", pooled_mlp="none"), "mmDiT-XL/2 (SD3)"),
    "berrada": Table1Row(mmditpp_config("XL/2"), "mmDiT-XL/2 (Berrada)"),
}
# Networks without a column of Table A4; UNet (SDXL), SD3 and mmDiT++ on CC12M are in recipes/berrada.py.
CC12M_ROWS = ("dit-att", "pixart", "mmdit")
CONTROL = ("control.variables=[crop,size]", "control.mlp=joint", "control.schedule=uniform")
"""Control settings that give the sizes of Table A1."""
KEEP_CONTROL = ("sample.keep_control=true", "dropout.semantic=.05")
"""Guidance that keeps the control variables, as in SDXL."""


def shared_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings shared by all networks in the second block of Table 1, updated by `changes`."""
    return (
        dict(
            process=VPConfig(),
            optim=ADAM,
            semantic=SemanticConfig(),
            sample=SampleConfig(**DDIM_SETTINGS, guidance=1.5),
        )
        | changes
    )


def in1k(name: str, resolution: int) -> RunConfig:
    """Return a row of Table 1 on ImageNet-1k. Flips, crops of 0.9 to 1 and min-SNR for MDT are our choice."""
    row, k = IN1K_ROWS[name], resolution // 256
    settings = shared_settings(net=row.net)
    if name == "berrada":  # column of Table A4 with classes; Table A3 has no flips as control
        column = berrada_best()
        control = column["control"].model_copy(update={"variables": ("crop", "size")})
        settings |= column | dict(semantic=SemanticConfig(), control=control, process=VPConfig(resolution_scale=k))
    if name == "unet":  # column of Table A4 with classes
        column = sdxl()
        settings |= {block: column[block] for block in ("control", "dropout", "sample")}
    if name == "mdt":
        settings["loss"] = LossConfig(weighting="min-snr")
    steps = 1000 * row.steps[k - 1]
    return paper_scale_run(f"in1k-{resolution}-{name}", resolution, steps, GLOBAL_CROP, flip=True, **settings)


def other_variants(run: RunConfig) -> str:
    """Return lines with the settings of the other variant of control and pooled text, for a recipe's docstring."""
    lines = []
    if not run.control.variables and not isinstance(run.net, MDTConfig):
        lines.append(f"With control, the size of Table A1: {' '.join(CONTROL)}")
    if isinstance(run.net, MMDiTConfig) and run.semantic.kind == "text":
        lines.append("With pooled text, as in SD3: net.pooled_mlp=separate")
    return "".join(f"\n    {line}" for line in lines)


def in1k_recipe(name: str, resolution: int) -> Callable[[], RunConfig]:
    """Return the documented recipe of a row of Table 1 on ImageNet-1k."""
    row, is_512 = IN1K_ROWS[name], resolution == 512
    result = published_result({"FID": read_table("berrada2024", "table_1")[name][f"FID, ImageNet {resolution}"]})
    # mmDiT in Table 4c starts from 350k steps; the paper's model from crops of 0.4 to 0.6 (Table A4, Figure 8c).
    suffix = {"mmdit": "@716.8M", "berrada": "-local"}.get(name, "")
    if name == "berrada" and is_512:
        result += "\n    runs/in1k-256-berrada-local is in1k-256-berrada with data.crop_scale=.4,.6 and such a cache."
    variants = other_variants(in1k(name, resolution))
    return document(
        partial(in1k, name, resolution),
        f"Train {row.title} of Table 1 on ImageNet-1k at {resolution}x{resolution}.{variants}",
        result,
        init_recipe=f"in1k-256-{name}{suffix}" if is_512 else "",
    )


def cc12m_shared(name: str, resolution: int) -> RunConfig:
    """Return another network of Table 1 on CC12M with the shared settings.

    Steps: 600k at 256x256, as Table 4a; 100k at 512x512 (our choice).
    """
    settings = shared_settings(net=IN1K_ROWS[name].net, semantic=SemanticConfig(kind="text", **CLIP_SETTINGS))
    steps = 600_000 if resolution == 256 else 100_000
    return paper_scale_run(f"cc12m-{resolution}-{name}", resolution, steps, GLOBAL_CROP, flip=False, **settings)


def cc12m_recipe(name: str, resolution: int) -> Callable[[], RunConfig]:
    """Return the documented recipe of another network of Table 1 on CC12M."""
    variants = other_variants(cc12m_shared(name, resolution))
    return document(
        partial(cc12m_shared, name, resolution),
        f"Train {IN1K_ROWS[name].title} of Table 1 on CC12M at {resolution}x{resolution}.{variants}",
        published_result(cc12m_numbers(name, resolution)),
        init_recipe=f"cc12m-256-{name}" if resolution == 512 else "",
    )


def with_name_and_steps(run: RunConfig, name: str, steps: int, **blocks: Any) -> RunConfig:
    """Return a run with another recipe name, number of optimizer steps and blocks of settings."""
    train = run.train.model_copy(update={"total_images": steps * run.train.batch_size})
    return run.model_copy(update=dict(recipe=name, train=train) | blocks)


def full_crop(run: RunConfig) -> RunConfig:
    """Return a run with crops of 0.9 to 1; crops of 0.4 to 0.6 prepare for 512x512 (Figure 8c)."""
    return run.model_copy(update={"data": run.data.model_copy(update={"crop_scale": GLOBAL_CROP})})


def table_2a() -> RunConfig:
    """Train with the image size as control: mmDiT++ on ImageNet-1k at 256x256, 120k steps.

    The network is our choice, as is control guidance of 1, as in Table 2c.
    """
    run = in1k("berrada", 256)
    control = ControlConfig(variables=("size",), mlp="split", schedule="cosine", alpha=8.0)
    sample = run.sample.model_copy(update={"control_guidance": 1.0})
    return with_name_and_steps(run, "table-2a", 120_000, control=control, sample=sample)


def table_2c() -> RunConfig:
    """Train with crops, or crops and flips, as control: mmDiT++ on CC12M at 256x256, 124k steps.

    Both rows mirror images, as Figure 6 says of a model without flip control; crops of 0.9 to 1 (our choice).
    """
    run = full_crop(cc12m("berrada", 256))
    control = run.control.model_copy(update={"variables": ("flip", "crop")})
    sample = run.sample.model_copy(update={"control_guidance": 1.0})
    return with_name_and_steps(run, "table-2c", 124_000, control=control, sample=sample)


def table_3() -> RunConfig:
    """Train with padding of text: mmDiT++ on CC12M at 256x256, with crops of 0.9 to 1 (our choice)."""
    return full_crop(cc12m("berrada", 256)).model_copy(update={"recipe": "table-3"})


def in22k(resolution: int) -> RunConfig:
    """Train from random weights on ImageNet-22k: 375k steps at 256x256, 200k at 512x512 (Tables 4a, 4b).

    The network is our choice.
    """
    steps = {256: 375_000, 512: 200_000}[resolution]
    return with_name_and_steps(in1k("mmdit", resolution), f"in22k-{resolution}-mmdit", steps)


def table_4c() -> RunConfig:
    """Train mmDiT on ImageNet-1k at 512x512 from random weights, 500k steps.

    in1k-512-mmdit and in1k-512-unet are the other half of the table.
    """
    return with_name_and_steps(in1k("mmdit", 512), "table-4c", 500_000)


def table_a2() -> RunConfig:
    """Train DiT or UNet on ImageNet-1k at 256x256 with a learning rate and batch size, 70k steps, without EMA.

    A half-life of one image keeps nothing of the past. Every cell trains for 70k steps: train.total_images is 70k
    batches.
    """
    run = in1k("dit", 256)
    sample = run.sample.model_copy(update={"halflife": 1})
    return with_name_and_steps(run, "table-a2", 70_000, ema=EmaConfig(sigma_rels=(), halflives=(1,)), sample=sample)


def table_a2_settings(row: str, lr: str) -> tuple[str, ...]:
    """Return the settings of a cell of Table A2; the row is such as "DiT, batch 512"."""
    net, _, batch = row.partition(", batch ")
    network = () if net == "DiT" else ("net.name=unet",)
    train = (f"train.batch_size={batch}", f"train.total_images={70_000 * int(batch)}", f"optim.base_batch_size={batch}")
    return (*network, *train, f"optim.lr={lr}")


TABLE_SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "table-2a": {
        "no size condition": ("control.variables=[]",),
        "uniform": ("control.schedule=uniform",),
        **{f"cosine, alpha = {alpha}": (f"control.alpha={alpha}",) for alpha in (1, 2, 4, 8)},
    },
    "table-2c": {"crop": ("control.variables=[crop]",), "crop, flip": ()},
    "table-3": {
        "zero": ("semantic.padding=zero",),
        "replicate": ("semantic.padding=replicate",),
        "noisy, 0.02": (),
        **{f"noisy, {noise}": (f"semantic.padding_noise={noise}",) for noise in (0.05, 0.1, 0.2)},
    },
    "table-4c": {
        "mmDiT, 500k": (),
        "UNet, 1000k": ("net.name=unet", *CONTROL, *KEEP_CONTROL, "train.total_images=384M"),
    },
}
"""Settings of the rows of a table, added to its recipe."""


def document_table(name: str, recipe: Callable[[], RunConfig], title: str) -> Callable[[], RunConfig]:
    """Return the recipe of a table with settings and published numbers of its rows in the docstring."""
    published = read_table("berrada2024", name.replace("-", "_"))
    if name == "table-a2":
        rows = [
            (table_a2_settings(row, lr), {"FID": fid})
            for row, numbers in published.items()
            for lr, fid in numbers.items()
            if math.isfinite(fid)
        ]
    else:
        rows = [(settings, published[row]) for row, settings in TABLE_SETTINGS[name].items()]
    text = "\n    ".join(
        " ".join(settings or ("(no change)",)) + "  " + ", ".join(f"{k} {v:g}" for k, v in numbers.items())
        for settings, numbers in rows
    )
    return document(recipe, f"{title}\n\n    {(recipe.__doc__ or '').strip()}", f"Published:\n    {text}")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    **{f"in1k-{size}-{name}": in1k_recipe(name, size) for size in (256, 512) for name in IN1K_ROWS},
    **{f"cc12m-{size}-{name}": cc12m_recipe(name, size) for size in (256, 512) for name in CC12M_ROWS},
    **{
        f"in22k-{size}-mmdit": document(
            partial(in22k, size),
            f"Train mmDiT-XL/2 of Table {table} on ImageNet-22k at {size}x{size}.",
            published_result({"FID": fid}),
        )
        for size, table, fid in (
            (256, "4a", read_table("berrada2024", "table_4a")["IN22k (375k)"]["FID"]),
            (512, "4b", read_table("berrada2024", "table_4b")["200k, then 150k"]["FID, ImageNet-22k"]),
        )
    },
    "table-2a": document_table(
        "table-2a", table_2a, "Train Tables 2a and 2b: image size as control, by its weight over time."
    ),
    "table-2c": document_table("table-2c", table_2c, "Train Table 2c: crops and flips as control."),
    "table-3": document_table("table-3", table_3, "Train Table 3: padding of text."),
    "table-4c": document_table("table-4c", table_4c, "Train Table 4c: 512x512 from random weights."),
    "table-a2": document_table("table-a2", table_a2, "Train Table A2: learning rate and batch size."),
}
