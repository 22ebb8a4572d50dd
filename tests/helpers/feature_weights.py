"""Small random weights of feature networks, in the format of the public files."""

import hashlib
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch

from gesso.evaluation.networks import inception, lpips
from gesso.evaluation.networks.downloads import WeightFile


def named_randn(name: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    """Return normal numbers that depend only on the name."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def inception_state() -> dict[str, torch.Tensor]:
    """Return random weights in the format of the public Inception file, with separate batch normalization."""
    state = {}
    for name, layer in inception.Inception().named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            shape, n = layer.weight.shape, layer.out_channels
            state[f"{name}.conv.weight"] = named_randn(name, shape, (2 / shape[1:].numel()) ** 0.5)
            state[f"{name}.bn.weight"] = 1 + named_randn(name + "w", (n,)).tanh() / 2
            state[f"{name}.bn.bias"] = named_randn(name + "b", (n,), 0.2)
            state[f"{name}.bn.running_mean"] = named_randn(name + "m", (n,), 0.1)
            state[f"{name}.bn.running_var"] = 1 + named_randn(name + "v", (n,)).tanh() / 2
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return state | {"fc.weight": named_randn("fc", (1008, 2048), 0.02), "fc.bias": named_randn("fb", (1008,))}


def random_images(height: int, width: int, n: int = 2) -> torch.Tensor:
    """Return uint8 noise images (n, 3, height, width)."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, height, width), dtype=np.uint8))


def write_weights(tensors: dict[str, torch.Tensor], folder: Path, name: str) -> WeightFile:
    """Write tensors as a weight file; return its entry with the checksum."""
    torch.save(tensors, folder / name)
    return WeightFile(name, f"https://example.org/{name}", hashlib.sha256((folder / name).read_bytes()).hexdigest()[:8])


class ScriptedInception(torch.nn.Module):
    """Small network with the call signature of NVIDIA's TorchScript Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 2048, 4, stride=4)
        self.output = torch.nn.Linear(2048, 1008)

    def forward(
        self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        features = self.stem((img.float() - 127.5) / 127.5).relu().mean(dim=(2, 3))
        if return_features:
            return features
        logits = torch.nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(dim=1)


def write_scripted_inception(folder: Path) -> WeightFile:
    """Write ScriptedInception by torch.jit; return its entry with the checksum."""
    path = folder / "detector.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # writing scripts is deprecated
        torch.jit.save(torch.jit.script(ScriptedInception()), str(path))
    return WeightFile("detector.pt", "https://example.org/detector.pt", hashlib.sha256(path.read_bytes()).hexdigest())


def lpips_states(name: str) -> tuple[dict, dict]:
    """Return random trunk and heads in the format of the public LPIPS files, with an unused tensor in the trunk."""
    net = lpips.LPIPS(lpips.BACKBONES[name][0], name)
    trunk = {
        f"features.{k}": named_randn(k, v.shape, (2 / v[0].numel()) ** 0.5 if v.ndim > 1 else 0.1)
        for k, v in net.features.state_dict().items()
    }
    heads = {
        f"lin{k.split('.')[0]}.model.1.weight": named_randn(k, v.shape).abs() for k, v in net.heads.state_dict().items()
    }
    return trunk | {"classifier.1.weight": torch.zeros(3)}, heads
