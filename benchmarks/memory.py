"""What a training step of a network holds in a GPU's memory, counted: the table of docs/memory.md.

    python benchmarks/memory.py

Weights, gradients, Adam's averages and tracked averages are arithmetic (gesso/training/estimate.py). Activations are the tensors
that backward asks for, counted by torch as the network runs on tensors without values: with products in bfloat16, without
what a GPU's own libraries and its allocator take, which measured runs (gesso train RECIPE --estimate) have on top.
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
WAYS: dict[str, list[str]] = {
    "as it is": [],
    "+ ema.device=cpu": ["ema.device=cpu"],
    "+ optim.state_dtype=8bit": ["ema.device=cpu", "optim.state_dtype=8bit"],
}
CARD = 24


def activations(run: RunConfig, samples: int, recompute: bool) -> tuple[int, int]:
    """Bytes that backward asks for besides the parameters: of the whole network, of its largest block."""
    stored: dict[int, int] = {}
    largest, before = 0, 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            stored[storage._cdata] = storage.nbytes()
        return tensor

    def enter(*_: object) -> None:
        nonlocal before
        before = sum(stored.values())

    def leave(*_: object) -> None:
        nonlocal largest
        largest = max(largest, sum(stored.values()) - before)

    inputs, n = run.input_spec, samples
    with FakeTensorMode():
        net = models.build_network(run.net, inputs)
        local = {p.untyped_storage()._cdata for p in net.parameters()}
        for block in models.list_blocks(net):
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave)
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
        with saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = net(x, torch.zeros(n), torch.zeros(n), cond)
        assert out.shape == x.shape
    return sum(size for storage, size in stored.items() if storage not in local), largest


def main() -> None:
    print("| recipe | M parameters | " + " | ".join(WAYS) + " | activations of a sample | recomputed |")
    print("|---|---|" + "---|" * (len(WAYS) + 2))
    for name in CASES:
        run, _ = with_synthetic_data(recipes.resolve(name, [])[0])
        # Of a sample: what does not grow with their number is left out.
        actual = {how: [activations(run, n, how) for n in (2, 4)] for how in (False, True)}
        slopes = {how: [(b - a) / 2 for a, b in zip(*pair, strict=True)] for how, pair in actual.items()}
        # What is computed again is there one block at a time.
        each = slopes[False][0], slopes[True][0] + slopes[False][1]
        cells = []
        for settings in WAYS.values():
            some, _ = with_synthetic_data(recipes.resolve(name, settings)[0])
            parts = static_memory(some)
            held = sum(parts.values()) - (parts["averages"] if some.ema.device == "cpu" else 0)
            room = (0.9 * CARD * GB - held) / each[1]
            cells.append(f"{held / GB:.1f} GB, {f'{int(room)} at once' if room >= 1 else 'none'}")
        millions = static_memory(run)["weights"] / 4e6
        print(
            f"| {name} | {millions:,.0f} | "
            + " | ".join(cells)
            + f" | {each[0] / 1e6:,.0f} MB | {each[1] / 1e6:,.0f} MB |"
        )


if __name__ == "__main__":
    main()
