"""Training speed: images/s, time spent waiting for data, model FLOP utilization (MFU), peak memory."""

import time

import torch

from gesso.config import RunConfig
from gesso.models.flops import training_macs
from gesso.training.ranks import Ranks

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
"""Side of the square matrices whose product measures the speed of a device, by device type."""


class ThroughputMeter:
    """Measure the speed of all ranks since the last call; time of waiting and memory are those of this rank.

    MFU is the model FLOPs per second, relative to those of large matrix products in the training precision on as many
    devices. Model FLOPs are 6 per multiply-accumulate of a forward pass, without recomputation, optimizer and encoders.
    The matrix product is timed once per process, at the first call.
    """

    def __init__(self, run: RunConfig, ranks: Ranks, device: torch.device, nimg: int):
        self.run, self.ranks, self.device = run, ranks, device
        self.flops_per_image = 6 * training_macs(run.net, run.input_spec, run.semantic.max_tokens)
        self.matmul_flops: float | None = None
        self.last_time, self.last_nimg, self.last_data_wait_s = time.perf_counter(), nimg, 0.0

    def __call__(self, nimg: int, data_wait_s: float) -> dict[str, float]:
        """Return the values of a log line, given images seen and seconds of waiting for data since the start."""
        seconds = synchronized_time(self.device) - self.last_time
        rate = (nimg - self.last_nimg) / seconds
        self.matmul_flops = self.matmul_flops or measure_matmul_flops(self.run, self.device)
        values = {
            "images_per_second": round(rate, 1),
            "data_wait_fraction": round((data_wait_s - self.last_data_wait_s) / seconds, 4),
            "mfu": round(rate * self.flops_per_image / (self.matmul_flops * self.ranks.world_size), 4),
            "matmul_tflops": round(self.matmul_flops / 1e12, 3),
        }
        if self.device.type == "cuda":
            values["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
        self.last_time, self.last_nimg, self.last_data_wait_s = time.perf_counter(), nimg, data_wait_s
        return values


@torch.no_grad()
def measure_matmul_flops(run: RunConfig, device: torch.device) -> float:
    """Return the FLOPs per second of the fastest of a few large matrix products in the training precision."""
    n = MATMUL_SIZE.get(device.type, MATMUL_SIZE["cpu"])
    dtype = getattr(torch, run.train.dtype if run.train.precision == "full" else run.train.precision)
    generator = torch.Generator(device).manual_seed(0)  # random values: a GPU multiplies constant ones faster
    matrix = torch.randn(n, n, generator=generator, device=device).to(dtype)
    min_seconds = float("inf")
    for _ in range(4):  # the first warms up
        started = synchronized_time(device)
        _ = matrix @ matrix
        min_seconds = min(min_seconds, synchronized_time(device) - started)
    return 2 * n**3 / min_seconds


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds after all work of the device is finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
