"""Read and write safetensors files tensor by tensor, mapped into memory."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gesso import atomic_io
from gesso.errors import RunError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """Tensors of one file. Raises RunError if it is not a complete safetensors file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size, length = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
                header = json.loads(file.read(min(size, length)))
            self.metadata = header.pop("__metadata__", {})
            self._meta = {
                k: torch.empty(v["shape"], dtype=DTYPES[v["dtype"]], device="meta") for k, v in header.items()
            }
            places = {k: [8 + size + offset for offset in v["data_offsets"]] for k, v in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is damaged or no safetensors file ({error}); remove it to do without it") from None
        if length != max((end for _, end in places.values()), default=8 + size):
            raise RunError(f"{path} is damaged: it ends before its tensors do; remove it to do without it")
        content = torch.from_file(str(path), shared=False, size=length, dtype=torch.uint8)
        self._flat = {k: _view_as(content[start:end], self._meta[k].dtype) for k, (start, end) in places.items()}

    def keys(self) -> list[str]:
        """Return the tensor names."""
        return list(self._meta)

    def meta_tensor(self, name: str) -> Tensor:
        """Return the shape and dtype of a tensor as a meta tensor."""
        return self._meta[name]

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values start to stop of the flattened tensor."""
        return self._flat[name][start:stop]

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        return self._flat[name].view(self._meta[name].shape).clone()


def _view_as(content: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes as numbers; copied if they are not aligned, as some writers leave them."""
    return (content if content.storage_offset() % dtype.itemsize == 0 else content.clone()).view(dtype)


@contextlib.contextmanager
def stream_writer(
    path: Path, meta_tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield put(name, tensor), to be called once for each tensor in any order; the file is complete or absent."""
    header: dict[str, object] = {"__metadata__": metadata}
    places, at = {}, 0
    # The largest numbers first, as safetensors does: each tensor is aligned.
    for name in sorted(meta_tensors, key=lambda name: (-meta_tensors[name].itemsize, name)):
        like = meta_tensors[name]
        places[name], end = at, at + math.prod(like.shape) * like.itemsize
        header[name] = {"dtype": DTYPE_NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_io.atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)

        def put(name: str, tensor: Tensor) -> None:
            assert tensor.shape == meta_tensors[name].shape and tensor.dtype == meta_tensors[name].dtype, name
            file.seek(8 + len(text) + places.pop(name))
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

        yield put
        assert not places, f"not written: {list(places)}"
