"""`gesso table NAME --dry-run`: what making a table takes, every training checked. Nothing is run, nothing fetched."""

from collections.abc import Iterator, Sequence

from gesso.errors import UsageError
from gesso.files import in_bytes
from gesso.tables import estimates, make, needs, plan, slurm
from gesso.tables.command import Asked, many
from gesso.tables.estimates import Cost
from gesso.tables.needs import Need
from gesso.tables.plan import Job, Trained
from gesso.tables.table import Table

HOW = (
    f"an estimate: 3 forward passes an image, an A100 at {100 * estimates.SHARE:g} % of its peak in the precision of the run, "
    + ", ".join(f"{estimates.A100[name] / 1e12:g} TFLOP/s in {name}" for name in ("float16", "tf32", "float32"))
)


def lines(table: Table, asked: Asked, todo: Sequence[Job]) -> list[str]:
    """Commands, needs, hours and disk; with --slurm also the scripts, written. Raises UsageError for a recipe that makes no
    network."""
    trainings = plan.trainings(todo)
    needed: dict[str, Need] = {}
    all_costs: list[Cost] = []
    shown = [head(table, asked, todo, trainings), ""]
    for i, one in enumerate(trainings, 1):
        needed |= {need.what: need for need in needs.of_training(one.run)}
        cost = estimates.of_training(one.run)
        all_costs.append(cost)
        shown += trained(one, cost, f"{i} of {len(trainings)}", asked.scale)
    drawing, measurements = 0.0, []
    for job in todo:
        try:
            if job.part.by in ("scores", "tensors"):
                needed |= {need.what: need for need in needs.of_measuring(estimates.asked(job))}
                drawing += estimates.of_measuring(job)
        except UsageError as error:
            lacking = f"{job.row}, {', '.join(job.part.columns)}"
            needed[lacking] = Need(lacking, False, str(error))
        there = "  (there)" if job.path.is_file() else ""
        said = job.evaluation or f"{job.part.by} of {job.row}, {', '.join(job.part.columns)}"
        measurements.append(f"  {said}{there}")
    shown += ["measurements, made by gesso table itself:", *dict.fromkeys(measurements), ""]
    shown += [*missing(list(needed.values())), *total(asked, all_costs, drawing, table)]
    return [*shown, *(slurm.write(table, asked, todo) if asked.slurm else ["nothing was run"])]


def head(table: Table, asked: Asked, todo: Sequence[Job], trainings: Sequence[Trained]) -> str:
    done, measured = sum(map(make.finished, trainings)), sum(job.path.is_file() for job in todo)
    return (
        f"{table.name} at --scale {asked.scale}: {many(len(todo), 'measurement')} ({measured} there) of "
        f"{many(len(trainings), 'training')} ({done} there), {many(asked.seeds, 'seed')}"
    )


def trained(one: Trained, cost: Cost, place: str, scale: str) -> Iterator[str]:
    """What it is, its command, what it takes."""
    run = one.run
    there = ", trained already" if make.finished(one) else ""
    yield f"{place}: {run.net.name}, {cost.parameters / 1e6:,.3g} M parameters, {run.train.total_images:,} images{there}"
    yield f"  {launched(one, scale)}"
    paper = f" (the paper: {cost.published:,.0f})" if cost.published else ""
    hours = (
        ""
        if scale == "tiny"
        else f"about {in_hours(cost.hours)} GPU-hours in {estimates.training_precision(run)}{paper}, "
    )
    yield f"  {hours}{in_bytes(cost.disk.total)}: {cost.disk.snapshots:,} snapshots of {in_bytes(cost.disk.weights)}, {cost.disk.states} states of {in_bytes(cost.disk.state)}"
    yield ""


def in_hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def launched(one: Trained, scale: str) -> str:
    return f"torchrun --nproc-per-node 8 -m {one.command}" if scale == "paper" else one.command


def missing(found: Sequence[Need]) -> Iterator[str]:
    """What is not there and how to get it, then what is."""
    if lacking := [need for need in found if not need.there]:
        yield "needed, and not here:"
        yield from (f"  {need.what}\n      {need.how}" for need in lacking)
    if has := [need.what for need in found if need.there]:
        yield f"needed, and here: {', '.join(has)}"
    yield ""


def total(asked: Asked, found: Sequence[Cost], drawing: float, table: Table) -> Iterator[str]:
    disk = in_bytes(sum(cost.disk.total for cost in found))
    yield f"in all: {many(len(found), 'training')}, {disk}; a row and seed: {table.scales[asked.scale].cost}"
    if asked.scale != "tiny" and found:
        hours = sum(cost.hours for cost in found)
        yield f"  about {in_hours(hours)} GPU-hours of training and {in_hours(drawing)} of drawing samples ({HOW})"
    if any(cost.published for cost in found):
        yield f"  the paper says {sum(cost.published or 0 for cost in found):,.0f} of those that it says it of"
