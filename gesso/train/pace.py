"""How fast training goes: images/s, time spent waiting for data, model FLOP utilisation, memory."""

import time

import torch

from gesso.config import Run
from gesso.nets.count import training_macs
from gesso.train.ranks import Ranks

SIDE = {"cuda": 8192, "cpu": 1024}
"""of the square matrices that a device's speed is measured with"""


class Pace:
    """Speed since the last time it was asked for, of all ranks together; waiting and memory are this rank's.

    Utilisation is model FLOPs over what a product of large square matrices reaches on this device in the precision of
    training, times the number of ranks. Model FLOPs: 6 per multiply-accumulate of a forward pass, two thirds of them in
    backward; what recompute repeats, the optimizer and the encoders do not count. The product is timed once per process,
    at the first call.
    """

    def __init__(self, run: Run, ranks: Ranks, device: torch.device, nimg: int):
        self.run, self.ranks, self.device = run, ranks, device
        self.flops = 6 * training_macs(run.net, run.inputs, run.semantic.tokens)
        self.peak: float | None = None
        self.since, self.nimg, self.waited = time.perf_counter(), nimg, 0.0

    def __call__(self, nimg: int, waited: float) -> dict[str, float]:
        """A line's values. nimg: images seen; waited: seconds spent waiting for data since training began."""
        _synchronized(self.device)
        seconds = time.perf_counter() - self.since
        rate = (nimg - self.nimg) / seconds
        self.peak = self.peak or product_flops(self.run, self.device)
        found = {
            "images_per_second": round(rate, 1),
            "waiting": round((waited - self.waited) / seconds, 4),
            "utilisation": round(rate * self.flops / (self.peak * self.ranks.world), 4),
            "product_teraflops": round(self.peak / 1e12, 3),
        }
        if self.device.type == "cuda":
            found["peak_gigabytes"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
        self.since, self.nimg, self.waited = time.perf_counter(), nimg, waited
        return found


@torch.no_grad()
def product_flops(run: Run, device: torch.device) -> float:
    """FLOPs per second of the best of a few products of large matrices, as training computes them."""
    n = SIDE.get(device.type, SIDE["cpu"])
    dtype = getattr(torch, run.train.dtype if run.train.precision == "full" else run.train.precision)
    generator = torch.Generator(device).manual_seed(0)  # numbers, not ones: a GPU that does not toggle bits runs faster
    a = torch.randn(n, n, generator=generator, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first warms up
        _synchronized(device)
        start = time.perf_counter()
        _ = a @ a
        _synchronized(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _synchronized(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
