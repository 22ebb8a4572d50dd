"""On what the tables of Karras et al. 2024 are made at each scale: trainings, lengths, times and scores, each said once here.

Tables share a training where it is the same: CONFIG G is EDM2-S, at each scale.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from gesso import recipes
from gesso.config import RunConfig
from gesso.papers.berrada2024.common_settings import AT_64, DIGITS, SHAPES_SMALL
from gesso.recipes.edm2 import DINO_512, FID_512, LADDER_CONFIGS, TABLE_4
from gesso.reproduce.schema import ColumnGroup, Measurement, Row, Scale, Settings, Training

# Tiny: the digits, a minute or two of one thread each.
DIGITS_LADDER = (
    "net.name=edm2-ladder", "net.channels=32", "net.channel_mult=1,2", "net.num_blocks=1", "net.attention_levels=[1]",
    "net.channels_per_head=32", "net.dropout=.1", "sample.guidance=1", "train.total_images=60k", "train.snapshot_every=3k",
    "train.checkpoint_every=30k", "monitor.magnitude_every=6k", "monitor.magnitude_samples=512",
)  # fmt: skip
# Rates are the best of those tried with seed 0 (docs/log.md): 5e-4 to 2e-3 for A and B, 1e-2 to 8e-2 for D, E and G. F, best at 8e-2
# with that seed, is unstable there with another: its neighbours' rate.
LADDER_STEPS: dict[str, Settings] = {
    "A": ("net.config=A", "loss.weighting=native", "process.P_mean=-1.2", "process.P_std=1.2", "optim.schedule=constant", "optim.lr=2e-3", "optim.betas=[.9,.999]"),
    "B": ("net.config=B", "optim.schedule=constant", "optim.lr=2e-3"),
    "C": ("net.config=C", "optim.schedule=constant", "optim.lr=2e-3"),
    "D": ("net.config=D", "optim.schedule=constant", "optim.lr=4e-2"),
    "E": ("net.config=E", "optim.lr=4e-2"),
    "F": ("net.config=F", "optim.lr=4e-2"),
    "G": ("net.config=G", "optim.lr=4e-2", "net.dropout=0"),
}  # fmt: skip
CHANNELS = {"XS": 16, "S": 32, "M": 48}
OPTIMA = {"B": 0.075, "G": 0.075}  # over three seeds (edm2/fig5a)
TINY_LENGTHS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)

# Small: drawn shapes at 64x64, whose kind is the class; an hour of one GPU each. Where they stand is decided at high noise.
SMALL_LADDER = (
    *AT_64, "net.name=edm2-ladder", "net.channels=64", "net.num_blocks=1",
    "net.channels_per_head=32", "net.dropout=.1", "loss.weighting=uncertainty", "loss.reduction=sum", "sample.guidance=1", "optim.ref_images=500k",
    "optim.warmup_images=50k", "train.total_images=3M", "train.batch_size=256", "train.snapshot_every=150k", "train.checkpoint_every=750k",
    "train.precision=bfloat16", "monitor.magnitude_every=300k",
)  # fmt: skip
SMALL_STEPS = {**LADDER_STEPS, "A": (*LADDER_STEPS["A"], "process.P_mean=0")}
SMALL_CHANNELS = {"XS": 32, "S": 64, "M": 96}


class Setup(NamedTuple):
    """configs: A to G; sizes: EDM2-XS and larger; guides: the same without labels; edm2_s: EDM2-S as net.name=edm2, which has
    settings of its own. score, second: what stands for FID and the distance of DINOv2. lengths: those swept; tuned: of each
    size the best (length, guidance), unguided and guided, for score and second; or all to choose from; optima: of CONFIGS B and G."""

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
    optima: Mapping[str, float]

    @property
    def largest(self) -> str:
        return list(self.sizes)[-1]

    def tuned(self, size: str, guided: bool, second: bool) -> tuple[tuple[float, float], ...]:
        """(length, guidance) to choose the best from: Table 6's own at the paper's scale; guided every second length."""
        if self is PAPER:
            best = (DINO_512 if second else FID_512)[size][guided]
            return ((best.sigma_rel, best.guidance),)
        if guided:
            return tuple((length, w) for w in self.guidances[1:3] for length in self.sigma_rels[::2])
        return tuple((length, 1.0) for length in self.sigma_rels)

    def sigma_rels_of(self, step: str) -> tuple[float, ...]:
        """A's traditional average has one (B.1)."""
        return (LADDER_CONFIGS["A"].sigma_rel,) if self is PAPER and step == "A" else self.sigma_rels

    def at_ema(self, step: str, length: float) -> Measurement:
        """A CONFIG under an average of some length."""
        return Measurement(self.configs[step], () if self is PAPER and step == "A" else at_ema(length))

    def guided(self, training: Training, length: float, guidance: float, by: str = "XS") -> Measurement:
        """Another network that guides has the same length (A.3)."""
        if guidance == 1:
            return Measurement(training, at_ema(length))
        said = (*at_ema(length), f"sample.guidance={guidance:g}", f"sample.guide_sigma_rel={length:g}")
        return Measurement(training, said, guide=self.guides[by])

    def metric_group(
        self, columns: Mapping[str, str], rows: Mapping[str, Measurement], best: bool = False
    ) -> ColumnGroup:
        """A part; `best` where others fill the same cells, of which the best counts."""
        return ColumnGroup(
            columns, rows, settings=self.settings, protocol=self.protocol, best="least" if best else None
        )

    def alternatives(
        self, columns: Mapping[str, str], rows: Mapping[str, Sequence[Measurement]]
    ) -> tuple[ColumnGroup, ...]:
        """Each row in several ways, of which the best counts."""
        most = max(len(ways) for ways in rows.values())
        return tuple(
            self.metric_group(columns, {row: ways[k] for row, ways in rows.items() if k < len(ways)}, best=most > 1)
            for k in range(most)
        )


def at_ema(length: float) -> Settings:
    return (f"sample.sigma_rel={length:g}",)


def at_fraction(training: Training, share: Fraction) -> Settings:
    """The weights at a share of the training, where a snapshot is written: time goes in batches."""
    if share == 1:
        return ()
    train = resolve_training(training).train
    return (f"eval.nimg={-(-train.total_images * share // train.batch_size) * train.batch_size}",)


def resolve_training(training: Training) -> RunConfig:
    return recipes.resolve(training.recipe, list(training.settings))[0]


def with_settings(training: Training, *settings: str) -> Training:
    """With settings laid over it."""
    return training._replace(settings=(*training.settings, *settings))


def ladder_configs(recipe: str, base: Settings, steps: Mapping[str, Settings]) -> dict[str, Training]:
    return {step: Training(recipe, (*base, *said)) for step, said in steps.items()}


def edm2_of_width(g: Training, channels: Mapping[str, int], s: int) -> dict[str, Training]:
    """CONFIG G at other widths than its own, s."""
    return {name: g if c == s else with_settings(g, f"net.channels={c}") for name, c in channels.items()}


def without_labels(sizes: Mapping[str, Training]) -> dict[str, Training]:
    return {name: with_settings(training, "semantic.kind=none") for name, training in sizes.items()}


def as_edm2_net(g: Training) -> Training:
    """CONFIG G of the ladder as the network of its own."""
    kept = (said for said in g.settings if not said.startswith(("net.name", "net.config")))
    return g._replace(settings=(*kept, "net.name=edm2"))


def ladder_setup(
    configs: Mapping[str, Training], channels: Mapping[str, int], score: str, second: str, measure: Settings
) -> Setup:
    """Below the paper's scale: sizes are CONFIG G's at other widths."""
    sizes = edm2_of_width(configs["G"], channels, channels["S"])
    return Setup(
        configs=configs,
        sizes=sizes,
        guides=without_labels(sizes),
        edm2_s=as_edm2_net(configs["G"]),
        metric=score,
        second_metric=second,
        settings=measure,
        protocol=None,
        sigma_rels=TINY_LENGTHS,
        guidances=(1.0, 1.2, 1.4, 1.9),
        optima=OPTIMA,
    )


TINY = ladder_setup(
    ladder_configs("digits-edm2", DIGITS_LADDER, LADDER_STEPS), CHANNELS, "fd_digits", "1-class_accuracy", DIGITS
)
SMALL = ladder_setup(
    ladder_configs("shapes-class", SMALL_LADDER, SMALL_STEPS), SMALL_CHANNELS, "fd_shapes", "1-all", SHAPES_SMALL
)
PAPER = Setup(
    configs={**{step: Training(f"edm2-ladder-{step.lower()}") for step in "ABCDEF"}, "G": Training("edm2-img512-s")},
    sizes={size: Training(f"edm2-img512-{size.lower()}") for size in FID_512},
    guides={size: Training(f"edm2-img512-{size.lower()}-uncond") for size in TABLE_4},
    edm2_s=Training("edm2-img512-s"),
    metric="fid",
    second_metric="fd_dinov2",
    settings=(),
    protocol="edm2",
    # How densely the paper swept it does not say: the tiny scale's, and those for which it has numbers.
    sigma_rels=(0.015, 0.025, 0.05, 0.075, 0.085, 0.09, 0.1, 0.13, 0.15, 0.19, 0.2, 0.25),
    guidances=(1.0, 1.2, 1.4, 1.6, 1.9),
    optima={step: LADDER_CONFIGS[step].sigma_rel for step in "BG"},
)
SETUPS = {"tiny": TINY, "small": SMALL, "paper": PAPER}


def scales(
    parts: Callable[[Setup], tuple[ColumnGroup, ...]], cost: Mapping[str, str], notes: Mapping[str, str] | None = None
) -> dict[str, Scale]:
    """A table at those scales of which the cost of a row is said."""
    said = NOTES | (notes or {})
    return {name: Scale(parts(SETUPS[name]), words, said.get(name, "")) for name, words in cost.items()}


NOTES = {
    "tiny": "The digits, 8x8 pixels; networks of two levels, 60k images. FID is the Frechet distance in digit features.",
    "small": "Drawn shapes at 64x64, 3M images. FID is the Frechet distance in features of shapes.",
}


def percent(x: float | Fraction) -> str:
    return f"{100 * float(x):.3g} %"


def rows_of(
    xs: Sequence[float | Fraction], published: Mapping[tuple[str, float], float] | None = None
) -> tuple[Row, ...]:
    """Rows of a figure over shares; published: by column and x."""
    return tuple(
        Row(percent(x), {column: value for (column, at), value in (published or {}).items() if at == x}, float(x))
        for x in xs
    )


def sweep_ema(g: Setup, columns: Mapping[str, Callable[[float], Measurement]]) -> tuple[ColumnGroup, ...]:
    """Every column of a figure at every length."""
    return tuple(
        g.metric_group({column: g.metric}, {percent(length): how(length) for length in g.sigma_rels})
        for column, how in columns.items()
    )


SIGMA_RELS = tuple(sorted({*TINY.sigma_rels, *PAPER.sigma_rels, *PAPER.sigma_rels_of("A")}))
TRAINING_FRACTIONS = tuple(Fraction(k, 4) for k in (1, 2, 3, 4))
"""of a training"""
LADDER_COST = {"tiny": "2 minutes", "small": "an hour", "paper": "5 days on 32 A100 and more"}
ONE_COST = {"tiny": "a minute, and 2 of training for all", "paper": "hours of 8 A100, after 5 days on 32"}
