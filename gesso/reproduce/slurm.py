"""Slurm job arrays of a table: train.sh has a task for each training, measure.sh for each row, submit.sh submits."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from gesso import atomic_io
from gesso.reproduce import plan, runner
from gesso.reproduce.cli import ReproduceArgs, pluralize
from gesso.reproduce.plan import MeasurementJob, TrainingJob
from gesso.reproduce.schema import Table

GPUS_PER_SCALE = {"tiny": 0, "small": 1, "paper": 8}
"""GPUs of a node, by scale."""
SCRIPT_HEADER = """#!/bin/bash
# {description}
# Add the options of your cluster: --partition, --account; more --nodes for a training.
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
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$SLURM_RESTART_COUNT" \\
  --rdzv-endpoint="$(scontrol show hostnames | head -n 1):29500" \\
  -m "${{command[@]}}" &
wait $!
"""
SINGLE_PROCESS_COMMAND = """srun "${command[@]}" &
wait $!
"""


def write_scripts(table: Table, args: ReproduceArgs, jobs: Sequence[MeasurementJob]) -> list[str]:
    """Write the three scripts for missing trainings and rows into the folder --slurm.

    Returns:
        Lines on how to submit them.
    """
    folder = args.slurm
    assert folder is not None
    trainings = [training for training in plan.unique_trainings(jobs) if not runner.is_finished(training)]
    rows = list(dict.fromkeys(job.row for job in jobs if not job.path.is_file()))
    if not rows:
        return ["everything is measured: no script was written; run the command without --slurm to write the page"]
    gpus, name = GPUS_PER_SCALE[args.scale], table.name.replace("/", "-")
    scripts = {
        "train.sh": format_script(f"{name}-train", f"Trainings of {table.name}.", training_cases(trainings), gpus),
        "measure.sh": format_script(
            f"{name}-measure", f"Rows of {table.name}.", measurement_cases(args, rows), min(gpus, 1)
        ),
        "submit.sh": submit_script(folder, trainings, len(rows)),
    }
    for file_name, text in scripts.items():
        atomic_io.write_text(folder / file_name, text)
    return [
        f"wrote train.sh ({pluralize(len(trainings), 'training')}), measure.sh ({pluralize(len(rows), 'row')}) and "
        f"submit.sh to {folder}",
        f"paths are relative to this folder: submit from here with  bash {shlex.quote(str(folder / 'submit.sh'))}",
        f"after all jobs have finished, write the page with:  {args.command_line()}",
    ]


def format_script(name: str, description: str, cases: Sequence[str], gpus: int) -> str:
    """Return a job array script with one case per task."""
    header = SCRIPT_HEADER.format(
        name=name,
        description=description,
        cases="\n".join(cases),
        cpus=8 * gpus or 2,
        gpus=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
    )
    return header + (TORCHRUN_COMMAND.format(gpus=gpus) if gpus > 1 else SINGLE_PROCESS_COMMAND)


def training_cases(trainings: Sequence[TrainingJob]) -> list[str]:
    """Return the case of each training."""
    return [f"  {i}) command=({training.command} --resume) ;;" for i, training in enumerate(trainings)]


def measurement_cases(args: ReproduceArgs, rows: Sequence[str]) -> list[str]:
    """Return the case of each row."""
    return [f"  {i}) command=({args._replace(rows=(row,)).command_line()}) ;;" for i, row in enumerate(rows)]


def submit_script(folder: Path, trainings: Sequence[TrainingJob], num_rows: int) -> str:
    """Return the script that submits the arrays.

    A training waits only for the one that it starts from, and is cancelled if that fails. Measurements wait for all
    trainings to end, whether they succeed or not, because a diverged training is a result.
    """
    train, measure = (shlex.quote(str(folder / name)) for name in ("train.sh", "measure.sh"))
    index = {training.key: i for i, training in enumerate(trainings)}
    arrays: dict[str | None, list[int]] = {}
    for i, training in enumerate(trainings):
        parent = training.parent.key if training.parent and training.parent.key in index else None
        arrays.setdefault(parent, []).append(i)
    lines = ["#!/bin/bash", "# Run in the folder in which `gesso reproduce --slurm` was run.", "set -e"]
    variables: list[str] = []
    variable_of: dict[str, str] = {}
    for number, (parent, members) in enumerate(arrays.items()):  # `trainings` has parents before children
        dependency = (
            f"--dependency=afterok:${{{variable_of[parent]}}}_{index[parent]} --kill-on-invalid-dep=yes "
            if parent
            else ""
        )
        variable = f"train{number}"
        array = ",".join(map(str, members))
        lines.append(f"{variable}=$(sbatch --parsable --array={array} {dependency}{train} | cut -d';' -f1)")
        variable_of |= {trainings[i].key: variable for i in members}
        variables.append(f"${variable}")
    dependency = f"--dependency=afterany:{':'.join(variables)} " if variables else ""
    lines.append(f"measured=$(sbatch --parsable --array=0-{num_rows - 1} {dependency}{measure} | cut -d';' -f1)")
    lines.append(f'echo "submitted {" ".join([*variables, "$measured"])}"')
    return "\n".join(lines) + "\n"
