"""Trainings of Berrada et al. 2024 at full scale that several tables share: those of Table 1 and their pre-training."""

from gesso import recipes
from gesso.papers.berrada2024.common_settings import LOCAL_CROPS
from gesso.published import read_table
from gesso.recipes.berrada import init_settings_512
from gesso.reproduce.schema import Row, Settings, Training

SNAPSHOTS_EVERY_10K = ("train.snapshot_every=3.84M",)
"""Snapshots every 10k steps at 512, for the times that Figure 8 shows."""


def published_rows(table: str) -> tuple[Row, ...]:
    """Return the rows of a published table with their numbers."""
    return tuple(Row(name, numbers) for name, numbers in read_table("berrada2024", table).items())


def finetune_at_512(recipe: str, init_from: Training, settings: Settings = ()) -> Training:
    """Return a training at 512 that starts from weights at 256, as in the paper of the network."""
    return Training(recipe, (*init_settings_512(recipes.RECIPES[recipe]()), *settings), init_from)


def in1k_training(net: str, resolution: int) -> Training:
    """Return a training of Table 1 on ImageNet-1k.

    At 512, mmDiT starts from 350k steps at 256 (Table 4c), and the paper's network from local crops (Figure 8c).
    """
    if resolution == 256:
        return Training(f"in1k-256-{net}")
    pretraining: dict[str, Settings] = {"mmdit": ("train.total_images=716.8M",), "berrada": LOCAL_CROPS}
    init_from = Training(f"in1k-256-{net}", pretraining.get(net, ()))
    return finetune_at_512(f"in1k-512-{net}", init_from, SNAPSHOTS_EVERY_10K if net == "berrada" else ())


def cc12m_training(net: str, resolution: int, *settings: str) -> Training:
    """Return a training of Tables 1 and A4 on CC12M.

    The paper's network is measured at 256 after crops of .9 to 1 (the recipe of Table 3); at 512 it starts from a
    training with crops of .4 to .6.
    """
    if resolution == 256:
        return Training("table-3" if net == "berrada" else f"cc12m-256-{net}", settings)
    return finetune_at_512(f"cc12m-512-{net}", Training(f"cc12m-256-{net}"))
