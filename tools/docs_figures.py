"""Draw the figures of docs/how/ as SVG, from closed-form denoisers and from gesso's processes, samplers and generator.

    python tools/docs_figures.py [FOLDER]      # default: docs/images

Every figure is deterministic. Nothing is trained except a linear layer of 64 weights for the figure on normalization.
"""

import math
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from gesso import config, rng
from gesso.conditioning import Cond
from gesso.diffusion import guidance, process, samplers, schedules
from gesso.diffusion.process import Process
from gesso.models import mp

matplotlib.rcParams.update({"svg.hashsalt": "gesso", "font.size": 9, "axes.titlesize": 9, "font.family": "DejaVu Sans"})
BLUE, RED, GREY = "#2f5d7c", "#b4532a", "#8a9299"


class MixtureDenoiser(nn.Module):
    """Exact denoiser E[x0 | x] of a mixture of isotropic Gaussians: (B, C, 1, 1) -> (B, C, 1, 1).

    Args:
        proc: Process of the noisy points x = alpha(s) x0 + s eps.
        means: Means of the components (K, C).
        std: Standard deviation of every component.
        labels: Class of each component (K,); None for an unconditional mixture.
    """

    def __init__(self, proc: Process, means: Tensor, std: float, labels: Tensor | None = None):
        super().__init__()
        self.proc, self.means, self.variance, self.labels = proc, means.double(), std**2, labels

    def forward(self, x: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """Return the posterior mean of x0."""
        points, s = x.flatten(1).double()[:, None], s.double().expand(len(x))[:, None]
        alpha = self.proc.alpha(s)  # (B, 1), as s
        total = alpha**2 * self.variance + s**2
        offsets = points - alpha[..., None] * self.means  # (B, K, C)
        logits = -(offsets**2).sum(-1) / (2 * total)
        if cond is not None and self.labels is not None:
            label = cond.label_or_null(int(self.labels.max()) + 1)
            allowed = (label[:, None] == self.labels) | (label > self.labels.max())[:, None]
            logits = logits.masked_fill(~allowed, -math.inf)
        posterior_means = self.means + (alpha * self.variance / total)[..., None] * offsets
        mean = (logits.softmax(1)[..., None] * posterior_means).sum(1)
        return mean.to(x.dtype)[:, :, None, None]


def clean(axes: Axes) -> None:
    """Remove ticks and the upper and right border."""
    axes.set(xticks=[], yticks=[])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_processes() -> Figure:
    """Draw sampling trajectories of one coordinate under three processes, for data at -1 and 1."""
    cases: list[tuple[str, Process]] = [
        ("EDM: x = x0 + s ε", process.build_process(config.EDMConfig(sigma_data=1.0))),
        ("VP, v-prediction: x = (1-s) x0 + s ε", process.build_process(config.VPConfig(prediction="v"))),
        ("rectified flow: x = (1-s) x0 + s ε", process.build_process(config.RFConfig())),
    ]
    figure = Figure(figsize=(9, 3), layout="constrained")
    noise = torch.linspace(-2.2, 2.2, 24, dtype=torch.float64)[:, None, None, None]
    for axes, (title, proc) in zip(figure.subplots(1, 3, sharey=True), cases, strict=True):
        denoise = MixtureDenoiser(proc, torch.tensor([[-1.0], [1.0]]), 0.15)
        levels = schedules.levels(proc, 32)
        states = [proc.initial_state(noise, levels[0])]
        samplers.heun(denoise, states[0], levels, proc.alpha, callback=lambda i, x, D, s=states: s.append(x))
        scale = (proc.alpha(levels) ** 2 + levels**2).sqrt()
        lines = torch.stack(states)[:, :, 0, 0, 0] / scale[:, None]
        for line, end in zip(lines.T, lines[-1], strict=True):
            axes.plot(range(len(levels)), line, color=BLUE if end < 0 else RED, lw=0.8, alpha=0.8)
        clean(axes)
        axes.set(title=title, xlabel="step, from noise to data")
        axes.set_yticks([-1, 1], ["-1", "1"])
    figure.axes[0].set_ylabel("x / sqrt(α² + s²)")
    return figure


def draw_guidance() -> Figure:
    """Draw samples of one of two classes at three guidance scales, with exact denoisers."""
    proc = process.build_process(config.EDMConfig())
    angle = torch.linspace(0, 1, 12, dtype=torch.float64) * 2.2
    arm = torch.stack([angle.cos(), angle.sin()], 1) * (0.35 + 0.3 * angle[:, None])
    means, labels = torch.cat([arm, -arm]), torch.tensor([0] * 12 + [1] * 12)
    model = MixtureDenoiser(proc, means, 0.12, labels)
    levels, n = schedules.levels(proc, 24), 250
    index = torch.arange(n)
    start = proc.initial_state(rng.normal(0, index, "first noise", (2, 1, 1)), levels[0])
    background = means[torch.arange(2 * n) % 24].float() + 0.12 * rng.normal(1, torch.arange(2 * n), "data", (2,))
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    for axes, scale in zip(figure.subplots(1, 3), (1.0, 2.0, 4.0), strict=True):
        terms = guidance.guidance_terms(model, Cond(label=torch.zeros(n, dtype=torch.long)), scale)
        points = samplers.heun(guidance.combine_terms(terms), start, levels, proc.alpha)[:, :, 0, 0]
        axes.scatter(*background.T, s=4, color="#cfd4d8", lw=0)
        axes.scatter(*points.T, s=5, color=RED, alpha=0.7, lw=0)
        clean(axes)
        axes.spines[:].set_visible(False)
        axes.set(title=f"guidance {scale:g}", xlim=(-1.2, 1.2), ylim=(-1.3, 1.3), aspect="equal")
    return figure


def draw_sphere() -> Figure:
    """Draw one update of a weight on the sphere, and the norm and rotation of weights with and without it."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_update(left)
    steps, curves = 400, {}
    for name, normalized in (("plain", False), ("on the sphere", True)):
        curves[name] = train_linear(steps, normalized)
    for name, color in (("plain", GREY), ("on the sphere", RED)):
        norms, angles = curves[name]
        middle.plot(norms, color=color, label=name)
        right.plot(angles, color=color, label=name)
    middle.set(title="rms of the weights", xlabel="step", ylim=(0, None))
    right.set(title="rotation of the weights per step (degrees)", xlabel="step", ylim=(0, None))
    middle.legend(frameon=False)
    for axes in (middle, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def draw_update(axes: Axes) -> None:
    """Draw weight, gradient, projected step and renormalization on a circle."""
    turn = torch.linspace(0, 2 * math.pi, 200)
    axes.plot(turn.cos(), turn.sin(), color=GREY, lw=0.8)
    start = torch.tensor([math.cos(2.0), math.sin(2.0)])
    gradient = torch.tensor([-0.6, -0.7])
    tangent = gradient - (gradient @ start) * start
    moved = start - tangent
    end = moved / moved.norm()
    for tail, head, color in ((torch.zeros(2), start, BLUE), (start, start - gradient, GREY), (start, moved, RED)):
        axes.annotate("", head.tolist(), tail.tolist(), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.4})
    axes.plot(*torch.stack([moved, end]).T, color=RED, lw=1.2, ls=":")
    axes.plot(*end, "o", color=RED, ms=5)
    axes.text(-0.3, 0.25, "w", color=BLUE)
    axes.text(0.25, 1.6, "-gradient", color=GREY)
    axes.text(0.42, 1.22, "projected (Eq. 59)", color=RED)
    axes.text(0.3, 0.74, "normalized (Eq. 66)", color=RED, bbox={"color": "white", "pad": 0})
    clean(axes)
    axes.spines[:].set_visible(False)
    axes.set(title="one step", xlim=(-1.25, 1.75), ylim=(-1.1, 1.8), aspect="equal")


def train_linear(steps: int, normalized: bool) -> tuple[list[float], list[float]]:
    """Train a scale-invariant layer with Adam; return the rms of its weights and its rotation in degrees per step."""
    weight = nn.Parameter(mp.unit_rms(rng.normal(0, torch.arange(1), "weight", (64,))))
    target = rng.normal(0, torch.arange(1), "target", (64,))
    optimizer = torch.optim.Adam([weight], lr=0.15, betas=(0.9, 0.99))
    norms, angles = [], []
    for step in range(steps):
        x = rng.normal(0, torch.arange(32 * step, 32 * (step + 1)), "input", (64,))
        direction = weight / weight.norm()  # the output does not depend on the norm, as before a normalization layer
        loss = (x @ (direction - target / target.norm()).T).square().mean() + (x @ direction.T)[:8].mean()
        before = weight.detach().clone()
        optimizer.zero_grad()
        loss.backward()
        if normalized:
            mp.project_gradients([weight])
        optimizer.step()
        if normalized:
            mp.normalize_weights_([weight])
        cosine = torch.nn.functional.cosine_similarity(before, weight.detach()).clamp(-1, 1)
        norms.append(float(weight.detach().square().mean().sqrt()))
        angles.append(math.degrees(float(cosine.acos())))
    return norms, angles


def draw_randomness() -> Figure:
    """Draw the numbers of 24 samples for five purposes, and which rank computes them in three trainings."""
    purposes = ["view", "flip", "label dropout", "noise level", "noise"]  # as in gesso's source
    samples = torch.arange(24)
    values = torch.stack([rng.uniform(0, samples, purpose)[:, 0] for purpose in purposes])
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(5, 3), sharex=True)
    upper.pcolormesh(values, cmap="copper_r", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    upper.set(title="numbers in (0, 1) of (seed 0, sample index, purpose)")
    upper.set_yticks([i + 0.5 for i in range(5)], purposes)
    upper.invert_yaxis()
    rows = [("1 rank", 1, 24), ("2 ranks", 2, 24), ("4 ranks, then killed\nand resumed with 2", 4, 16)]
    colors = [BLUE, RED, "#6b8e5a", "#c9a227"]
    for y, (_, ranks, until) in enumerate(rows):
        for i in range(24):
            count = ranks if i < until else 2
            rank = i % 8 * count // 8
            lower.barh(y, 1, left=i, color=colors[rank], edgecolor="white", height=0.8)
    lower.axvline(16, ymin=0, ymax=0.33, color="black", lw=2)
    lower.set_yticks(range(3), [name for name, _, _ in rows])
    lower.invert_yaxis()
    lower.set(xlim=(0, 24), xlabel="sample index; batches of 8; color: the rank that computes the sample")
    lower.set_xticks([0, 8, 16, 24])
    for axes in (upper, lower):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


FIGURES = {
    "how-processes.svg": draw_processes,
    "how-guidance.svg": draw_guidance,
    "how-sphere.svg": draw_sphere,
    "how-randomness.svg": draw_randomness,
}


def main(folder: Path) -> None:
    """Write all figures to a folder."""
    for name, draw in FIGURES.items():
        draw().savefig(folder / name, format="svg", metadata={"Date": None}, facecolor="white")
        print(f"wrote {folder / name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images")
