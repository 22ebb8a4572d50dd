"""Pickles with the structure of NVlabs/edm2's snapshots, written without that code.

A persistent object is reduced to a call of torch_utils.persistence._reconstruct_persistent_obj with a dict: kind,
version, source code of the module, name of the class, state. Modules of torch in it are pickled by name.
"""

import io
import pickle
import sys
import types

import torch
from torch import Tensor, nn


def _reconstruct_persistent_obj(meta: dict) -> object:
    raise AssertionError("gesso called a function of a pickle")


class EasyDict(dict):
    """Dict that the snapshots are."""


class Persistent(nn.Module):
    """Module that is pickled as a persistent object."""

    label = "Precond"

    def __reduce__(self):
        state = self.__dict__ | {"_init_args": (), "_init_kwargs": EasyDict(img_resolution=16)}
        source = "raise SystemExit('gesso ran the source code of a pickle')"
        meta = dict(type="class", version=6, module_src=source, class_name=self.label, state=state)
        return _reconstruct_persistent_obj, (meta,), None


for path, content in {
    "torch_utils": {}, "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    "dnnlib": {}, "dnnlib.util": {"EasyDict": EasyDict},
}.items():  # fmt: skip
    module = types.ModuleType(path)
    module.__dict__.update(content)
    for value in content.values():
        value.__module__ = path
    sys.modules[path] = module


def nest(state: dict[str, Tensor]) -> nn.Module:
    """Return modules that have this state dict: parameters, and buffers for constants."""
    root = Persistent()
    for name, tensor in state.items():
        *path, last = name.split(".")
        place = root
        for i, part in enumerate(path):
            if part not in place._modules:
                inner = nn.ModuleDict() if i == 1 and path[0] == "unet" and part in ("enc", "dec") else Persistent()
                place._modules[part] = inner
            place = place._modules[part]
        if last in ("freqs", "phases"):
            place.register_buffer(last, tensor.clone())
        else:
            place.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
    return root


def snapshot_bytes(state: dict[str, Tensor], protocol: int = 4) -> bytes:
    """Return the pickle of a training snapshot with these weights."""
    net = nest(state)
    net.register_buffer("cache", torch.zeros(3), persistent=False)
    encoder, loss = Persistent(), Persistent()
    encoder.label, loss.label = "StabilityVAEEncoder", "EDM2Loss"
    data = EasyDict(dataset_kwargs=EasyDict(path="x.zip", use_labels=True), encoder=encoder, loss_fn=loss, ema=net)
    file = io.BytesIO()
    pickle.dump(data, file, protocol=protocol)
    return file.getvalue()
