"""Trainings of Berrada et al. 2024 at full scale that several tables share: Table 1's, and what those at 512 start from."""

from collections.abc import Iterable

from gesso import recipes
from gesso.papers.berrada2024.common_settings import LOCAL
from gesso.recipes.berrada import init_settings_512
from gesso.recipes.imagenet import TABLE_CELLS
from gesso.reproduce.schema import Row, Settings, Training

SNAPSHOTS_EVERY_10K = ("train.snapshot_every=3.84M",)
"""steps at 512, so that Figure 8 has averages at the times that it shows"""


def rows_of(recipe: str, names: Iterable[str]) -> tuple[Row, ...]:
    """FID and CLIP score of the cells of a recipe that is a table, in their order."""
    return tuple(
        Row(name, {"FID": cell.published["fid"], "CLIP": cell.published["clip"]})
        for name, cell in zip(names, TABLE_CELLS[recipe], strict=True)
    )


def at_512(recipe: str, before: Training, settings: Settings = ()) -> Training:
    """From weights at 256, as the network's own paper has it."""
    return Training(recipe, (*init_settings_512(recipes.RECIPES[recipe]()), *settings), before)


def in1k(net: str, resolution: int) -> Training:
    """Of Table 1. At 512 mmDiT starts from 350k steps at 256 (Table 4c), ours from local crops (Figure 8c)."""
    if resolution == 256:
        return Training(f"in1k-256-{net}")
    before = {"mmdit": ("train.total_images=716.8M",), "berrada": LOCAL}.get(net, ())
    return at_512(
        f"in1k-512-{net}", Training(f"in1k-256-{net}", before), SNAPSHOTS_EVERY_10K if net == "berrada" else ()
    )


def cc12m(net: str, resolution: int, *said: str) -> Training:
    """Of Tables 1 and A4. Ours is measured at 256 after crops of .9 to 1, as Table 3's recipe has it, and goes on at 512 after
    the recipe's own, .4 to .6."""
    if resolution == 256:
        return Training("table-3" if net == "berrada" else f"cc12m-256-{net}", said)
    return at_512(f"cc12m-512-{net}", Training(f"cc12m-256-{net}"))
