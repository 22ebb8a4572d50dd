"""A table as job arrays of Slurm: train.sh has a task for every training, measure.sh for every row, submit.sh their order."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from gesso import files
from gesso.tables import make, plan
from gesso.tables.command import Asked, many
from gesso.tables.plan import Job, Trained
from gesso.tables.table import Table

GPUS = {"tiny": 0, "small": 1, "paper": 8}
"""of a node, by scale"""
HEAD = """#!/bin/bash
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
RANKS = """srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node={gpus} --shutdown-timeout=240 \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-$SLURM_RESTART_COUNT" --rdzv-endpoint="$(scontrol show hostnames | head -n 1):29500" \\
  -m "${{command[@]}}" &
wait $!
"""
ALONE = """srun "${command[@]}" &
wait $!
"""


def write(table: Table, asked: Asked, todo: Sequence[Job]) -> list[str]:
    """Write the three scripts into the folder --slurm, of what is not there; returns how to submit them."""
    folder = asked.slurm
    assert folder is not None
    left = [one for one in plan.trainings(todo) if not make.finished(one)]
    rows = list(dict.fromkeys(job.row for job in todo if not job.path.is_file()))
    if not rows:
        return ["all is measured: nothing was written; without --slurm the page is"]
    gpus, name = GPUS[asked.scale], table.name.replace("/", "-")
    files.write_text(
        folder / "train.sh", script(f"{name}-train", f"The trainings of {table.name}.", training_cases(left), gpus)
    )
    measuring = script(f"{name}-measure", f"The rows of {table.name}.", measuring_cases(asked, rows), min(gpus, 1))
    files.write_text(folder / "measure.sh", measuring)
    files.write_text(folder / "submit.sh", submitting(folder, left, len(rows)))
    return [
        f"wrote train.sh ({many(len(left), 'training')}), measure.sh ({many(len(rows), 'row')}) and submit.sh to {folder}",
        f"submit them from this folder, which their paths are relative to:  bash {shlex.quote(str(folder / 'submit.sh'))}",
        f"when all is measured, the page is written by:  {asked.typed()}",
    ]


def script(name: str, what: str, cases: Sequence[str], gpus: int) -> str:
    told = HEAD.format(
        name=name, what=what, cases="\n".join(cases), cpus=8 * gpus or 2,
        gpus=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
    )  # fmt: skip
    return told + (RANKS.format(gpus=gpus) if gpus > 1 else ALONE)


def training_cases(left: Sequence[Trained]) -> list[str]:
    return [f"  {i}) command=({one.command} --resume) ;;" for i, one in enumerate(left)]


def measuring_cases(asked: Asked, rows: Sequence[str]) -> list[str]:
    return [f"  {i}) command=({asked._replace(rows=(row,)).typed()}) ;;" for i, row in enumerate(rows)]


def submitting(folder: Path, left: Sequence[Trained], rows: int) -> str:
    """Trainings that start from another one wait for it alone, and are dropped where it fails; measuring waits for all that
    ended, as a row whose training diverged is a result."""
    train, measure = (shlex.quote(str(folder / name)) for name in ("train.sh", "measure.sh"))
    place = {one.key: i for i, one in enumerate(left)}
    groups: dict[str | None, list[int]] = {}
    for i, one in enumerate(left):
        parent = one.after.key if one.after and one.after.key in place else None
        groups.setdefault(parent, []).append(i)
    lines, jobs, job_of = ["#!/bin/bash", "# In the folder that `gesso table --slurm` was called in.", "set -e"], [], {}
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
