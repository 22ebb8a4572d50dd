"""Count the GPU memory of a training step for the table of docs/memory.md.

    python benchmarks/memory.py

Weights, gradients, Adam's moments and tracked EMAs are arithmetic (gesso/training/estimate.py). Activations are the
tensors saved for backward, counted by torch on fake tensors under bfloat16 autocast. Buffers of GPU libraries and of
the allocator come on top; `gesso train RECIPE --estimate` measures them.
"""

from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gesso import models, recipes
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.data.synthetic import with_synthetic_data
from gesso.training.estimate import static_memory

GB = 1e9
CASES = ("in1k-256-dit", "cc12m-256-berrada", "in1k-512-berrada", "edm2-img512-s", "edm2-img512-xl", "edm2-img512-xxl")
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "+ ema.device=cpu": ["ema.device=cpu"],
    "+ optim.state_dtype=8bit": ["ema.device=cpu", "optim.state_dtype=8bit"],
}
GPU_GB = 24


def activation_bytes(run: RunConfig, num_samples: int, recompute: bool) -> tuple[int, int]:
    """Return the bytes saved for backward besides the parameters: of the network, and of its largest block.

    Args:
        run: Run whose network is measured.
        num_samples: Batch size.
        recompute: Whether blocks are recomputed in backward (train.activation_checkpointing).
    """
    saved_bytes: dict[int, int] = {}  # by storage
    largest_block, before_block = 0, 0

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved_bytes[storage._cdata] = storage.nbytes()
        return tensor

    def before_forward(*_: object) -> None:
        nonlocal before_block
        before_block = sum(saved_bytes.values())

    def after_forward(*_: object) -> None:
        nonlocal largest_block
        largest_block = max(largest_block, sum(saved_bytes.values()) - before_block)

    inputs, n = run.input_spec, num_samples
    with FakeTensorMode():
        net = models.build_network(run.net, inputs)
        parameters = {p.untyped_storage()._cdata for p in net.parameters()}
        for block in models.list_blocks(net):
            block.register_forward_pre_hook(before_forward)
            block.register_forward_hook(after_forward)
            if recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        cond = Cond(
            label=torch.zeros(n, dtype=torch.int64) if inputs.num_classes else None,
            text=torch.zeros(n, run.semantic.max_tokens, inputs.text_dim) if inputs.text_dim else None,
            pooled=torch.zeros(n, inputs.pooled_dim) if inputs.pooled_dim else None,
            control_high=torch.zeros(n, inputs.control.num_high) if inputs.control.num_high else None,
            control_low=torch.zeros(n, inputs.control.num_low) if inputs.control.num_low else None,
        )
        x = torch.zeros(n, inputs.channels, inputs.resolution, inputs.resolution)
        with saved_tensors_hooks(save, lambda t: t), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = net(x, torch.zeros(n), torch.zeros(n), cond)
        assert out.shape == x.shape
    return sum(size for storage, size in saved_bytes.items() if storage not in parameters), largest_block


def main() -> None:
    """Print a line of the table for each recipe."""
    print("| recipe | M parameters | " + " | ".join(VARIANTS) + " | activations of a sample | recomputed |")
    print("|---|---|" + "---|" * (len(VARIANTS) + 2))
    for name in CASES:
        run, _ = with_synthetic_data(recipes.resolve(name, [])[0])
        # Bytes per sample are the slope between batches of 2 and 4: a part does not depend on the batch size.
        pairs = {recompute: [activation_bytes(run, n, recompute) for n in (2, 4)] for recompute in (False, True)}
        per_sample = {key: [(b - a) / 2 for a, b in zip(*pair, strict=True)] for key, pair in pairs.items()}
        # With recomputation the activations of one block at a time are in memory.
        saved, recomputed = per_sample[False][0], per_sample[True][0] + per_sample[False][1]
        cells = []
        for settings in VARIANTS.values():
            variant, _ = with_synthetic_data(recipes.resolve(name, settings)[0])
            parts = static_memory(variant)
            static = sum(parts.values()) - (parts["averages"] if variant.ema.device == "cpu" else 0)
            batch_size = int((0.9 * GPU_GB * GB - static) / recomputed)
            cells.append(f"{static / GB:.1f} GB, {f'batch of {batch_size}' if batch_size >= 1 else 'none'}")
        columns = [name, f"{static_memory(run)['weights'] / 4e6:,.0f}", *cells]
        columns += [f"{saved / 1e6:,.0f} MB", f"{recomputed / 1e6:,.0f} MB"]
        print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
