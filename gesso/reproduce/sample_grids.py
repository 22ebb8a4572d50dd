"""Grids of samples for figures that show images."""

import math
from pathlib import Path
from typing import Any

import torch

from gesso import ema, sampling, snapshot
from gesso.evaluation import protocols, run_sampler
from gesso.reproduce.plan import MeasurementJob


def save_sample_grid(job: MeasurementJob) -> dict[str, Any]:
    """Return the number of images in a grid of samples.

    The grid of seeds 0, 1, ... is saved as a PNG file next to the record. The parameter `sizes=A,B` makes one row per
    size condition.
    """
    assert job.training is not None
    folder = job.training.folder
    run = protocols.apply_protocol(folder, job.group.protocol, job.overrides)
    weights, _, nimg, _ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(run.sample)], run.eval.nimg)
    device = sampling.run_device(run)
    sampler = run_sampler.open_run_sampler(folder, run, snapshot.denoiser_from_weights(weights[0], run, device), device)
    seeds = range(run.eval.num_samples)
    sizes = job.params["sizes"].split(",") if "sizes" in job.params else []
    controls: list[dict[str, str] | None] = [{"size": f"{size}x{size}"} for size in sizes] or [None]
    samples = torch.cat(
        [images.cpu() for control in controls for images, _ in sampler.generate_batches(seeds, control)]
    )
    columns = len(seeds) if sizes else math.ceil(len(seeds) ** 0.5)
    sampling.save_png(sampling.image_grid(samples, columns), grid_path(job))
    protocol = {"sampling": sampling.describe_sampling(run), "seeds": f"0 to {seeds.stop - 1}", "nimg": nimg}
    return {"values": {"num_images": len(samples)}, "protocol": protocol | ({"sizes": sizes} if sizes else {})}


def grid_path(job: MeasurementJob) -> Path:
    """Return the path of the grid of a measurement."""
    return job.path.with_suffix(".png")
