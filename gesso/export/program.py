"""Write the denoiser of a run as a program of torch.export, which loads without gesso.

The program is D(x, s, conditions): x (B, C, H, W) and s (B,), then the conditions that the network takes, in the order
of `Cond`. The batch size is free, height and width are fixed.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from gesso import atomic_io, ema, snapshot
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError

EXAMPLE_BATCH = 2


class PlainDenoiser(nn.Module):
    """Denoiser whose conditions are tensors in a fixed order, instead of a Cond.

    Args:
        denoiser: The denoiser.
        names: Fields of Cond, in the order of the arguments.
    """

    def __init__(self, denoiser: Denoiser, names: tuple[str, ...]):
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, x: Tensor, s: Tensor, *conditions: Tensor) -> Tensor:
        """Return the estimate of x0, (B, C, H, W)."""
        return self.denoiser(x, s, Cond(**dict(zip(self.names, conditions, strict=True))))


def example_inputs(run: RunConfig) -> dict[str, Tensor]:
    """Return inputs of a small batch by name, in the order of the program's arguments."""
    inputs, B = run.input_spec, EXAMPLE_BATCH
    height, width = (side // run.downsample_factor for side in run.sample_size)
    g = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(B, inputs.channels, height, width, generator=g), "s": torch.linspace(0.3, 0.7, B)}
    if inputs.num_classes:
        tensors["label"] = torch.arange(B) % inputs.num_classes
    if inputs.text_dim:
        tensors["text"] = torch.randn(B, run.semantic.max_tokens, inputs.text_dim, generator=g)
        if run.semantic.padding == "masked":
            tensors["text_mask"] = torch.ones(B, run.semantic.max_tokens, dtype=torch.bool)
    if inputs.pooled_dim:
        tensors["pooled"] = torch.randn(B, inputs.pooled_dim, generator=g)
    for name in ("high", "low"):
        if count := len(run.control.column_names(name)):
            tensors[f"control_{name}"] = 1000 * torch.rand(B, count, generator=g)
    return tensors


def write_program(folder: Path, run: RunConfig, out: Path, nimg: int | None) -> list[str]:
    """Write the denoiser as a .pt2 file; return a report as lines.

    Args:
        folder: Run folder.
        run: Settings of the run; the program has the height and width of sample.*.
        out: File to write.
        nimg: Number of images that the weights were trained on; None is the last snapshot.

    Raises:
        UsageError: `out` is no .pt2 file, or the weights cannot be reconstructed.
    """
    if out.suffix != ".pt2":
        raise UsageError(f"{out}: --format torch-export writes one file, so name it FILE.pt2")
    profile = ema.sampling_profile(run.sample)
    weights, _, nimg, fits = snapshot.reconstruct_from_run(folder, [profile], nimg)
    denoiser = snapshot.denoiser_from_weights(weights[0], run)
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.contiguous()  # torch.export.save warns of other strides
    tensors = example_inputs(run)
    names = tuple(tensors)[2:]
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in tensors)
    program = torch.export.export(
        PlainDenoiser(denoiser, names), tuple(tensors.values()), dynamic_shapes=(shapes[0], shapes[1], shapes[2:])
    )
    with atomic_io.atomic_file(out) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)
    return [
        f"wrote {out}, image {nimg:,} ({fits[0]})",
        f"  torch.export.load({str(out)!r}).module()({', '.join(tensors)}) returns x0",
    ]
