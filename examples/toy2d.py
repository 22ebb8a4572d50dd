"""Learn a density in the plane in a minute or two on a CPU with the process, denoiser and samplers of gesso.

    python examples/toy2d.py            # writes toy2d.png

The data are a spiral of two arms, one per class. Points are images of shape (2, 1, 1), so that the code is the same.
"""

import sys

import torch
from matplotlib.figure import Figure
from torch import nn

from gesso import config, rng
from gesso.conditioning import Cond
from gesso.diffusion import denoiser, guidance, process, samplers, schedules
from gesso.ema import PowerProfile, Tracker
from gesso.models import mp

BATCH_SIZE, NUM_STEPS, WIDTH = 1024, 1500, 128


def sample_spiral(sample_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points (B, 2, 1, 1) of standard deviation about 0.5 and their arms (B,), keyed to the sample index."""
    u = rng.uniform(0, sample_index, "arm and place", 2)
    arm, turn = (u[:, 0] < 0.5).long(), 1.1 + 3.3 * u[:, 1].sqrt()
    angle = turn + torch.pi * arm
    points = torch.stack([angle.cos(), angle.sin()], 1) * turn[:, None] / 4.6
    points += 0.02 * rng.normal(0, sample_index, "jitter", (2,), torch.float64)
    return points.float()[:, :, None, None], arm


class Net(nn.Module):
    """A magnitude-preserving MLP with the call signature of all networks of gesso."""

    def __init__(self):
        super().__init__()
        self.point, self.time, self.label = mp.MPLinear(3, WIDTH), mp.MPLinear(32, WIDTH), mp.MPLinear(2, WIDTH)
        self.fourier = mp.MPFourier(32)
        self.hidden = nn.ModuleList(mp.MPLinear(WIDTH, WIDTH) for _ in range(4))
        self.out, self.gain = mp.MPLinear(WIDTH, 2), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, progress: torch.Tensor, cond: Cond) -> torch.Tensor:
        """Return the output (B, 2, 1, 1) for points x (B, 2, 1, 1)."""
        one_hot = nn.functional.one_hot(cond.label_or_null(2), 3)[:, :2].to(x.dtype) * 2**0.5
        x = torch.cat([x.flatten(1), x.new_ones(len(x), 1)], dim=1)
        condition = mp.mp_sum(self.time(self.fourier(c_noise)), self.label(one_hot), 0.5)
        h = mp.mp_sum(self.point(x), condition, 0.5)
        for layer in self.hidden:
            h = mp.mp_sum(h, layer(mp.mp_silu(h)), 0.3)
        return self.out(h, gain=self.gain)[:, :, None, None]


def train() -> denoiser.Denoiser:
    """Return a trained denoiser with its EMA weights."""
    torch.manual_seed(0)
    proc = process.build_process(config.EDMConfig(P_mean=-1.2, P_std=1.4))
    net = Net()
    model = denoiser.Denoiser(net, proc, "fourier")
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
    sphere, tracker, nimg = mp.sphere_weights(net), Tracker(net.state_dict(), [PowerProfile(0.1)]), 0
    for step in range(NUM_STEPS):
        sample_index = torch.arange(nimg, nimg + BATCH_SIZE)
        x0, arm = sample_spiral(sample_index)
        s = proc.icdf(rng.uniform(0, sample_index, "noise level")[:, 0]).float()
        cond = Cond(label=arm, has_semantic=rng.uniform(0, sample_index, "label dropout")[:, 0] > 0.1)
        eps = rng.normal(0, sample_index, "noise", (2, 1, 1))
        loss = denoiser.loss(model, proc, x0, s, eps, cond).mean()
        optimizer.zero_grad()
        loss.backward()
        mp.project_gradients(sphere)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / max(1, step / 300) ** 0.5
        optimizer.step()
        mp.normalize_weights_(sphere)
        tracker.update(nimg, nimg + BATCH_SIZE)
        nimg += BATCH_SIZE
    net.load_state_dict(tracker.averages[PowerProfile(0.1)])
    mp.normalize_weights_(sphere)
    return model.eval()


def sample(model: denoiser.Denoiser, guidance_scale: float, n: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n points (n, 2), sampled in 32 Heun steps, and their arms (n,)."""
    arm = torch.arange(n) % 2
    levels = schedules.levels(model.process, 32)
    noise = rng.normal(1, torch.arange(n), "first noise", (2, 1, 1))
    denoise = guidance.combine_terms(guidance.guidance_terms(model, Cond(label=arm), guidance_scale))
    x = samplers.heun(denoise, model.process.initial_state(noise, levels[0]), levels, model.process.alpha)
    return x[:, :, 0, 0], arm


def main(path: str) -> None:
    """Train, sample and plot."""
    model = train()
    real, arms = sample_spiral(torch.arange(2000))
    panels = [("data", real[:, :, 0, 0], arms)]
    panels += [(f"guidance {scale:g}", *sample(model, scale)) for scale in (1.0, 2.0)]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (title, points, arm) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.scatter(*points.T, c=["#b4532a" if a else "#2f5d7c" for a in arm], s=2, alpha=0.6, lw=0)
        axes.set(title=title, xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "toy2d.png")
