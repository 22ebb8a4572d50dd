"""Results and costs of EDM2's networks (Karras et al. 2024, Tables 1, 4 and 6), by size."""

from typing import NamedTuple

from gesso.published import read_paper, read_table


class BestResult(NamedTuple):
    """Frechet distance with its EMA length and guidance scale (1: no guidance)."""

    distance: float
    sigma_rel: float
    guidance: float = 1.0


class Cost(NamedTuple):
    """Costs of a network.

    Attributes:
        params: parameters in 10^6.
        gflops: multiply-accumulates of an evaluation, in 10^9.
        training: multiply-accumulates of training with three evaluations per image, in 10^21.
        sampling: multiply-accumulates of a sample, in 10^12: 63 evaluations and the VAE's decoder.
        guided_sampling: the same with guidance.
    """

    params: float
    gflops: float
    training: float | None = None
    sampling: float | None = None
    guided_sampling: float | None = None


class TrainingPreset(NamedTuple):
    """Training settings of a network in Table 6. `sigma_rel` is the EMA length of its FID without guidance."""

    channels: int
    total_images: int
    dropout: float
    lr: float
    t_ref: int
    sigma_rel: float
    days: float | None = None


class GuideResult(NamedTuple):
    """Row of Table 4: the best FID of XXL with a guide, 10^9 parameters and 10^12 multiply-accumulates of both."""

    best: BestResult
    gparams: float
    tflops: float


DECODER_GFLOPS: float = read_paper("edm2")["decoder_gflops"]
"""Multiply-accumulates of decoding a 512x512 image from its latents, in 10^9 (Figure 9)."""
FIGURE_5B_LAYERS: tuple[str, ...] = tuple(read_paper("edm2")["figure_5b_layers"])
MI_IMAGES = 2**20
"""Durations in Table 6 are multiples of 2^20 images: 2147.5M = 2048 * 2^20."""

_IMG512, _IMG64 = read_table("edm2", "table_6_img512"), read_table("edm2", "table_6_img64")


def _presets(table: dict[str, dict[str, float]]) -> dict[str, TrainingPreset]:
    return {
        size: TrainingPreset(
            int(table["channels"][size]),
            int(table["images"][size]) * MI_IMAGES,
            table["dropout"][size],
            table["lr"][size],
            int(table["t_ref"][size]),
            table["fid_sigma_rel"][size],
            table["days"][size],
        )
        for size in table["channels"]
    }


def _results(metric: str) -> dict[str, tuple[BestResult, BestResult]]:
    """Return the best results on ImageNet-512 by size, without and with guidance."""
    return {
        size: (
            BestResult(_IMG512[metric][size], _IMG512[f"{metric}_sigma_rel"][size]),
            BestResult(*(_IMG512[f"guided_{metric}{end}"][size] for end in ("", "_sigma_rel", "_guidance"))),
        )
        for size in _IMG512["channels"]
    }


def _costs(table: dict[str, dict[str, float]]) -> dict[str, Cost]:
    return {
        size: Cost(**{name: table[name][size] for name in Cost._fields if name in table}) for size in table["channels"]
    }


PRESETS_512, PRESETS_64 = _presets(_IMG512), _presets(_IMG64)
FID_512, DINO_512 = _results("fid"), _results("fd_dinov2")
"""Results without and with guidance (Table 6). The unconditional XS guides all sizes at the same EMA length."""
FID_64 = {size: BestResult(_IMG64["fid"][size], _IMG64["fid_sigma_rel"][size]) for size in _IMG64["channels"]}
COST_512, COST_64 = _costs(_IMG512), _costs(_IMG64)
TABLE_4 = {
    size: GuideResult(BestResult(row["FID"], row["sigma_rel"], row["guidance"]), row["Gparams"], row["Tflops"])
    for size, row in read_table("edm2", "table_4").items()
}
"""Results by size of the unconditional network that guides XXL."""
