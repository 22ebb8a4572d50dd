"""Compare the speed of networks with other implementations, as ratios of medians, interleaved in one process.

    python benchmarks/networks.py [--cases dit pixart mmdit unet edm2] [--sample] [--compile] [--batch 4] [--rounds 9]
                                  [--size S] [--device cuda] [--dtype bfloat16] [--out FILE.json]

A training step is forward, backward and optimizer step at equal widths, depths and numerics; with --sample, the forward
pass of a network prepared for sampling is timed instead. `floor` is the time of its matrix products, convolutions and
attention alone, recorded and replayed. The peers are diffusers' classes (extra `vae`) and, for EDM2, the reference of
the tests, which normalizes its weights in forward. Absolute times depend on the machine; compare ratios only.
"""

import argparse
import importlib.util
import json
import statistics
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
from gesso.models.flops import training_macs


class Size(NamedTuple):
    """Width, depth and heads of the transformers, width of the U-Net, resolution of latents, and EDM2."""

    hidden_size: int
    depth: int
    num_heads: int
    unet_channels: int
    resolution: int
    edm2: config.EDM2Config


TINY_EDM2 = config.EDM2Config(
    channels=16, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,), channels_per_head=16
)
SIZES = {
    "tiny": Size(32, 1, 2, 16, 8, TINY_EDM2),
    "S": Size(384, 12, 6, 96, 32, config.edm2_config("XS")),
    "XL": Size(1152, 28, 16, 320, 32, config.edm2_config("S")),
}
"""Sizes of the compared networks: of tests, DiT-S/2 and EDM2-XS, DiT-XL/2 and EDM2-S."""
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
    macs: int = 0
    """Multiply-accumulates of the forward pass of one sample."""

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

    macs = training_macs(cfg, inputs)
    return Candidate(net, lambda: forward(x, 1000 * progress, progress, cond), after_step, macs)


def peer_candidate(model: nn.Module, call: Callable[[nn.Module], Tensor], options: argparse.Namespace) -> Candidate:
    """Return another implementation, called by `call`."""
    forward = torch.compile(model) if options.compile else model
    return Candidate(model, lambda: call(forward))


def transformer_settings(size: Size) -> dict[str, int]:
    """Return the settings of a transformer with patches of 2."""
    return dict(hidden_size=size.hidden_size, depth=size.depth, num_heads=size.num_heads, patch_size=2)


def latents(batch: int, size: Size, device: str) -> Tensor:
    """Return random latents (batch, 4, H, W)."""
    return torch.randn(batch, 4, size.resolution, size.resolution, device=device)


def case_dit(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return DiT with classes, of gesso and of its peer."""
    from diffusers import DiTTransformer2DModel

    size = SIZES[options.size]
    cfg = config.DiTConfig(**transformer_settings(size))
    inputs = InputSpec(4, size.resolution, 1000)
    x, label = latents(batch, size, device), torch.arange(batch, device=device)
    peer = DiTTransformer2DModel(
        num_attention_heads=size.num_heads, attention_head_dim=size.hidden_size // size.num_heads, in_channels=4,
        out_channels=4, num_layers=size.depth, sample_size=size.resolution, patch_size=2,
        num_embeds_ada_norm=1000, norm_eps=1e-6,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, timestep=t, class_labels=label).sample  # noqa: E731
    return gesso_candidate(cfg, inputs, x, Cond(label=label), options), peer_candidate(peer, call, options)


def case_pixart(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return PixArt-alpha, of gesso and of its peer."""
    from diffusers import PixArtTransformer2DModel

    size = SIZES[options.size]
    cfg = config.PixArtConfig(**transformer_settings(size))
    inputs = InputSpec(4, size.resolution, text_dim=768)
    x, text = latents(batch, size, device), torch.randn(batch, 77, 768, device=device)
    peer = PixArtTransformer2DModel(
        num_attention_heads=size.num_heads, attention_head_dim=size.hidden_size // size.num_heads, in_channels=4,
        out_channels=4, num_layers=size.depth, sample_size=size.resolution, patch_size=2,
        cross_attention_dim=size.hidden_size, caption_channels=768, norm_eps=1e-6, use_additional_conditions=False,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    added = {"resolution": None, "aspect_ratio": None}
    call = lambda m: m(x, encoder_hidden_states=text, timestep=t, added_cond_kwargs=added).sample  # noqa: E731
    return gesso_candidate(cfg, inputs, x, Cond(text=text), options), peer_candidate(peer, call, options)


def case_mmdit(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return SD3's mmDiT, of gesso and of its peer."""
    from diffusers import SD3Transformer2DModel

    size = SIZES[options.size]
    cfg = config.MMDiTConfig(**transformer_settings(size), separate_text_weights="all", qk_norm=False)
    inputs = InputSpec(4, size.resolution, text_dim=768, pooled_dim=768)
    x, text = latents(batch, size, device), torch.randn(batch, 77, 768, device=device)
    pooled = torch.randn(batch, 768, device=device)
    peer = SD3Transformer2DModel(
        sample_size=size.resolution, patch_size=2, in_channels=4, num_layers=size.depth,
        attention_head_dim=size.hidden_size // size.num_heads, num_attention_heads=size.num_heads,
        joint_attention_dim=768, caption_projection_dim=size.hidden_size, pooled_projection_dim=768, out_channels=4,
        pos_embed_max_size=size.resolution // 2,
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample  # noqa: E731
    gesso = gesso_candidate(cfg, inputs, x, Cond(text=text, pooled=pooled), options)
    return gesso, peer_candidate(peer, call, options)


def case_unet(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return a U-Net of SD's design, of gesso and of its peer."""
    from diffusers import UNet2DConditionModel

    size, c = SIZES[options.size], SIZES[options.size].unet_channels
    cfg = config.UNetConfig(
        channels=c, channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), channels_per_head=c // 2,
        norm_num_groups=min(32, c),
    )  # fmt: skip
    inputs = InputSpec(4, size.resolution, text_dim=768)
    x, text = latents(batch, size, device), torch.randn(batch, 77, 768, device=device)
    peer = UNet2DConditionModel(
        sample_size=size.resolution, block_out_channels=(c, 2 * c, 4 * c, 4 * c), cross_attention_dim=768,
        attention_head_dim=(2, 4, 8, 8), norm_num_groups=min(32, c),
    ).to(device)  # fmt: skip
    t = torch.randint(0, 1000, (batch,), device=device)
    call = lambda m: m(x, t, encoder_hidden_states=text).sample  # noqa: E731
    gesso = gesso_candidate(cfg, inputs, x, Cond(text=text), options)
    return gesso, peer_candidate(peer, call, options)


def reference_edm2_forward(net: nn.Module, cfg: config.EDM2Config) -> Callable[..., Tensor]:
    """Return the forward pass of the tests' reference with the parameters of `net` and torch's convolution."""
    path = Path(__file__).parents[1] / "tests" / "helpers" / "reference_edm2.py"
    spec = importlib.util.spec_from_file_location("reference_with_other_convolution", path)
    assert spec and spec.loader
    reference_edm2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference_edm2)

    def conv(x: Tensor, w: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.conv2d(x, reference_edm2.unit_rows(w) * gain, padding=w.shape[-1] // 2)

    reference_edm2.conv = conv
    weights, sphere = dict(net.named_parameters()) | dict(net.named_buffers()), mp.sphere_weights(net)

    def forward(x: Tensor, c_noise: Tensor, one_hot: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            mp.normalize_weights_(sphere)  # forced normalization, EDM2 Algorithm 1
        return reference_edm2.forward(
            weights, x, c_noise, one_hot, levels=len(cfg.channel_mult), blocks=cfg.num_blocks,
            head_width=cfg.channels_per_head,
        )  # fmt: skip

    return forward


def case_edm2(batch: int, device: str, options: argparse.Namespace) -> tuple[Candidate, Candidate]:
    """Return EDM2 at twice the resolution of the other latents, of gesso and of its peer."""
    size, cfg = SIZES[options.size], SIZES[options.size].edm2
    inputs = InputSpec(4, 2 * size.resolution, 1000)
    x = torch.randn(batch, 4, 2 * size.resolution, 2 * size.resolution, device=device)
    label = torch.arange(batch, device=device)
    one_hot, progress = F.one_hot(label, 1000).to(x), torch.rand(batch, device=device)
    peer = models.build_network(cfg, inputs).to(device)
    forward = reference_edm2_forward(peer, cfg)
    forward = torch.compile(forward) if options.compile else forward
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


def measure_case(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Return the ratios of a case, and images/s and model FLOPs/s of gesso, from medians of interleaved calls."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    candidates = CASES[name](options.batch, options.device, options)
    gesso, peer = (c.sampling_step(dtype) if options.sample else c.training_step(dtype) for c in candidates)
    functions = {"gesso": gesso, "peer": peer, "floor": replay_matmuls(gesso)}
    times: dict[str, list[float]] = {key: [] for key in functions}
    for round_ in range(options.rounds + 2):  # the first two warm up
        for key, function in functions.items():
            elapsed = seconds(function, options.device)
            if round_ >= 2:
                times[key].append(elapsed)
    median = {key: statistics.median(values) for key, values in times.items()}
    images_per_second = options.batch / median["gesso"]
    return {
        "case": name, "size": options.size, "measured": "forward" if options.sample else "training step",
        "batch": options.batch, "compiled": options.compile, "device": options.device, "dtype": options.dtype,
        "peer/gesso": round(median["peer"] / median["gesso"], 3),
        "gesso/floor": round(median["gesso"] / median["floor"], 3),
        "images/s": round(images_per_second, 2),
        "model TFLOPs/s": float(f"{(2 if options.sample else 6) * candidates[0].macs * images_per_second / 1e12:.4g}"),
    }  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a measurement to a parser."""
    parser.add_argument("--size", default="S", choices=list(SIZES))
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")


def main() -> None:
    """Time every case, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    add_options(parser)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in options.cases:
        rows.append(measure_case(name, options))
        print(rows[-1], flush=True)
    if options.out:
        options.out.write_text(
            json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
