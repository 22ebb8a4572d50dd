"""Training steps of our networks against their peers, interleaved in one process: ratios of medians.

    python benchmarks/networks.py [--cases dit pixart mmdit unet edm2] [--compile] [--rounds 9] [--device cuda]
                                  [--dtype bfloat16] [--out benchmarks/networks_cpu-2-cores_2026-11-21.json]

A step is forward, backward and optimizer step at equal widths, depths and numerics. `floor` is the time of
the step's matrix products, convolutions and attention alone, recorded and replayed on random tensors.
Absolute times depend on the machine; the ratios are what is reported. Peers need the extra `vae` (diffusers).
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gesso import config, nets
from gesso.cond import Cond
from gesso.config import Inputs
from gesso.nets import mp

HEAVY = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


class Record(TorchDispatchMode):
    """Remember every matrix product, convolution and attention with its arguments' shapes."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in HEAVY or name.startswith("_scaled_dot_product"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def step_of(module: nn.Module, forward: Callable[[], Tensor], dtype: torch.dtype, after: Callable[[], None]):
    """One training step: forward, backward, fused Adam, and what the network needs after it."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-6, fused=True)
    device = next(module.parameters()).device.type

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = forward().float().square().mean()
        loss.backward()
        optimizer.step()
        after()

    return step


def floor_of(step: Callable[[], None]) -> Callable[[], None]:
    """The heavy calls of one step, to be replayed without anything between them."""
    with Record() as record:
        step()
    calls = [(f, [a.detach() if isinstance(a, Tensor) else a for a in args], kw) for f, args, kw in record.calls]

    def replay() -> None:
        with torch.no_grad():
            for function, args, kwargs in calls:
                function(*args, **kwargs)

    return replay


def ours(cfg, inputs: Inputs, x: Tensor, cond: Cond, compiled: bool, dtype: torch.dtype):
    """Our network's training step, with projection onto the sphere where it has one."""
    net = nets.build(cfg, inputs).to(x.device)
    sphere = mp.sphere_weights(net)
    forward = torch.compile(net) if compiled else net
    progress = torch.rand(len(x), device=x.device)

    def after() -> None:
        if sphere:
            mp.project_gradients(sphere)
            mp.put_on_sphere(sphere)

    return step_of(net, lambda: forward(x, 1000 * progress, progress, cond), dtype, after)


def theirs(model: nn.Module, call: Callable[[nn.Module], Tensor], compiled: bool, dtype: torch.dtype):
    forward = torch.compile(model) if compiled else model
    return step_of(model, lambda: call(forward), dtype, lambda: None)


def case_dit(batch: int, device: str, compiled: bool, dtype: torch.dtype):
    from diffusers import DiTTransformer2DModel

    cfg, inputs = config.DiT(width=384, depth=12, heads=6, patch=2), Inputs(4, 32, 1000)
    x, label = torch.randn(batch, 4, 32, 32, device=device), torch.arange(batch, device=device)
    peer = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000, norm_eps=1e-6,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, timestep=t, class_labels=label).sample  # noqa: E731
    return ours(cfg, inputs, x, Cond(label=label), compiled, dtype), theirs(peer, call, compiled, dtype)


def case_pixart(batch: int, device: str, compiled: bool, dtype: torch.dtype):
    from diffusers import PixArtTransformer2DModel

    cfg, inputs = config.PixArt(width=384, depth=12, heads=6, patch=2), Inputs(4, 32, text_width=768)
    x, text = torch.randn(batch, 4, 32, 32, device=device), torch.randn(batch, 77, 768, device=device)
    peer = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12, sample_size=32,
        patch_size=2, cross_attention_dim=384, caption_channels=768, norm_eps=1e-6, use_additional_conditions=False,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    added = {"resolution": None, "aspect_ratio": None}
    call = lambda m: m(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=added).sample  # noqa: E731
    return ours(cfg, inputs, x, Cond(text=text), compiled, dtype), theirs(peer, call, compiled, dtype)


def case_mmdit(batch: int, device: str, compiled: bool, dtype: torch.dtype):
    from diffusers import SD3Transformer2DModel

    cfg = config.MMDiT(width=384, depth=12, heads=6, patch=2, text_weights="all", qk_norm=False)
    x, text = torch.randn(batch, 4, 32, 32, device=device), torch.randn(batch, 77, 768, device=device)
    pooled = torch.randn(batch, 768, device=device)
    peer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=12, attention_head_dim=64, num_attention_heads=6,
        joint_attention_dim=768, caption_projection_dim=384, pooled_projection_dim=768, out_channels=4, pos_embed_max_size=16,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample  # noqa: E731
    mine = ours(cfg, Inputs(4, 32, 0, 768, 768), x, Cond(text=text, pooled=pooled), compiled, dtype)
    return mine, theirs(peer, call, compiled, dtype)


def case_unet(batch: int, device: str, compiled: bool, dtype: torch.dtype):
    from diffusers import UNet2DConditionModel

    cfg = config.UNet(channels=96, multipliers=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), head_width=48)
    x, text = torch.randn(batch, 4, 32, 32, device=device), torch.randn(batch, 77, 768, device=device)
    peer = UNet2DConditionModel(
        sample_size=32, block_out_channels=(96, 192, 384, 384), cross_attention_dim=768, attention_head_dim=(2, 4, 8, 8),
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, t, encoder_hidden_states=text).sample  # noqa: E731
    mine = ours(cfg, Inputs(4, 32, text_width=768), x, Cond(text=text), compiled, dtype)
    return mine, theirs(peer, call, compiled, dtype)


class InForward(mp.MPWeight):
    """What EDM2 publishes: every weight normalized inside the forward pass, and forced before it (Algorithm 1)."""

    def scaled(self, gain, dtype):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(mp.normalized(self.weight))
        return (mp.normalized(self.weight) * (gain * self.scale)).to(dtype)


def case_edm2(batch: int, device: str, compiled: bool, dtype: torch.dtype):
    cfg, inputs = config.edm2("XS"), Inputs(4, 64, 1000)
    x, label = torch.randn(batch, 4, 64, 64, device=device), torch.arange(batch, device=device)
    peer = nets.build(cfg, inputs).to(device)
    for module in peer.modules():
        if isinstance(module, mp.MPWeight):
            module.scaled = InForward.scaled.__get__(module)
    progress = torch.rand(batch, device=device)
    call = lambda m: m(x, progress, progress, Cond(label=label))  # noqa: E731
    return ours(cfg, inputs, x, Cond(label=label), compiled, dtype), theirs(peer, call, compiled, dtype)


CASES = {"dit": case_dit, "pixart": case_pixart, "mmdit": case_mmdit, "unet": case_unet, "edm2": case_edm2}


def seconds(function: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in options.cases:
        torch.manual_seed(0)
        mine, peer = CASES[name](options.batch, options.device, options.compile, getattr(torch, options.dtype))
        contestants = {"ours": mine, "peer": peer, "floor": floor_of(mine)}
        times: dict[str, list[float]] = {key: [] for key in contestants}
        for round_ in range(options.rounds + 2):  # the first two warm up
            for key, function in contestants.items():
                elapsed = seconds(function, options.device)
                if round_ >= 2:
                    times[key].append(elapsed)
        median = {key: statistics.median(values) for key, values in times.items()}
        row = {
            "case": name, "batch": options.batch, "compiled": options.compile, "device": options.device, "dtype": options.dtype,
            "peer/ours": round(median["peer"] / median["ours"], 3), "ours/floor": round(median["ours"] / median["floor"], 3),
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    if options.out:
        options.out.write_text(
            json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
