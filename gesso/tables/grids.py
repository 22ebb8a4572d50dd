"""Pictures of samples, for the figures that show some."""

import math
from pathlib import Path
from typing import Any

import torch

from gesso import ema, generate, snapshot
from gesso.evaluate import drawer, protocols
from gesso.tables.plan import Job


def pictures(job: Job) -> dict[str, Any]:
    """Samples of seeds 0, 1, ... in a PNG beside the record; told `sizes=A,B` a row for each original size."""
    assert job.trained is not None
    folder = job.trained.folder
    run = protocols.measured(folder, job.part.protocol, job.asked)
    weights, _, nimg, _ = snapshot.synthesize(folder, [ema.chosen(run.sample)], run.eval.nimg)
    device = generate.device_of(run)
    draws = drawer.opened(folder, run, snapshot.denoiser(weights[0], run, device), device)
    seeds, sizes = range(run.eval.images), job.told["sizes"].split(",") if "sizes" in job.told else []
    told = [{"size": f"{size}x{size}"} for size in sizes] or [None]
    made = torch.cat([images.cpu() for control in told for images, _ in draws.images(seeds, control)])
    columns = len(seeds) if sizes else math.ceil(len(seeds) ** 0.5)
    generate.save_png(generate.grid(made, columns), grid_of(job))
    protocol = {"drawn": generate.described(run), "seeds": f"0 to {seeds.stop - 1}", "nimg": nimg}
    return {"found": {"pictures": len(made)}, "protocol": protocol | ({"sizes": sizes} if sizes else {})}


def grid_of(job: Job) -> Path:
    return job.path.with_suffix(".png")
