"""Public weight files of feature networks: where they come from, and whether a file is the one that numbers are named after."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gesso.errors import RunError, UsageError


class WeightFile(NamedTuple):
    """A file that its publishers never change. sha256: of its content, or the first digits of it where no more is published."""

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
"""by whose implementation it is; the first two read one file and resize differently, the third is a TorchScript"""
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
    """Where a file is, or would be: in `folder`; where none is said, in torch's own cache."""
    return (weights_dir or Path(torch.hub.get_dir()) / "checkpoints") / file.name


def verified_path(file: WeightFile, weights_dir: Path | None = None) -> Path:
    """A public file in `folder`; where none is said, in torch's own cache, fetched once.

    Raises UsageError that says which file, from where and where to put it when it is missing, RunError when it is not the
    public one.
    """
    path = local_path(file, weights_dir)
    if not path.is_file():
        _download(file, path, allow_download=weights_dir is None)
    if not (found := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(file.sha256):
        raise RunError(
            f"{path} is not the file that numbers are named after: its sha256 is {found[:16]}..., that of {file.url} "
            f"begins with {file.sha256[:16]}; remove it"
        )
    return path


def load_tensors(file: WeightFile, weights_dir: Path | None = None) -> dict[str, Tensor]:
    """Its named tensors. Raises as `checked`, and RunError when it is damaged."""
    path = verified_path(file, weights_dir)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler finds
        raise RunError(f"{path} cannot be read: {type(error).__name__}") from None


def _download(file: WeightFile, path: Path, allow_download: bool) -> None:
    why = "it is not there"
    if allow_download:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256, progress=False)
            return
        except Exception as error:  # of the network, of the disk, of another content
            why = f"it could not be fetched ({type(error).__name__})"
    raise UsageError(f"this needs {file.name}, and {why}: download {file.url}\nto {path}")


def load_into(network: torch.nn.Module, tensors: dict[str, Tensor], label: str) -> torch.nn.Module:
    """`network` with these tensors, frozen. Raises RunError that names what is missing or of another shape."""
    own = network.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    other = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    if missing or other:
        raise RunError(f"{label} does not hold this network: it lacks {missing[:3]}, of another shape are {other[:3]}")
    network.load_state_dict({name: tensors[name].float() for name in own})
    return network.eval().requires_grad_(False)
