"""Trainings, EMA lengths and metrics of the tables of Karras et al. 2024 at each scale.

Tables share equal trainings: CONFIG G is EDM2-S at each scale.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from gesso import recipes
from gesso.config import RunConfig
from gesso.papers.berrada2024.common_settings import AT_64, DIGITS_METRICS, SMALL_SHAPES_METRICS
from gesso.published.edm2 import DINO_512, FID_512, TABLE_4
from gesso.recipes.edm2 import LADDER_CONFIGS
from gesso.reproduce.schema import ColumnGroup, Measurement, Row, Scale, Settings, Training

# Tiny scale: digits, a minute or two of one CPU thread for each training.
DIGITS_LADDER = (
    "net.name=edm2-ladder",
    "net.channels=32",
    "net.channel_mult=1,2",
    "net.num_blocks=1",
    "net.attention_levels=[1]",
    "net.channels_per_head=32",
    "net.dropout=.1",
    "sample.guidance=1",
    "train.batch_size=16",
    "train.total_images=64k",
    "train.snapshot_every=3200",
    "train.checkpoint_every=32k",
    "monitor.magnitude_every=6400",
    "monitor.magnitude_samples=512",
)


def ladder_configs(lr: str, mp_lr: str) -> dict[str, Settings]:
    """Return the settings of CONFIGS A to G, with the learning rates of A to C and of D to G."""
    return {
        "A": (
            "net.config=A", "loss.weighting=native", "process.P_mean=-1.2", "process.P_std=1.2",
            "optim.schedule=constant", f"optim.lr={lr}", "optim.betas=[.9,.999]",
        ),
        "B": ("net.config=B", "optim.schedule=constant", f"optim.lr={lr}"),
        "C": ("net.config=C", "optim.schedule=constant", f"optim.lr={lr}"),
        "D": ("net.config=D", "optim.schedule=constant", f"optim.lr={mp_lr}"),
        "E": ("net.config=E", f"optim.lr={mp_lr}"),
        "F": ("net.config=F", f"optim.lr={mp_lr}"),
        "G": ("net.config=G", f"optim.lr={mp_lr}", "net.dropout=0"),
    }  # fmt: skip


# 2e-3 and 4e-2 are the best of those tried with batch 128 on digits (docs/decisions.md). Here they are multiplied by
# the square root of 16 / 128, and not searched yet (docs/results/plan.md).
TINY_CONFIGS = ladder_configs("7e-4", "1.4e-2")
TINY_CHANNELS = {"XS": 16, "S": 32, "M": 48}
TINY_OPTIMAL_SIGMA_RELS = {"B": 0.075, "G": 0.075}
"""Best EMA lengths over three seeds (edm2/fig5a)."""
TINY_SIGMA_RELS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)

# Small scale: drawn shapes at 64x64 by kind, an hour of one GPU for each training. High noise levels decide positions.
SMALL_LADDER = (
    *AT_64,
    "net.name=edm2-ladder",
    "net.channels=64",
    "net.num_blocks=1",
    "net.channels_per_head=32",
    "net.dropout=.1",
    "loss.weighting=uncertainty",
    "loss.reduction=sum",
    "sample.guidance=1",
    "optim.ref_images=500k",
    "optim.warmup_images=50k",
    "train.total_images=3M",
    "train.batch_size=256",
    "train.snapshot_every=150k",
    "train.checkpoint_every=750k",
    "train.precision=bfloat16",
    "monitor.magnitude_every=300k",
)
SMALL_CONFIGS = ladder_configs("2e-3", "4e-2")
SMALL_CONFIGS["A"] = (*SMALL_CONFIGS["A"], "process.P_mean=0")
SMALL_CHANNELS = {"XS": 32, "S": 64, "M": 96}


class Setup(NamedTuple):
    """Trainings, EMA lengths and metrics at one scale.

    Attributes:
        configs: CONFIGS A to G.
        sizes: EDM2-XS and larger.
        guides: the same networks without labels.
        edm2_s: EDM2-S as net.name=edm2, which has settings that the ladder does not have.
        metric: the value in place of FID.
        second_metric: the value in place of the Frechet distance of DINOv2.
        settings: settings of the measurements.
        protocol: evaluation protocol.
        sigma_rels: EMA lengths of a sweep.
        guidances: guidance scales of a sweep.
        optimal_sigma_rels: best EMA lengths of CONFIGS B and G.
    """

    configs: Mapping[str, Training]
    sizes: Mapping[str, Training]
    guides: Mapping[str, Training]
    edm2_s: Training
    metric: str
    second_metric: str
    settings: Settings
    protocol: str | None
    sigma_rels: tuple[float, ...]
    guidances: tuple[float, ...]
    optimal_sigma_rels: Mapping[str, float]

    @property
    def largest(self) -> str:
        """Name of the largest network."""
        return list(self.sizes)[-1]

    def candidates(self, size: str, guided: bool, use_second_metric: bool = False) -> tuple[tuple[float, float], ...]:
        """Return pairs of EMA length and guidance scale, of which the best counts.

        At paper scale the pair of Table 6; else all lengths, and with guidance every second length.
        """
        if self is PAPER_SETUP:
            best = (DINO_512 if use_second_metric else FID_512)[size][guided]
            return ((best.sigma_rel, best.guidance),)
        if guided:
            return tuple((sigma_rel, w) for w in self.guidances[1:3] for sigma_rel in self.sigma_rels[::2])
        return tuple((sigma_rel, 1.0) for sigma_rel in self.sigma_rels)

    def sigma_rels_of(self, config: str) -> tuple[float, ...]:
        """Return the EMA lengths of a CONFIG; A has only its traditional EMA at paper scale (B.1)."""
        return (LADDER_CONFIGS["A"].sigma_rel,) if self is PAPER_SETUP and config == "A" else self.sigma_rels

    def at_ema(self, config: str, sigma_rel: float) -> Measurement:
        """Return the measurement of a CONFIG at an EMA length."""
        has_one = self is PAPER_SETUP and config == "A"
        return Measurement(self.configs[config], () if has_one else at_ema(sigma_rel))

    def measure_guided(
        self, training: Training, sigma_rel: float, guidance: float, guide_size: str = "XS"
    ) -> Measurement:
        """Return the measurement of guided samples; the guide has the same EMA length (A.3)."""
        if guidance == 1:
            return Measurement(training, at_ema(sigma_rel))
        settings = (*at_ema(sigma_rel), f"sample.guidance={guidance:g}", f"sample.guide_sigma_rel={sigma_rel:g}")
        return Measurement(training, settings, guide=self.guides[guide_size])

    def metric_group(
        self, columns: Mapping[str, str], rows: Mapping[str, Measurement], select_min: bool = False
    ) -> ColumnGroup:
        """Return columns of metrics; with `select_min` the smallest number of several groups counts."""
        return ColumnGroup(
            columns,
            rows,
            settings=self.settings,
            protocol=self.protocol,
            select="min" if select_min else None,
        )

    def best_of_groups(
        self, columns: Mapping[str, str], rows: Mapping[str, Sequence[Measurement]]
    ) -> tuple[ColumnGroup, ...]:
        """Return groups that measure each row in several ways, of which the best counts."""
        most = max(map(len, rows.values()))
        return tuple(
            self.metric_group(columns, {row: options[k] for row, options in rows.items() if k < len(options)}, most > 1)
            for k in range(most)
        )

    def ema_sweep(self, columns: Mapping[str, Callable[[float], Measurement]]) -> tuple[ColumnGroup, ...]:
        """Return the curves of a figure over EMA lengths; each column maps a length to its measurement."""
        return tuple(
            self.metric_group({column: self.metric}, {format_percent(s): measure(s) for s in self.sigma_rels})
            for column, measure in columns.items()
        )


def at_ema(sigma_rel: float) -> Settings:
    """Return the setting of an EMA length."""
    return (f"sample.sigma_rel={sigma_rel:g}",)


def at_fraction(training: Training, fraction: Fraction) -> Settings:
    """Return the setting of the weights at a fraction of the training, rounded up to whole batches."""
    if fraction == 1:
        return ()
    train = resolve_training(training).train
    return (f"eval.nimg={-(-train.total_images * fraction // train.batch_size) * train.batch_size}",)


def resolve_training(training: Training) -> RunConfig:
    """Return the configuration of a training."""
    return recipes.resolve(training.recipe, list(training.settings))[0]


def with_settings(training: Training, *settings: str) -> Training:
    """Return a training with more settings."""
    return training._replace(settings=(*training.settings, *settings))


def ladder_trainings(recipe: str, base: Settings, configs: Mapping[str, Settings]) -> dict[str, Training]:
    """Return the trainings of CONFIGS A to G."""
    return {config: Training(recipe, (*base, *settings)) for config, settings in configs.items()}


def as_edm2_net(config_g: Training) -> Training:
    """Return CONFIG G of the ladder as net.name=edm2."""
    shared = (setting for setting in config_g.settings if not setting.startswith(("net.name", "net.config")))
    return config_g._replace(settings=(*shared, "net.name=edm2"))


def ladder_setup(
    configs: Mapping[str, Training],
    channels: Mapping[str, int],
    metric: str,
    second_metric: str,
    settings: Settings,
) -> Setup:
    """Return the setup of the tiny or small scale, where the sizes are CONFIG G at several widths."""
    config_g = configs["G"]
    sizes = {
        size: config_g if size == "S" else with_settings(config_g, f"net.channels={width}")
        for size, width in channels.items()
    }
    return Setup(
        configs=configs,
        sizes=sizes,
        guides={size: with_settings(training, "semantic.kind=none") for size, training in sizes.items()},
        edm2_s=as_edm2_net(config_g),
        metric=metric,
        second_metric=second_metric,
        settings=settings,
        protocol=None,
        sigma_rels=TINY_SIGMA_RELS,
        guidances=(1.0, 1.2, 1.4, 1.9),
        optimal_sigma_rels=TINY_OPTIMAL_SIGMA_RELS,
    )


TINY_SETUP = ladder_setup(
    ladder_trainings("digits-edm2", DIGITS_LADDER, TINY_CONFIGS),
    TINY_CHANNELS,
    "fd_digits",
    "1-class_accuracy",
    DIGITS_METRICS,
)
SMALL_SETUP = ladder_setup(
    ladder_trainings("shapes-class", SMALL_LADDER, SMALL_CONFIGS),
    SMALL_CHANNELS,
    "fd_shapes",
    "1-all",
    SMALL_SHAPES_METRICS,
)
PAPER_SETUP = Setup(
    configs={
        **{config: Training(f"edm2-ladder-{config.lower()}") for config in "ABCDEF"},
        "G": Training("edm2-img512-s"),
    },
    sizes={size: Training(f"edm2-img512-{size.lower()}") for size in FID_512},
    guides={size: Training(f"edm2-img512-{size.lower()}-uncond") for size in TABLE_4},
    edm2_s=Training("edm2-img512-s"),
    metric="fid",
    second_metric="fd_dinov2",
    settings=(),
    protocol="edm2",
    # The paper does not give its sweep: the lengths of the tiny scale, and those with published numbers.
    sigma_rels=(0.015, 0.025, 0.05, 0.075, 0.085, 0.09, 0.1, 0.13, 0.15, 0.19, 0.2, 0.25),
    guidances=(1.0, 1.2, 1.4, 1.6, 1.9),
    optimal_sigma_rels={config: LADDER_CONFIGS[config].sigma_rel for config in "BG"},
)
SETUPS = {"tiny": TINY_SETUP, "small": SMALL_SETUP, "paper": PAPER_SETUP}
SCALE_NOTES = {
    "tiny": "Digits, 8x8 pixels; networks of two levels, 64k images in batches of 16. FID is the Frechet distance in "
    "digit features.",
    "small": "Drawn shapes at 64x64, 3M images. FID is the Frechet distance in features of shapes.",
}


def make_scales(
    column_groups: Callable[[Setup], tuple[ColumnGroup, ...]],
    costs: Mapping[str, str],
    notes: Mapping[str, str] | None = None,
) -> dict[str, Scale]:
    """Return the scales of a table, by the cost of a row at each scale."""
    notes = SCALE_NOTES | dict(notes or {})
    return {name: Scale(column_groups(SETUPS[name]), cost, notes.get(name, "")) for name, cost in costs.items()}


def format_percent(x: float | Fraction) -> str:
    """Return a fraction as a percentage with three significant digits."""
    return f"{100 * float(x):.3g} %"


def fraction_rows(
    fractions: Sequence[float | Fraction], published: Mapping[tuple[str, float], float] | None = None
) -> tuple[Row, ...]:
    """Return the rows of a figure over fractions; `published` has numbers by column and fraction."""
    return tuple(
        Row(
            format_percent(x), {column: value for (column, at), value in (published or {}).items() if at == x}, float(x)
        )
        for x in fractions
    )


SIGMA_RELS = tuple(sorted({*TINY_SETUP.sigma_rels, *PAPER_SETUP.sigma_rels}))
TRAINING_FRACTIONS = tuple(Fraction(k, 4) for k in (1, 2, 3, 4))
LADDER_COST = {"tiny": "2 minutes", "small": "an hour", "paper": "5 days on 32 A100 and more"}
TRAINING_COST = {"tiny": "2 minutes", "small": "an hour", "paper": "5 days on 32 A100"}
SIZES_COST = {"tiny": "4 minutes", "paper": "3 to 10 days on 32 A100"}
ONE_TRAINING_COST = {"tiny": "a minute, and 2 of training for all", "paper": "hours of 8 A100, after 5 days on 32"}
