"""Read and write safetensors files: tensors are mapped into memory, and files are complete or absent."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gesso import atomic_io
from gesso.errors import RunError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged or not a safetensors file ({error}): restore it, or move it away") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, mapped into memory: a value is read from disk when it is first used.

    Changes of the tensors do not reach the file.

    Raises:
        RunError: It is not a complete safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a file; errors as for `read_tensors`."""
    with _opened(path) as file:
        return file.metadata() or {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file atomically. Several entries of metadata are written in no fixed order."""
    with atomic_io.atomic_file(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)


@contextlib.contextmanager
def stream_writer(
    path: Path, like: Mapping[str, Tensor], metadata: dict[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield put(name, tensor), to be called once for each tensor in any order; the file is written atomically.

    Args:
        path: The file.
        like: Tensors with the names, shapes and dtypes of those to write.
        metadata: Metadata of the file.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    starts, offset = {}, 0
    # The largest numbers first, as safetensors does: each tensor is aligned.
    for name in sorted(like, key=lambda name: (-like[name].itemsize, name)):
        tensor = like[name]
        starts[name], end = offset, offset + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_io.atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)

        def put(name: str, tensor: Tensor) -> None:
            assert tensor.shape == like[name].shape and tensor.dtype == like[name].dtype, name
            file.seek(8 + len(text) + starts.pop(name))
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

        yield put
        assert not starts, f"not written: {list(starts)}"
