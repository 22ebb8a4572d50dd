"""Option --dry-run of `gesso reproduce`: check every training and print requirements and costs without running it."""

from collections.abc import Iterator, Sequence

from gesso.atomic_io import format_bytes
from gesso.errors import UsageError
from gesso.reproduce import estimates, plan, requirements, runner, slurm
from gesso.reproduce.cli import ReproduceArgs, pluralize
from gesso.reproduce.estimates import CostEstimate
from gesso.reproduce.plan import MeasurementJob, TrainingJob
from gesso.reproduce.requirements import Requirement
from gesso.reproduce.schema import Table

ESTIMATE_NOTE = (
    f"an estimate: 3 forward passes per image, an A100 at {100 * estimates.FLOPS_UTILIZATION:g} % of its peak in the "
    "precision of the run, "
    + ", ".join(
        f"{estimates.A100_PEAK_FLOPS[name] / 1e12:g} TFLOP/s in {name}" for name in ("float16", "tf32", "float32")
    )
)


def dry_run_lines(table: Table, args: ReproduceArgs, jobs: Sequence[MeasurementJob]) -> list[str]:
    """Return commands, requirements, hours and disk space; with --slurm also write the scripts.

    Raises:
        UsageError: if a recipe defines no network.
    """
    trainings = plan.unique_trainings(jobs)
    needed: dict[str, Requirement] = {}
    all_costs: list[CostEstimate] = []
    lines = [header_lines(table, args, jobs, trainings), ""]
    for i, training in enumerate(trainings, 1):
        needed |= {item.label: item for item in requirements.training_requirements(training.run)}
        cost = estimates.training_cost(training.run)
        all_costs.append(cost)
        lines += training_lines(training, cost, f"{i} of {len(trainings)}", args.scale)
    sampling_hours, measurements = 0.0, []
    for job in jobs:
        try:
            if job.group.method in ("metrics", "tensors"):
                run = estimates.evaluation_config(job)
                needed |= {item.label: item for item in requirements.measurement_requirements(run)}
                sampling_hours += estimates.measurement_hours(job)
        except UsageError as error:
            label = f"{job.row}, {', '.join(job.group.columns)}"
            needed[label] = Requirement(label, False, str(error))
        done = "  (done)" if job.path.is_file() else ""
        command = job.evaluate_command or f"{job.group.method} of {job.row}, {', '.join(job.group.columns)}"
        measurements.append(f"  {command}{done}")
    lines += ["measurements, run by gesso reproduce:", *dict.fromkeys(measurements), ""]
    lines += [*missing_lines(list(needed.values())), *total_lines(args, all_costs, sampling_hours, table)]
    return [*lines, *(slurm.write_scripts(table, args, jobs) if args.slurm else ["nothing was run"])]


def header_lines(
    table: Table, args: ReproduceArgs, jobs: Sequence[MeasurementJob], trainings: Sequence[TrainingJob]
) -> str:
    """Return the first line: the numbers of trainings and measurements, and how many are done."""
    done, measured = sum(map(runner.is_finished, trainings)), sum(job.path.is_file() for job in jobs)
    return (
        f"{table.name} at --scale {args.scale}: {pluralize(len(jobs), 'measurement')} ({measured} done) of "
        f"{pluralize(len(trainings), 'training')} ({done} done), {pluralize(args.num_seeds, 'seed')}"
    )


def training_lines(job: TrainingJob, cost: CostEstimate, number: str, scale: str) -> Iterator[str]:
    """Yield the network, command and cost of a training."""
    run = job.run
    finished = ", already trained" if runner.is_finished(job) else ""
    size = f"{cost.parameters / 1e6:,.3g} M parameters"
    yield f"{number}: {run.net.name}, {size}, {run.train.total_images:,} images{finished}"
    yield f"  {launch_command(job, scale)}"
    paper = f" (the paper: {cost.published_gpu_hours:,.0f})" if cost.published_gpu_hours else ""
    hours = (
        ""
        if scale == "tiny"
        else f"about {format_hours(cost.gpu_hours)} GPU-hours in {estimates.training_precision(run)}{paper}, "
    )
    disk = cost.disk_bytes
    yield (
        f"  {hours}{format_bytes(disk.total_bytes)}: {disk.num_snapshots:,} snapshots of "
        f"{format_bytes(disk.snapshot_bytes)}, {disk.num_checkpoints} checkpoints of "
        f"{format_bytes(disk.checkpoint_bytes)}"
    )
    yield ""


def format_hours(hours: float) -> str:
    """Return hours with two significant digits, or whole hours from 10 on."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def launch_command(job: TrainingJob, scale: str) -> str:
    """Return the command of a training; on 8 GPUs at paper scale."""
    return f"torchrun --nproc-per-node 8 -m {job.command}" if scale == "paper" else job.command


def missing_lines(requirements: Sequence[Requirement]) -> Iterator[str]:
    """Yield the missing requirements with their fixes, then the available ones."""
    if missing := [requirement for requirement in requirements if not requirement.available]:
        yield "needed, missing:"
        yield from (f"  {requirement.label}\n      {requirement.fix}" for requirement in missing)
    if available := [requirement.label for requirement in requirements if requirement.available]:
        yield f"needed, available: {', '.join(available)}"
    yield ""


def total_lines(
    args: ReproduceArgs, costs: Sequence[CostEstimate], sampling_hours: float, table: Table
) -> Iterator[str]:
    """Yield the sums over all trainings."""
    disk = format_bytes(sum(cost.disk_bytes.total_bytes for cost in costs))
    yield f"total: {pluralize(len(costs), 'training')}, {disk}; a row and seed: {table.scales[args.scale].cost}"
    if args.scale != "tiny" and costs:
        hours = f"{format_hours(sum(cost.gpu_hours for cost in costs))} GPU-hours of training"
        yield f"  about {hours} and {format_hours(sampling_hours)} of sampling ({ESTIMATE_NOTE})"
    if any(cost.published_gpu_hours for cost in costs):
        published = sum(cost.published_gpu_hours or 0 for cost in costs)
        yield f"  the paper: {published:,.0f} GPU-hours, for the trainings whose hours it gives"
