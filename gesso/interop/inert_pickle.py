"""Read pickles of weights without running code: tensors, numbers, strings, containers and inert records.

This is an interpreter of pickle's opcodes that never imports a name and never calls anything that a file names. A name
(GLOBAL) is a record of two strings. Only a few functions may be applied to arguments, and each has a fixed meaning
here: torch's rebuilding of tensors, ordered dicts, and the reconstruction of persistent classes in NVlabs' pickles,
which becomes a record of the class name and its state; the source code in it is ignored. Everything else is refused.

Storages of tensors are nested files of torch.save in its older format, which the same interpreter reads.
"""

import io
import math
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from gesso.errors import RunError

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""First two pickles of torch.save's older format."""
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
ALLOWED_MODULES = ("torch", "torch_utils", "dnnlib", "training", "collections", "numpy", "copyreg", "copy_reg")
"""Top-level modules whose classes may appear as records."""
BUILTIN_CLASSES = {
    "object",
    "dict",
    "list",
    "tuple",
    "set",
    "frozenset",
    "int",
    "float",
    "str",
    "bytes",
    "bool",
    "complex",
}
MAX_DEPTH = 100
"""Largest depth of nested storages and modules."""


class Name(NamedTuple):
    """A name that a pickle refers to; it is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Record:
    """An object that was not built: the name of its class, its arguments, state and items."""

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()):
        self.kind, self.arguments, self.state = kind, arguments, None
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []


class Storage(NamedTuple):
    """Values of a storage, one-dimensional."""

    values: Tensor


class RefusedError(Exception):
    """A pickle has something that weights do not need."""


MARK = object()


class Interpreter:
    """Interpreter of one pickle.

    Args:
        resolve: Returns the object of a persistent id.
        depth: Number of files that this pickle is nested in.
    """

    def __init__(self, resolve: Callable[[Any], Any] | None = None, depth: int = 0):
        self.resolve, self.depth = resolve, depth
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self, file: BinaryIO) -> Any:
        """Return the object of the pickle at the position of a file, which moves behind it."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise RefusedError("it ends early")

    def _step(self, name: str, argument: Any) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if name in VALUES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name == "MARK":
            self.stack.append(MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "POP":
            self.stack.pop()
        elif name == "POP_MARK":
            self._pop_to_mark()
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "GLOBAL":
            self.stack.append(checked_name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.stack.pop(), self.stack.pop()
            self.stack.append(checked_name(module, attribute))
        elif name in ("BINPERSID", "PERSID"):
            self._persistent(self.stack.pop() if name == "BINPERSID" else argument)
        else:
            self._build(name)

    def _build(self, name: str) -> None:
        """Handle the opcodes that build containers and objects."""
        if name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"):
            self.stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            self.stack[-n:] = [tuple(self.stack[-n:])]
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            values = self._pop_to_mark()
            self.stack.append(as_dict(values) if name == "DICT" else as_container(name, values))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [self.stack.pop()] if name == "APPEND" else self._pop_to_mark()
            target = self.stack[-1]
            target = target.elements if isinstance(target, Record) else target
            target.update(values) if isinstance(target, set) else target.extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [self.stack.pop(), self.stack.pop()][::-1] if name == "SETITEM" else self._pop_to_mark()
            target = self.stack[-1]
            (target.items if isinstance(target, Record) else target).update(as_dict(values))
        elif name == "REDUCE":
            arguments, function = self.stack.pop(), self.stack.pop()
            self.stack.append(self._apply(function, arguments))
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            self.stack.pop() if name == "NEWOBJ_EX" else None
            arguments, kind = self.stack.pop(), self.stack.pop()
            self.stack.append(Record(str(class_name(kind)), arguments))
        elif name == "BUILD":
            state, target = self.stack.pop(), self.stack[-1]
            if isinstance(target, Record):
                target.state = state
            elif not isinstance(target, Tensor | dict):  # attributes of tensors and ordered dicts are not needed
                raise RefusedError(f"it sets the state of a {type(target).__name__}")
        else:
            raise RefusedError(f"it uses opcode {name}")

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    def _persistent(self, key: Any) -> None:
        if self.resolve is None:
            raise RefusedError("it refers to objects outside the file")
        self.stack.append(self.resolve(key))

    def _apply(self, function: Any, arguments: Any) -> Any:
        """Return the meaning of a known function of a name; refuse all others."""
        name = str(function) if isinstance(function, Name) else type(function).__name__
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise RefusedError(f"it calls a {name}")
        match name:
            case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor":
                return rebuild_tensor(*arguments[:4])
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                return checked(arguments[0], Tensor)
            case "torch.storage._load_from_bytes":
                return read_storage(checked(arguments[0], bytes), self.depth + 1)
            case "collections.OrderedDict":
                return as_dict([part for pair in (arguments[0] if arguments else ()) for part in pair])
            case "torch_utils.persistence._reconstruct_persistent_obj":
                meta = checked(arguments[0], dict)
                record = Record(str(meta.get("class_name")))
                record.state = meta.get("state")
                return record
            case "copyreg._reconstructor" | "copy_reg._reconstructor":
                record = Record(str(class_name(arguments[0])))
                base = arguments[2] if len(arguments) > 2 else None
                record.items |= base if isinstance(base, dict) else {}
                return record
            case "builtins.set" | "builtins.frozenset" | "__builtin__.set" | "__builtin__.frozenset":
                return (set if name.endswith(".set") else frozenset)(checked(arguments[0], list))
            case "_codecs.encode":  # bytes in protocols 0 to 2
                return checked(arguments[0], str).encode("latin1")
            case "builtins.bytes" | "__builtin__.bytes" if not arguments:
                return b""
            case "torch.Size" | "torch.device" | "numpy.dtype" | "numpy.core.multiarray.scalar":
                return Record(name, arguments)
            case "numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct":
                return Record("numpy.ndarray")
        raise RefusedError(f"it calls {name}")


VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
"""Opcodes whose argument is the value."""
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def checked(value: Any, kind: type) -> Any:
    """Return the value if it has this type."""
    if not isinstance(value, kind):
        raise RefusedError(f"it has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def checked_name(module: Any, name: Any) -> Name:
    """Return a name of a module that weights refer to; refuse others, and names with dots, which reach attributes."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise RefusedError("it has a name that is no text")
    top = module.split(".")[0]
    allowed = top in ALLOWED_MODULES or (module, name) == ("_codecs", "encode")
    if top in ("builtins", "__builtin__"):
        allowed = name in BUILTIN_CLASSES
    if not allowed or "." in name:
        raise RefusedError(f"it refers to {module}.{name}")
    return Name(module, name)


def class_name(kind: Any) -> Name:
    """Return the name of a class that an object is made of."""
    return checked(kind, Name)


def as_dict(values: list[Any]) -> dict[Any, Any]:
    """Return keys and values in turn as a dict."""
    try:
        return dict(zip(values[::2], values[1::2], strict=True))
    except (TypeError, ValueError):
        raise RefusedError("a dict has keys that are no numbers or strings") from None


def as_container(name: str, values: list[Any]) -> Any:
    """Return values as a tuple, list or frozenset."""
    return {"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[name](values)


def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    """Return a tensor of a storage; refuse one that reaches beyond it or repeats its values."""
    values = checked(storage, Storage).values
    size, stride = checked(size, tuple), checked(stride, tuple)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and 0 <= n < 2**40 for n in numbers):
        raise RefusedError("a tensor has an impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count and (last >= len(values) or count > len(values)):
        raise RefusedError(f"a tensor of shape {size} does not fit its {len(values)} stored values")
    return values.as_strided(size, stride, offset) if count else values.new_empty(size)


def read_storage(data: bytes, depth: int) -> Storage:
    """Return the storage in a file of torch.save's older format."""
    if depth > MAX_DEPTH:
        raise RefusedError("files are nested too deeply")
    file, stored = io.BytesIO(data), {}

    def resolve(key: Any) -> str:
        if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or not isinstance(key[1], Name):
            raise RefusedError("it refers to objects outside the file")
        dtype = STORAGE_DTYPES.get(key[1].name)
        if dtype is None:
            raise RefusedError(f"it has a {key[1]}")
        stored[str(key[2])] = dtype
        return str(key[2])

    header = [Interpreter(depth=depth).load(file) for _ in range(3)]
    root = Interpreter(resolve, depth).load(file)
    keys = Interpreter(depth=depth).load(file)
    if header[:2] != [LEGACY_MAGIC, LEGACY_PROTOCOL] or keys != [root] or root not in stored:
        raise RefusedError("a tensor's values are stored in an unknown way")
    dtype = stored[root]
    (count,) = struct.unpack("<q", file.read(8))
    start, width = file.tell(), dtype.itemsize
    if count < 0 or count * width > len(data) - start:
        raise RefusedError(f"a storage says {count} values, but its file ends before")
    # A copy, because bytes cannot be changed.
    return Storage(
        torch.frombuffer(bytearray(data[start : start + count * width]), dtype=dtype)
        if count
        else torch.empty(0, dtype=dtype)
    )


def read_pickle(file: BinaryIO, label: str) -> Any:
    """Return the inert content of a pickle.

    Args:
        file: The file.
        label: Name of the file in errors.

    Raises:
        RunError: The pickle has anything besides tensors, numbers, strings, containers and persistent classes, or is
            damaged.
    """
    try:
        return Interpreter().load(file)
    except RefusedError as error:
        raise RunError(f"{label} is refused: {error}; gesso reads weights only and runs no code of a file") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{label} is damaged or no pickle of weights ({summary})") from None


def state_dict_of(module: Any, label: str) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of a record of a module, by name, as `state_dict` gives them.

    Raises:
        RunError: The record is no module, or modules are nested in themselves.
    """
    tensors: dict[str, Tensor] = {}

    def visit(record: Any, prefix: str, depth: int) -> None:
        state = record.state if isinstance(record, Record) else None
        if depth > MAX_DEPTH or not isinstance(state, dict) or not isinstance(state.get("_modules"), dict):
            raise RunError(f"{label} has no module of PyTorch at {prefix or 'its root'}")
        transient = state.get("_non_persistent_buffers_set") or set()
        for group in ("_parameters", "_buffers"):
            for name, tensor in (state.get(group) or {}).items():
                if isinstance(tensor, Tensor) and not (group == "_buffers" and name in transient):
                    tensors[f"{prefix}{name}"] = tensor
        for name, inner in state["_modules"].items():
            if inner is not None:
                visit(inner, f"{prefix}{name}.", depth + 1)

    visit(module, "", 0)
    return tensors
