"""Tables and figures of Berrada et al. 2024 on control conditioning: Tables 2a, 2b, 2c, A6, Figures 2, 6, 7."""

from collections.abc import Callable, Mapping

from gesso.papers.berrada2024.common_settings import (
    CC12M_VAL,
    COCO,
    DIGITS_DIVERSITY,
    DIGITS_METRICS,
    DIT_S,
    FLIP_CONTROL,
    RANDOM_FLIP,
    SMALL_SCHEDULE,
    SMALL_SHAPES_METRICS,
    SMALL_TRANSFORMER,
    TINY_SHAPES_FD,
    TINY_SHAPES_METRICS,
    column_group,
    mixed_resolution_training,
    sample_group,
    shapes_training,
    shapes_training_small,
)
from gesso.papers.berrada2024.paper_scale import in1k_training, published_rows
from gesso.papers.berrada2024.resolution import KEEP_NOISE_LEVELS, TINY_MMDIT, tiny_transfer
from gesso.recipes.imagenet import TABLE_SETTINGS
from gesso.reproduce.claims import Statement, TableValues, all_of, improvement
from gesso.reproduce.schema import Claim, Column, ColumnGroup, Measurement, Row, Scale, Settings, Table, Training

CONTROL_SCHEDULES = TABLE_SETTINGS["table-2a"]
UNIFORM, COSINE_4, COSINE_8 = "uniform", "cosine, alpha = 4", "cosine, alpha = 8"
NO_SIZE = "no size condition"
NO_CONTROL, FLIPS = "no control", "flips as control"
SIZE_COLUMNS = (Column("FID"), Column("LPIPS"), Column("LPIPS/HR"), Column("detail", lower_is_better=False))
MIXED_RESOLUTION_NOTE = (
    "Digits of which every second was shrunk to 4x4, sampled with the sizes 4x4 and 8x8 as condition. LPIPS: distance "
    "in the features of a digit classifier."
)
DETAIL_NOTE = (
    "Detail: the rms of what halving a sample removes, with the largest size as condition divided by that with the "
    "smallest; 1 if the network ignores the size. The requirement that it is at least half of that of the uniform "
    "schedule is ours; the paper assumes that the size is used."
)


def uses_size(v: TableValues, row: str) -> Statement:
    """State that the size still decides at least half of the fine detail that it decides with the uniform schedule.

    Without this, a schedule that ignores the size would pass every claim that changes of the size change little.
    """
    return v[row, "detail"] > 0.5 * v[UNIFORM, "detail"]


def small_size_training(*settings: str) -> Training:
    """Return the training at the small scale with the size as control."""
    return Training("shapes-class", (*SMALL_TRANSFORMER, "control.variables=size", *settings))


def size_scales(tiny: Mapping[str, Settings], paper: Mapping[str, Settings]) -> dict[str, Scale]:
    """Return the scales of a table that measures quality and what changes with the size, by schedule of the control."""
    digits = {row: mixed_resolution_training(*settings) for row, settings in tiny.items()}
    latents = {row: Training("table-2a", settings) for row, settings in paper.items()}
    small = {row: small_size_training(*settings) for row, settings in tiny.items()}
    with_size = [row for row in tiny if row != NO_SIZE]
    lpips = {"LPIPS": "lpips", "LPIPS/HR": "lpips_hr", "detail": "size_detail"}
    digits_lpips = {"LPIPS": "digits_feature_distance", "detail": "size_detail"}
    return {
        "tiny": Scale(
            (
                column_group({"FID": "fd_digits"}, digits, DIGITS_METRICS),
                column_group(digits_lpips, {row: digits[row] for row in with_size}, DIGITS_DIVERSITY),
            ),
            "2 minutes",
            MIXED_RESOLUTION_NOTE,
        ),
        "small": Scale(
            (column_group({"FID": "fd_shapes"}, small, SMALL_SHAPES_METRICS),),
            "an hour",
            "No LPIPS: its weights are not shipped.",
        ),
        "paper": Scale(
            (
                column_group({"FID": "fid"}, latents, protocol="berrada"),
                column_group(lpips, {row: latents[row] for row in with_size}, protocol="berrada-lpips"),
            ),
            "a day on 16 A100",
        ),
    }


def table_2a() -> Table:
    """Return Table 2a."""
    return Table(
        name="berrada/2a",
        title="Size as control, by its weight over time",
        source="Berrada et al. 2024, Table 2a",
        columns=SIZE_COLUMNS,
        rows=published_rows("table_2a"),
        scales=size_scales(CONTROL_SCHEDULES, CONTROL_SCHEDULES),
        claims=(
            Claim(
                "A cosine weight keeps the image when the size changes, and uses the size",
                lambda v: (v[COSINE_8, "LPIPS"] < v[UNIFORM, "LPIPS"]) & uses_size(v, COSINE_8),
            ),
            Claim(
                "The later the size enters, the more stays, while the size is used",
                lambda v: (v[COSINE_4, "LPIPS"] < v["cosine, alpha = 1", "LPIPS"]) & uses_size(v, COSINE_4),
            ),
            Claim("The size as control helps", lambda v: v[UNIFORM, "FID"] < v[NO_SIZE, "FID"]),
            Claim(
                "The cosine costs no quality: FID at most 2 % higher",
                lambda v: v[COSINE_8, "FID"] < (1 + 0.02) * v[UNIFORM, "FID"],
            ),
        ),
        notes=f"{DETAIL_NOTE} The network, and sampling without control guidance, are our choice. Section 3.1 speaks "
        "of ten generations; the five sizes of the caption make ten pairs.",
    )


# Further rows of Table A6: settings at paper and tiny scale. The standard deviation of the digits is half that of
# latents, and so are the noise levels of the steps.
STEP_SCHEDULE = "control.schedule=step"
OTHER_SCHEDULES: dict[str, tuple[Settings, Settings]] = {
    "linear": (("control.schedule=linear",), ("control.schedule=linear",)),
    "step at sigma = 1": ((STEP_SCHEDULE, "control.step_sigma=1"), (STEP_SCHEDULE, "control.step_sigma=.5")),
    "step at sigma = 2": ((STEP_SCHEDULE, "control.step_sigma=2"), (STEP_SCHEDULE, "control.step_sigma=1")),
    "step at sigma = 6": ((STEP_SCHEDULE, "control.step_sigma=6"), (STEP_SCHEDULE, "control.step_sigma=3")),
}


def table_a6() -> Table:
    """Return Table A6."""
    cosines = [name for name in CONTROL_SCHEDULES if name.startswith("cosine")]
    return Table(
        name="berrada/A6",
        title="The power cosine compared with other weights of the size over time",
        source="Berrada et al. 2024, Table A6",
        columns=SIZE_COLUMNS,
        rows=(*published_rows("table_2a"), *published_rows("table_a6")),
        scales=size_scales(
            CONTROL_SCHEDULES | {row: tiny for row, (_, tiny) in OTHER_SCHEDULES.items()},
            CONTROL_SCHEDULES | {row: paper for row, (paper, _) in OTHER_SCHEDULES.items()},
        ),
        claims=(
            Claim(
                "The power cosine keeps the image better than a line or a step, and uses the size",
                lambda v: (
                    uses_size(v, COSINE_8) & all_of(v[COSINE_8, "LPIPS"] < v[row, "LPIPS"] for row in OTHER_SCHEDULES)
                ),
            ),
            Claim(
                "It has a lower FID than a line or a step",
                lambda v: all_of(v[COSINE_8, "FID"] < v[row, "FID"] for row in OTHER_SCHEDULES),
            ),
            Claim(
                "A line has a higher FID than every cosine",
                lambda v: all_of(v[row, "FID"] < v["linear", "FID"] for row in cosines),
            ),
            Claim(
                "The later a step, the more stays, while the size is used",
                lambda v: (
                    (v["step at sigma = 1", "LPIPS"] < v["step at sigma = 6", "LPIPS"])
                    & uses_size(v, "step at sigma = 1")
                ),
            ),
        ),
        notes=f"The first rows are those of Table 2a. {DETAIL_NOTE}",
    )


SIZE_SAMPLERS = {
    "one size": "fixed",
    "height = width, at random": "square",
    "height and width, at random": "free",
    "as in training": "train",
}
"""sample.size_conditioning by row of Table 2b."""


def size_sampler_groups(
    trainings: Mapping[str, Training], metric: str, settings: Settings, sizes: str, protocol: str | None = None
) -> tuple[ColumnGroup, ...]:
    """Return a column for each training, with a row for each way of sampling sizes."""
    rows: dict[str, Settings] = {
        row: (f"sample.size_conditioning={mode}", f"sample.size_range={sizes}") for row, mode in SIZE_SAMPLERS.items()
    }
    rows["as in training"] = ()  # the measurement of Table 2a
    return tuple(
        ColumnGroup(
            {column: metric},
            {row: Measurement(training, row_settings) for row, row_settings in rows.items()},
            settings=settings,
            protocol=protocol,
        )
        for column, training in trainings.items()
    )


DETAIL_COLUMNS = {UNIFORM: "detail, uniform", COSINE_8: "detail, cosine"}


def detail_groups(
    trainings: Mapping[str, Training], settings: Settings, protocol: str | None = None
) -> tuple[ColumnGroup, ...]:
    """Return the detail of each training of Table 2b, as measured in Table 2a."""
    return tuple(
        column_group({DETAIL_COLUMNS[column]: "size_detail"}, {"as in training": training}, settings, protocol)
        for column, training in trainings.items()
    )


def table_2b() -> Table:
    """Return Table 2b."""
    trained, others = "as in training", [row for row in SIZE_SAMPLERS if row != "as in training"]
    schedules = {column: CONTROL_SCHEDULES[column] for column in DETAIL_COLUMNS}
    tiny = {column: mixed_resolution_training(*settings) for column, settings in schedules.items()}
    small = {column: small_size_training(*settings) for column, settings in schedules.items()}
    paper = {column: Training("table-2a", settings) for column, settings in schedules.items()}
    return Table(
        name="berrada/2b",
        title="Sizes as condition at sampling",
        source="Berrada et al. 2024, Table 2b",
        columns=(
            Column(UNIFORM),
            Column(COSINE_8),
            *(Column(name, lower_is_better=False) for name in DETAIL_COLUMNS.values()),
        ),
        rows=published_rows("table_2b"),
        scales={
            "tiny": Scale(
                (
                    *size_sampler_groups(tiny, "fd_digits", DIGITS_METRICS, "4,8"),
                    *detail_groups(tiny, DIGITS_DIVERSITY),
                ),
                "2 minutes",
                "Digits of which every second was shrunk to 4x4: one size is 4, the range 4 to 8.",
            ),
            "small": Scale(
                size_sampler_groups(small, "fd_shapes", SMALL_SHAPES_METRICS, "64,256"),
                "an hour",
                "One size is 64, the range 64 to 256.",
            ),
            "paper": Scale(
                (
                    *size_sampler_groups(paper, "fid", (), "512,1024", "berrada"),
                    *detail_groups(paper, (), "berrada-lpips"),
                ),
                "a day on 16 A100",
            ),
        },
        claims=(
            Claim(
                "Sizes as in training are best",
                lambda v: all_of(v[trained, column] < v[row, column] for column in DETAIL_COLUMNS for row in others),
            ),
            Claim(
                "The cosine tolerates other sizes better, and uses the size",
                lambda v: (
                    (v[trained, DETAIL_COLUMNS[COSINE_8]] > 0.5 * v[trained, DETAIL_COLUMNS[UNIFORM]])
                    & all_of(v[row, COSINE_8] < v[row, UNIFORM] for row in others)
                ),
            ),
        ),
        notes=f"The trainings are two of Table 2a; all samples have 256x256 pixels. {DETAIL_NOTE}",
    )


def flip_trainings(make_training: Callable[..., Training], rows: tuple[str, str]) -> dict[str, Training]:
    """Return trainings on mirrored images without and with flips as control."""
    return {rows[0]: make_training(*RANDOM_FLIP), rows[1]: make_training(*FLIP_CONTROL)}


def table_2c() -> Table:
    """Return Table 2c."""
    rows = ("crop", "crop, flip")
    paper = {row: Training("table-2c", settings) for row, settings in TABLE_SETTINGS["table-2c"].items()}
    columns = {"FID": "fd_shapes", "CLIP": "side"}
    note = "Flips are the only control: crops hardly vary. CLIP: the share of single shapes on the captioned side."
    return Table(
        name="berrada/2c",
        title="Crops and flips as control",
        source="Berrada et al. 2024, Table 2c",
        columns=(Column("FID"), Column("CLIP", lower_is_better=False)),
        rows=published_rows("table_2c"),
        scales={
            "tiny": Scale(
                (column_group(columns, flip_trainings(shapes_training, rows), TINY_SHAPES_METRICS),), "5 minutes", note
            ),
            "small": Scale(
                (column_group(columns, flip_trainings(shapes_training_small, rows), SMALL_SHAPES_METRICS),),
                "an hour",
                note,
            ),
            "paper": Scale(
                (
                    column_group({"FID": "fid"}, paper, CC12M_VAL, "berrada"),
                    column_group({"CLIP": "clip"}, paper, COCO, "berrada-coco"),
                ),
                "2 days on 16 A100",
            ),
        },
        claims=(
            Claim("Flips as control help by FID", lambda v: v["crop, flip", "FID"] < v["crop", "FID"]),
            Claim("Flips as control help by CLIP", lambda v: v["crop, flip", "CLIP"] > v["crop", "CLIP"]),
        ),
        notes="The paper does not say that images are mirrored in the row without flips as control; Figure 6 implies "
        "it.",
    )


EIGHT_SAMPLES = ("eval.num_samples=8",)


def figure_2() -> Table:
    """Return Figure 2."""
    rows = (UNIFORM, COSINE_8)
    tiny = {row: mixed_resolution_training(*CONTROL_SCHEDULES[row]) for row in rows}
    paper = {row: Training("table-2a", CONTROL_SCHEDULES[row]) for row in rows}
    digits_lpips = {"LPIPS": "digits_feature_distance", "detail": "size_detail"}
    return Table(
        name="berrada/fig2",
        title="Samples when the size changes",
        source="Berrada et al. 2024, Figure 2",
        columns=(Column("LPIPS"), Column("detail", lower_is_better=False), Column("samples", lower_is_better=None)),
        rows=tuple(map(Row, rows)),
        scales={
            "tiny": Scale(
                (
                    column_group(digits_lpips, tiny, DIGITS_DIVERSITY),
                    sample_group(tiny, (*EIGHT_SAMPLES, "sizes=4,8")),
                ),
                "2 minutes",
                MIXED_RESOLUTION_NOTE,
            ),
            "paper": Scale(
                (
                    column_group({"LPIPS": "lpips", "detail": "size_detail"}, paper, protocol="berrada-lpips"),
                    sample_group(paper, (*EIGHT_SAMPLES, "sizes=64,128,256,512,1024"), "berrada-lpips"),
                ),
                "a day on 16 A100",
            ),
        },
        claims=(
            Claim(
                "The weight disentangles size from content, and the size is used",
                lambda v: (v[COSINE_8, "LPIPS"] < v[UNIFORM, "LPIPS"]) & uses_size(v, COSINE_8),
            ),
        ),
        notes=f"{DETAIL_NOTE} The numbers are two rows of Table 2a. The samples of a row have the same seeds and sizes "
        "from small to large as condition.",
    )


def figure_6() -> Table:
    """Return Figure 6."""
    rows, columns = (NO_CONTROL, FLIPS), {"right side": "side", "mirrored": "flipped"}
    return Table(
        name="berrada/fig6",
        title="Left and right, with and without flips as control",
        source="Berrada et al. 2024, Figure 6",
        columns=(Column("right side", lower_is_better=False), Column("mirrored")),
        rows=tuple(map(Row, rows)),
        scales={
            "tiny": Scale(
                (column_group(columns, flip_trainings(shapes_training, rows), TINY_SHAPES_METRICS),), "5 minutes"
            ),
            "small": Scale(
                (column_group(columns, flip_trainings(shapes_training_small, rows), SMALL_SHAPES_METRICS),), "an hour"
            ),
        },
        claims=(
            Claim(
                "With flips as control, a model draws the side that the prompt says",
                lambda v: v[FLIPS, "right side"] > v[NO_CONTROL, "right side"],
            ),
            Claim("With flips as control, it mirrors less", lambda v: v[FLIPS, "mirrored"] < v[NO_CONTROL, "mirrored"]),
        ),
        notes="The paper shows images of models such as those of Table 2c. Half of the training images are mirrored in "
        "both rows. Right side: share of single shapes; mirrored: share of captions with left or right whose sides are "
        "exchanged.",
    )


LAMBDAS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3)
BETAS = (0.5, 0.75, 1, 1.25, 1.375, 1.5, 2, 3)
LAMBDA_256, LAMBDA_512, BETA = "lambda, 256", "lambda, 512", "beta"


def lambda_group(
    column: str, metric: str, training: Training, settings: Settings = (), protocol: str | None = None
) -> ColumnGroup:
    """Return a curve over the guidance scale, without control guidance."""
    rows = {f"{x:g}": Measurement(training, (f"sample.guidance={x:g}",)) for x in LAMBDAS}
    plain = ("sample.control_guidance=1", "sample.guidance_base_resolution=null")
    return ColumnGroup({column: metric}, rows, settings=(*settings, *plain), protocol=protocol)


def beta_group(metric: str, training: Training, settings: Settings = (), protocol: str | None = None) -> ColumnGroup:
    """Return the curve over the control guidance scale."""
    rows = {f"{x:g}": Measurement(training, (f"sample.control_guidance={x:g}",)) for x in BETAS}
    return ColumnGroup({BETA: metric}, rows, settings=settings, protocol=protocol)


def figure_7() -> Table:
    """Return Figure 7."""
    at_32 = tiny_transfer(TINY_MMDIT, "5k", init_settings=KEEP_NOISE_LEVELS)
    assert at_32.parent is not None
    small_at_32 = Training("shapes", (*DIT_S, *SMALL_SCHEDULE))
    small_sized = Training("shapes-class", (*SMALL_TRANSFORMER, "control.variables=size", "control.alpha=1"))
    in1k_256, in1k_512 = (in1k_training("berrada", resolution) for resolution in (256, 512))
    return Table(
        name="berrada/fig7",
        title="Guidance at two resolutions, and control guidance",
        source="Berrada et al. 2024, Figure 7",
        columns=(Column(LAMBDA_256), Column(LAMBDA_512), Column(BETA)),
        rows=tuple(Row(f"{x:g}", x=x) for x in sorted({*LAMBDAS, *BETAS})),
        x_axis="lambda, of the last curve beta",
        scales={
            "tiny": Scale(
                (
                    lambda_group(LAMBDA_256, "fd_shapes", at_32.parent, TINY_SHAPES_FD),
                    lambda_group(LAMBDA_512, "fd_shapes", at_32, TINY_SHAPES_FD),
                    beta_group("fd_digits", mixed_resolution_training("control.alpha=1"), DIGITS_METRICS),
                ),
                "1 minute",
                "Shapes by class at 16x16, continued at 32x32 (Table 4c); beta: digits with their size as control, at "
                "guidance 1.5.",
            ),
            "small": Scale(
                (
                    lambda_group(LAMBDA_256, "fd_shapes", small_at_32, SMALL_SHAPES_METRICS),
                    lambda_group(LAMBDA_512, "fd_shapes", shapes_training_small(), SMALL_SHAPES_METRICS),
                    beta_group("fd_shapes", small_sized, SMALL_SHAPES_METRICS),
                ),
                "10 minutes",
                "Shapes by caption at 32x32 and at 64x64; beta: shapes by class, with the size as control, alpha = 1.",
            ),
            "paper": Scale(
                (
                    lambda_group(LAMBDA_256, "fid", in1k_256, protocol="berrada"),
                    lambda_group(LAMBDA_512, "fid", in1k_512, protocol="berrada"),
                    beta_group("fid", in1k_256, protocol="berrada"),
                ),
                "an hour on 16 A100 for each point, and two weeks for the trainings",
            ),
        },
        claims=(
            Claim(
                "The higher the resolution, the higher the best lambda",
                lambda v: v.optimum(LAMBDA_256) < v.optimum(LAMBDA_512),
            ),
            improvement("More control guidance than in training lowers FID", ("1.375", BETA), ("1", BETA)),
            Claim(
                "The best beta lies between 1, which is no control guidance, and the largest",
                lambda v: v.optimum_inside(BETA, rows=[f"{x:g}" for x in BETAS if x >= 1]),
            ),
        ),
        notes="The paper plots the distances without numbers; its text gives the best lambda, 1.5 at 256 and 2.0 at "
        "512, and the best beta, 1.375. The model is our choice: the last row of Table 1 on ImageNet-1k.",
    )


TABLES = (table_2a, table_2b, table_2c, table_a6, figure_2, figure_6, figure_7)
