"""Public weight files of feature networks: their addresses, downloads and checksums."""

import hashlib
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gesso.errors import RunError, UsageError

Network = TypeVar("Network", bound=torch.nn.Module)


class WeightFile(NamedTuple):
    """A public file. sha256: hash of its content, or the first digits of it if no more are published."""

    name: str
    url: str
    sha256: str


_INCEPTION = WeightFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
)
INCEPTION_FILES = {
    "torch-fidelity": _INCEPTION,
    "pytorch-fid": _INCEPTION,
    "nvidia": WeightFile(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
}
"""Inception by implementation: the first two share a file and resize differently, the third is a TorchScript."""
ALEXNET = WeightFile(
    "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"
)  # fmt: skip
VGG16 = WeightFile("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
_LPIPS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/"
LPIPS_ALEX = WeightFile(
    "lpips-alex.pth", _LPIPS + "alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
)
LPIPS_VGG = WeightFile(
    "lpips-vgg.pth", _LPIPS + "vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
)


def local_path(file: WeightFile, weights_dir: Path | None = None) -> Path:
    """Return the path of a file in a folder, by default PyTorch's cache; it may not exist."""
    return (weights_dir or Path(torch.hub.get_dir()) / "checkpoints") / file.name


def verified_path(file: WeightFile, weights_dir: Path | None = None) -> Path:
    """Return the path of a file in a folder; by default in PyTorch's cache, to which it is downloaded once.

    Raises:
        UsageError: The file is missing; the error has its address.
        RunError: The file has another content.
    """
    path = local_path(file, weights_dir)
    if not path.is_file():
        _download(file, path, allow_download=weights_dir is None)
    if not (actual := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(file.sha256):
        raise RunError(
            f"{path} is not the public file: its sha256 is {actual[:16]}..., that of {file.url} begins with "
            f"{file.sha256[:16]}; delete the file"
        )
    return path


def load_tensors(file: WeightFile, weights_dir: Path | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Raises as `verified_path`, and RunError if the file is damaged."""
    path = verified_path(file, weights_dir)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types
        raise RunError(f"{path} cannot be read: {type(error).__name__}") from None


def _download(file: WeightFile, path: Path, allow_download: bool) -> None:
    reason = "it is missing"
    if allow_download:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256, progress=False)
            return
        except Exception as error:  # network, disk or checksum
            reason = f"the download failed ({type(error).__name__})"
    raise UsageError(f"this needs {file.name}, but {reason}: download {file.url}\nto {path}")


def load_into(network: Network, tensors: dict[str, Tensor], label: str) -> Network:
    """Return a network with these tensors, frozen. Raises RunError for a missing tensor or another shape."""
    state = network.state_dict()
    missing = sorted(state.keys() - tensors.keys())
    mismatched = sorted(k for k in state.keys() & tensors.keys() if state[k].shape != tensors[k].shape)
    if missing or mismatched:
        raise RunError(f"{label} is not a file of this network: missing {missing[:3]}, other shapes {mismatched[:3]}")
    network.load_state_dict({name: tensors[name].float() for name in state})
    return network.eval().requires_grad_(False)
