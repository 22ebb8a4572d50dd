"""Read and write safetensors files: tensors are mapped into memory, and files are complete or absent."""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gesso import atomic_io, untrusted
from gesso.errors import RunError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


MAX_TENSORS = 100_000
"""Maximum number of tensors in a file."""
READ_ERRORS = (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
"""Errors of safetensors for damaged files."""


@contextlib.contextmanager
def open_bounded(path: Path) -> Iterator[safe_open]:
    """Open a regular file whose header and number of tensors are within bounds. Raises one of READ_ERRORS."""
    with open(untrusted.open_regular(path), "rb") as raw:  # safe_open waits for pipes
        if int.from_bytes(raw.read(8), "little") > untrusted.MAX_TEXT_BYTES:
            raise ValueError(f"its header has more than {untrusted.MAX_TEXT_BYTES / 2**20:g} MiB")
    with safe_open(path, "pt") as file:
        if len(file.keys()) > MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS:,} tensors")
        yield file


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with open_bounded(path) as file:
            yield file
    except READ_ERRORS as error:
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


def tensor_checksum(tensor: Tensor) -> str:
    """Return the CRC-32 of the bytes of a tensor as 8 hexadecimal digits."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(content.data):08x}"


@contextlib.contextmanager
def stream_writer(
    path: Path, like: Mapping[str, Tensor], metadata: Callable[[Mapping[str, str]], dict[str, str]]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield put(name, tensor), to be called once for each tensor in any order; the file is written atomically.

    Args:
        path: The file.
        like: Tensors with the names, shapes and dtypes of those to write.
        metadata: Function of the checksums by name, which returns the metadata of the file.
    """
    checksums = dict.fromkeys(sorted(like), "0" * 8)  # replaced by values of the same length
    header: dict[str, object] = {"__metadata__": metadata(checksums)}
    starts, offset = {}, 0
    # The largest numbers first, as safetensors does: each tensor is aligned.
    for name in sorted(like, key=lambda name: (-like[name].itemsize, name)):
        tensor = like[name]
        starts[name], end = offset, offset + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = _encode_header(header)
    with atomic_io.atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)

        def put(name: str, tensor: Tensor) -> None:
            assert tensor.shape == like[name].shape and tensor.dtype == like[name].dtype, name
            file.seek(8 + len(text) + starts.pop(name))
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            checksums[name] = tensor_checksum(tensor)

        yield put
        assert not starts, f"not written: {list(starts)}"
        final = _encode_header({**header, "__metadata__": metadata(checksums)})
        assert len(final) == len(text)
        file.seek(8)
        file.write(final)


def _encode_header(header: Mapping[str, object]) -> bytes:
    """Return the header of a file as JSON, padded to a multiple of 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
