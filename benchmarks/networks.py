"""Compare the speed of networks with other implementations, as ratios of medians, interleaved in one process.

    python benchmarks/networks.py [--cases dit pixart mmdit unet edm2] [--sample] [--compile] [--batch 4] [--rounds 9]
                                  [--device cuda] [--dtype bfloat16] [--out FILE.json]

A training step is forward, backward and optimizer step at equal widths, depths and numerics; with --sample, the forward
pass of a network prepared for sampling is timed instead. `floor` is the time of its matrix products, convolutions and
attention alone, recorded and replayed. The peers are diffusers' classes (extra `vae`) and, for EDM2, the reference of
the tests, which normalizes its weights in forward. Absolute times depend on the machine; compare ratios only.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gesso import config, models
from gesso.conditioning import Cond
from gesso.config import InputSpec
from gesso.models import mp

MATMUL_OPS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


class RecordCalls(TorchDispatchMode):
    """Record every matrix product, convolution and attention with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in MATMUL_OPS or name.startswith("_scaled_dot_product"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Candidate(NamedTuple):
    """A network, its forward pass, and a function that its training step calls after the optimizer."""

    net: nn.Module
    forward: Callable[[], Tensor]
    after_step: Callable[[], None] = lambda: None

    def training_step(self, dtype: torch.dtype) -> Callable[[], None]:
        """Return a training step: forward, backward, fused Adam and after_step."""
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-6, fused=True)
        device = next(self.net.parameters()).device.type

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = self.forward().float().square().mean()
            loss.backward()
            optimizer.step()
            self.after_step()

        return step

    def sampling_step(self, dtype: torch.dtype) -> Callable[[], None]:
        """Return a forward pass for sampling."""
        self.net.eval().requires_grad_(False)
        device = next(self.net.parameters()).device.type

        def forward() -> None:
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                self.forward()

        return forward


def replay_matmuls(run_step: Callable[[], None]) -> Callable[[], None]:
    """Return a function that repeats only the matrix products, convolutions and attention of a step."""
    with RecordCalls() as record:
        run_step()
    calls = [(f, [a.detach() if isinstance(a, Tensor) else a for a in args], kw) for f, args, kw in record.calls]

    def replay() -> None:
        with torch.no_grad():
            for function, args, kwargs in calls:
                function(*args, **kwargs)

    return replay


def gesso_candidate(cfg, inputs: InputSpec, x: Tensor, cond: Cond, options: argparse.Namespace) -> Candidate:
    """Return the network of gesso, with weight normalization where it has one; for sampling, constants are folded."""
    net = models.build_network(cfg, inputs).to(x.device)
    sphere = mp.sphere_weights(net)
    if options.sample:
        mp.fold_gains_(net)
    forward = torch.compile(net) if options.compile else net
    progress = torch.rand(len(x), device=x.device)

    def after_step() -> None:
        if sphere:
            mp.project_gradients(sphere)
            mp.normalize_weights_(sphere)

    return Candidate(net, lambda: forward(x, 1000 * progress, progress, cond), after_step)


def peer_candidate(model: nn.Module, call: Callable[[nn.Module], Tensor], options: argparse.Namespace) -> Candidate:
    """Return another implementation, called by `call`."""
    forward = torch.compile(model) if options.compile else model
    return Candidate(model, lambda: call(forward))


def case_dit(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return DiT-S/2 with classes, of gesso and of its peer."""
    from diffusers import DiTTransformer2DModel

    cfg, inputs = config.DiTConfig(hidden_size=384, depth=12, num_heads=6, patch_size=2), InputSpec(4, 32, 1000)
    x, label = torch.randn(batch, 4, 32, 32, device=device), torch.arange(batch, device=device)
    peer = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000, norm_eps=1e-6,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, timestep=t, class_labels=label).sample  # noqa: E731
    return gesso_candidate(cfg, inputs, x, Cond(label=label), options), peer_candidate(peer, call, options)


def case_pixart(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return PixArt-alpha of the width of DiT-S, of gesso and of its peer."""
    from diffusers import PixArtTransformer2DModel

    cfg, inputs = (
        config.PixArtConfig(hidden_size=384, depth=12, num_heads=6, patch_size=2),
        InputSpec(4, 32, text_dim=768),
    )
    x, text = torch.randn(batch, 4, 32, 32, device=device), torch.randn(batch, 77, 768, device=device)
    peer = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=12, sample_size=32,
        patch_size=2, cross_attention_dim=384, caption_channels=768, norm_eps=1e-6, use_additional_conditions=False,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    added = {"resolution": None, "aspect_ratio": None}
    call = lambda m: m(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=added).sample  # noqa: E731
    return gesso_candidate(cfg, inputs, x, Cond(text=text), options), peer_candidate(peer, call, options)


def case_mmdit(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return SD3's mmDiT of the width of DiT-S, of gesso and of its peer."""
    from diffusers import SD3Transformer2DModel

    cfg = config.MMDiTConfig(
        hidden_size=384, depth=12, num_heads=6, patch_size=2, separate_text_weights="all", qk_norm=False
    )
    x, text = torch.randn(batch, 4, 32, 32, device=device), torch.randn(batch, 77, 768, device=device)
    pooled = torch.randn(batch, 768, device=device)
    peer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=12, attention_head_dim=64, num_attention_heads=6,
        joint_attention_dim=768, caption_projection_dim=384, pooled_projection_dim=768, out_channels=4,
        pos_embed_max_size=16,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample  # noqa: E731
    gesso = gesso_candidate(cfg, InputSpec(4, 32, 0, 768, 768), x, Cond(text=text, pooled=pooled), options)
    return gesso, peer_candidate(peer, call, options)


def case_unet(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return a small U-Net of SD's design, of gesso and of its peer."""
    from diffusers import UNet2DConditionModel

    cfg = config.UNetConfig(
        channels=96, channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), channels_per_head=48
    )
    x, text = torch.randn(batch, 4, 32, 32, device=device), torch.randn(batch, 77, 768, device=device)
    peer = UNet2DConditionModel(
        sample_size=32, block_out_channels=(96, 192, 384, 384), cross_attention_dim=768,
        attention_head_dim=(2, 4, 8, 8),
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, t, encoder_hidden_states=text).sample  # noqa: E731
    gesso = gesso_candidate(cfg, InputSpec(4, 32, text_dim=768), x, Cond(text=text), options)
    return gesso, peer_candidate(peer, call, options)


def reference_edm2_forward(net: nn.Module) -> Callable[..., Tensor]:
    """Return the forward pass of the tests' reference with the parameters of `net` and torch's convolution."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from helpers import reference_edm2

    def conv(x: Tensor, w: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.conv2d(x, reference_edm2.unit_rows(w) * gain, padding=w.shape[-1] // 2)

    reference_edm2.conv = conv
    weights, sphere = dict(net.named_parameters()) | dict(net.named_buffers()), mp.sphere_weights(net)

    def forward(x: Tensor, c_noise: Tensor, one_hot: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            mp.normalize_weights_(sphere)  # forced normalization, EDM2 Algorithm 1
        return reference_edm2.forward(weights, x, c_noise, one_hot, levels=4, blocks=3, head_width=64)

    return forward


def case_edm2(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return EDM2-XS at the latents of 512 pixels, of gesso and of its peer."""
    cfg, inputs = config.edm2_config("XS"), InputSpec(4, 64, 1000)
    x, label = torch.randn(batch, 4, 64, 64, device=device), torch.arange(batch, device=device)
    one_hot, progress = F.one_hot(label, 1000).to(x), torch.rand(batch, device=device)
    peer = models.build_network(cfg, inputs).to(device)
    forward = torch.compile(reference_edm2_forward(peer)) if options.compile else reference_edm2_forward(peer)
    return gesso_candidate(cfg, inputs, x, Cond(label=label), options), Candidate(
        peer, lambda: forward(x, progress, one_hot)
    )


CASES = {"dit": case_dit, "pixart": case_pixart, "mmdit": case_mmdit, "unet": case_unet, "edm2": case_edm2}


def seconds(function: Callable[[], None], device: str) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Time every case, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--sample", action="store_true")
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
        dtype = getattr(torch, options.dtype)
        gesso, peer = (
            candidate.sampling_step(dtype) if options.sample else candidate.training_step(dtype)
            for candidate in CASES[name](options.batch, options.device, options)
        )
        functions = {"gesso": gesso, "peer": peer, "floor": replay_matmuls(gesso)}
        times: dict[str, list[float]] = {key: [] for key in functions}
        for round_ in range(options.rounds + 2):  # the first two warm up
            for key, function in functions.items():
                elapsed = seconds(function, options.device)
                if round_ >= 2:
                    times[key].append(elapsed)
        median = {key: statistics.median(values) for key, values in times.items()}
        row = {
            "case": name, "measured": "forward" if options.sample else "training step",
            "batch": options.batch, "compiled": options.compile, "device": options.device, "dtype": options.dtype,
            "peer/gesso": round(median["peer"] / median["gesso"], 3),
            "gesso/floor": round(median["gesso"] / median["floor"], 3),
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    if options.out:
        options.out.write_text(
            json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
