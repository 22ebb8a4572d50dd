"""A table as job arrays of Slurm: train.sh has a task for every training, measure.sh for every row, submit.sh their order."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from gesso import atomic_io
from gesso.reproduce import plan, runner
from gesso.reproduce.cli import ReproduceArgs, pluralize
from gesso.reproduce.plan import MeasurementJob, TrainingJob
from gesso.reproduce.schema import Table

GPUS = {"tiny": 0, "small": 1, "paper": 8}
"""of a node, by scale"""
SCRIPT_HEADER = """#!/bin/bash
# {what}
# Add what your cluster wants: --partition, --account; more --nodes for a training.
#SBATCH --job-name={name}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --cpus-per-task={cpus}
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
#SBATCH --signal=B:USR1@300
trap 'scancel --signal=TERM "$SLURM_JOB_ID"; wait; scontrol requeue "$SLURM_JOB_ID"' USR1
case "$SLURM_ARRAY_TASK_ID" in
{cases}
esac
"""
TORCHRUN_COMMAND = """srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node={gpus} --shutdown-timeout=240 \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$SLURM_RESTART_COUNT" --rdzv-endpoint="$(scontrol show hostnames | head -n 1):29500" \\
  -m "${{command[@]}}" &
wait $!
"""
SINGLE_PROCESS_COMMAND = """srun "${command[@]}" &
wait $!
"""


def write_scripts(table: Table, args: ReproduceArgs, jobs: Sequence[MeasurementJob]) -> list[str]:
    """Write the three scripts into the folder --slurm, of what is not there; returns how to submit them."""
    folder = args.slurm
    assert folder is not None
    left = [one for one in plan.unique_trainings(jobs) if not runner.is_finished(one)]
    rows = list(dict.fromkeys(job.row for job in jobs if not job.path.is_file()))
    if not rows:
        return ["all is measured: nothing was written; without --slurm the page is"]
    gpus, name = GPUS[args.scale], table.name.replace("/", "-")
    atomic_io.write_text(
        folder / "train.sh",
        format_script(f"{name}-train", f"The trainings of {table.name}.", training_cases(left), gpus),
    )
    measuring = format_script(
        f"{name}-measure", f"The rows of {table.name}.", measurement_cases(args, rows), min(gpus, 1)
    )
    atomic_io.write_text(folder / "measure.sh", measuring)
    atomic_io.write_text(folder / "submit.sh", submit_script(folder, left, len(rows)))
    return [
        f"wrote train.sh ({pluralize(len(left), 'training')}), measure.sh ({pluralize(len(rows), 'row')}) and submit.sh to {folder}",
        f"submit them from this folder, which their paths are relative to:  bash {shlex.quote(str(folder / 'submit.sh'))}",
        f"when all is measured, the page is written by:  {args.command_line()}",
    ]


def format_script(name: str, description: str, cases: Sequence[str], gpus: int) -> str:
    """Return a job array script with one case per task."""
    header = SCRIPT_HEADER.format(
        name=name, what=description, cases="\n".join(cases), cpus=8 * gpus or 2,
        gpus=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
    )  # fmt: skip
    return header + (TORCHRUN_COMMAND.format(gpus=gpus) if gpus > 1 else SINGLE_PROCESS_COMMAND)


def training_cases(left: Sequence[TrainingJob]) -> list[str]:
    return [f"  {i}) command=({one.command} --resume) ;;" for i, one in enumerate(left)]


def measurement_cases(args: ReproduceArgs, rows: Sequence[str]) -> list[str]:
    return [f"  {i}) command=({args._replace(rows=(row,)).command_line()}) ;;" for i, row in enumerate(rows)]


def submit_script(folder: Path, left: Sequence[TrainingJob], rows: int) -> str:
    """Trainings that start from another one wait for it alone, and are dropped where it fails; measuring waits for all that
    ended, as a row whose training diverged is a result."""
    train, measure = (shlex.quote(str(folder / name)) for name in ("train.sh", "measure.sh"))
    place = {one.key: i for i, one in enumerate(left)}
    groups: dict[str | None, list[int]] = {}
    for i, one in enumerate(left):
        parent = one.parent.key if one.parent and one.parent.key in place else None
        groups.setdefault(parent, []).append(i)
    lines, jobs, job_of = (
        ["#!/bin/bash", "# In the folder that `gesso reproduce --slurm` was called in.", "set -e"],
        [],
        {},
    )
    for number, (parent, members) in enumerate(groups.items()):  # parents stand before their children in `left`
        after = (
            f"--dependency=afterok:${{{job_of[parent]}}}_{place[parent]} --kill-on-invalid-dep=yes " if parent else ""
        )
        job = f"train{number}"
        lines.append(f"{job}=$(sbatch --parsable --array={','.join(map(str, members))} {after}{train} | cut -d';' -f1)")
        job_of |= {left[i].key: job for i in members}
        jobs.append(f"${job}")
    after = f"--dependency=afterany:{':'.join(jobs)} " if jobs else ""
    lines.append(f"measured=$(sbatch --parsable --array=0-{rows - 1} {after}{measure} | cut -d';' -f1)")
    lines.append(f'echo "submitted {" ".join([*jobs, "$measured"])}"')
    return "\n".join(lines) + "\n"
