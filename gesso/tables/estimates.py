"""What trainings and measurements would take: an estimate from multiply-accumulates, counted on the meta device.

Hours are those of an A100 at a share of its peak in the precision of the products: 16 bits, TF32, float32 or float64.
Training an image costs three forward passes (two of them in backward); an evaluation of the sampler as many passes as
guidance has terms; decoding a latent 1260.9 G multiply-accumulates at 512x512 (EDM2, Figure 9).
"""

import functools
from typing import NamedTuple

from gesso import config, generate
from gesso.config import Inputs, Net, Run
from gesso.data import imagined
from gesso.data.sources import NAMED, open_source
from gesso.evaluate import compare, drawer, protocols
from gesso.evaluate.measure import repeats_of
from gesso.nets import count
from gesso.recipes import edm2
from gesso.tables.plan import Job
from gesso.train import estimate
from gesso.train.estimate import Disk

A100 = {"float16": 312e12, "bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12, "float64": 19.5e12}
"""peak FLOPs a second by the precision of products (2 per multiply-accumulate): tensor cores, float32 without them"""
SHARE = 0.4
"""what a training or a sampler reaches of the peak: EDM2-XXL reached .40 in 16 bits, XS .23 (Table 6)"""
PUBLISHED = {
    f"edm2-{name}-{size.lower()}": preset
    for name, sizes in (("img512", edm2.IMG512), ("img64", edm2.IMG64))
    for size, preset in sizes.items()
}
GPUS = 32
"""A100 of EDM2's trainings (Table 6)"""


class Cost(NamedTuple):
    """hours: of an A100; published: those of the paper, where it says them; disk: of the run folder."""

    parameters: int
    hours: float
    published: float | None
    disk: Disk


def of_training(run: Run) -> Cost:
    """Raises UsageError or ValueError where the settings make no network."""
    run = completed(run)
    found = estimate.arithmetic(run)
    passes = forward_passes(run.net, run.inputs, run.semantic.tokens)
    preset = PUBLISHED.get(run.recipe)
    days = preset.days if preset and preset.images == run.train.total_images else None
    return Cost(
        counted(run.net, run.inputs, run.semantic.tokens).parameters,
        hours(3 * passes * run.train.total_images, training_precision(run)),
        days and 24 * GPUS * days,
        estimate.disk(run, found["weights"], sum(found.values()) - found["gradients"]),
    )


def of_measuring(job: Job) -> float:
    """Hours of an A100 for drawing the samples of eval.scores."""
    run = completed(asked(job))
    cfg = run.eval
    networks = {compare.METRICS[score] for score in cfg.scores if score != "loss"}
    pairs = [len(drawer.SIZES[name]) for name in networks if name in drawer.SIZES]
    repeats = [
        repeats_of(score, run) for score in cfg.scores if compare.METRICS[score] not in (*drawer.SIZES, "validation")
    ]
    images = cfg.images * max(repeats, default=0) + cfg.diversity_seeds * sum(pairs)
    return hours(images * of_sample(run, job.guide and completed(job.guide.run)), sampling_precision(run))


def of_sample(run: Run, guide: Run | None) -> float:
    """Multiply-accumulates of drawing one image; decoding one of another size than 512x512 in proportion."""
    ours, theirs = (each and counted(each.net, each.inputs, each.semantic.tokens).macs for each in (run, guide))
    lam, beta = generate.strength(run), run.sample.control_guidance
    a_pass = ours * ((lam * beta != 0) + (lam * (1 - beta) != 0)) + (theirs or ours) * (lam != 1)
    decoding = 1e9 * edm2.DECODER * run.canvas[0] * run.canvas[1] / 512**2 if run.latent.vae else 0
    return evaluations(run) * a_pass + decoding


def evaluations(run: Run) -> int:
    """Of the denoiser for one sample; a guided one counts once (EDM2 D.1)."""
    return 2 * run.sample.steps - 1 if run.sample.sampler == "heun" else run.sample.steps


def asked(job: Job) -> Run:
    """The run of a job as it is to be measured. Raises UsageError for a protocol that lacks something."""
    assert job.trained is not None
    said, run = job.asked, job.trained.run
    if job.part.protocol:
        told = config.resolve(config.as_tree(run), said)[0]
        said = [*protocols.settings_of(job.part.protocol, told), *said]
    run, _ = config.resolve(config.as_tree(run), said)
    generate.check(run)
    return run


def completed(run: Run) -> Run:
    """As opening its images would: with the classes of those that are there, or of ImageNet."""
    name, source = run.data.source.partition(":")[0], run.data.source
    run, _ = imagined.imagined(run)
    if name not in NAMED or run.semantic.kind != "label":
        return run
    classes = len(open_source(source if name.startswith("digits") else f"{name}:1").class_names)
    return run.model_copy(update={"data": run.data.model_copy(update={"num_classes": classes})})


@functools.cache
def counted(net: Net, inputs: Inputs, tokens: int) -> count.Count:
    return count.count(net, inputs, tokens)


@functools.cache
def forward_passes(net: Net, inputs: Inputs, tokens: int) -> int:
    """Multiply-accumulates of the forward passes of an image in training."""
    return count.training_macs(net, inputs, tokens)


def training_precision(run: Run) -> str:
    """Precision of products in training, a key of A100."""
    cfg = run.train
    if cfg.precision != "full":
        return cfg.precision
    return "tf32" if cfg.tf32 and cfg.dtype == "float32" else cfg.dtype


def sampling_precision(run: Run) -> str:
    """Precision of products in sampling, a key of A100."""
    return run.train.dtype if run.sample.precision == "full" else run.sample.precision


def hours(macs: float, precision: str) -> float:
    """Hours of an A100 for so many multiply-accumulates."""
    return 2 * macs / (SHARE * A100[precision]) / 3600
