"""Pickles of EDM2 are read as plain data; pickles that would run code are refused, and nothing of them runs."""

import builtins
import functools
import io
import operator
import os
import pickle
import struct
from collections import OrderedDict

import numpy
import pytest
import torch
from helpers.edm2_pickle import snapshot_bytes
from helpers.published_edm2 import published_edm2_weights
from safetensors.torch import load_file
from torch import nn

from gesso import interop
from gesso.errors import RunError, UsageError
from gesso.interop import files
from gesso.interop.inert_pickle import Record, read_pickle


@pytest.fixture(scope="module")
def state():
    return published_edm2_weights()


@pytest.fixture
def edm2_file(tmp_path, state):
    path = tmp_path / "edm2-img16-xs-0002147-0.135.pkl"
    path.write_bytes(snapshot_bytes(state))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_snapshot_of_edm2_is_read(tmp_path, state, protocol, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    path = tmp_path / "a.pkl"
    path.write_bytes(snapshot_bytes(stored, protocol))
    actual, notes = files.read_state(path, "a.pkl")
    assert actual.keys() == stored.keys() and all(tensor.equal(stored[name]) for name, tensor in actual.items())
    assert notes == {"network": "'ema' of the pickle, class Precond"}
    net, _ = interop.load_network(actual)
    expected, _ = interop.load_network(stored)
    assert all(tensor.equal(expected.state_dict()[name]) for name, tensor in net.state_dict().items())


def test_import_command_describes_the_file_and_writes_weights(gesso, tmp_path, edm2_file, state):
    code, output, _ = gesso("import", edm2_file, "--out", tmp_path / "w.safetensors")
    assert code == 0
    for line in (
        "format: EDM2 (NVlabs/edm2), ",
        "network: net.name=edm2 net.channels=64 net.channel_mult=[1,2] net.num_blocks=1 net.attention_levels=[1]",
        "inputs: 3 channels of 16 x 16, 7 classes",
        "EMA: sigma_rel 0.135 at 2,147 thousand images, by the name of the file",
        f"init.source={tmp_path / 'w.safetensors'}",
    ):
        assert line in output, output
    written = load_file(tmp_path / "w.safetensors")
    assert written.keys() == state.keys() and all(tensor.equal(state[name]) for name, tensor in written.items())
    assert gesso("import", tmp_path / "w.safetensors")[1].splitlines()[1:4] == output.splitlines()[1:4]


def test_plain_values_are_read():
    value = {
        "a": [1, 2.5, None, True, "x", b"y", 2**70],
        3: (1, (2,), {4, 5}),
        "o": OrderedDict(b=1),
        "f": frozenset({1}),
    }
    for protocol in (2, 4, 5):
        assert read_pickle(io.BytesIO(pickle.dumps(value, protocol)), "a") == value
    array = read_pickle(io.BytesIO(pickle.dumps(numpy.arange(3.0))), "a")
    assert isinstance(array, Record) and array.kind == "numpy.ndarray"
    strided = torch.arange(12.0).reshape(3, 4).T
    assert read_pickle(io.BytesIO(pickle.dumps({"t": strided})), "a")["t"].equal(strided)


class Call:
    """Object whose pickle calls a function."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) + (() if state is None else (state,))

    def __reduce__(self):
        return self.parts


class ModuleState(nn.Module):
    """Module with a hostile object in its state."""

    def __init__(self, value):
        super().__init__()
        self.value = value


def touch(path):
    return Call(os.system, f"touch {path}")


HOSTILE = {
    "os.system": touch,
    "eval": lambda path: Call(builtins.eval, f"open({str(path)!r}, 'w')"),
    "exec": lambda path: Call(builtins.exec, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Call(open, str(path), "w"),
    "import": lambda path: Call(builtins.__import__, "os"),
    "getattr": lambda path: Call(getattr, Call(builtins.__import__, "os"), "system"),
    "attrgetter": lambda path: Call(operator.attrgetter, "system"),
    "partial": lambda path: Call(functools.partial, os.system, f"touch {path}"),
    "torch.load": lambda path: Call(torch.load, str(path)),
    "torch.hub": lambda path: Call(torch.hub.load, "x/y", "z"),
    "numpy.load": lambda path: Call(numpy.load, str(path)),
    "nested in a list": lambda path: [1, [2, {"a": (touch(path),)}]],
    "as a key": lambda path: {touch(path): 1},
    "in an ordered dict": lambda path: OrderedDict(a=touch(path)),
    "as a state": lambda path: Call(OrderedDict, state={"a": touch(path)}),
    "in a parameter": lambda path: {"ema": nn.Parameter(torch.zeros(1)), 
                                   "x": Call(torch._utils._rebuild_parameter, touch(path))},
    "in stored bytes": lambda path: Call(torch.storage._load_from_bytes, pickle.dumps(touch(path))),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickle_is_refused_and_nothing_runs(gesso, tmp_path, name, protocol):
    marker, path = tmp_path / "ran", tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"ema": HOSTILE[name](marker)}, protocol))
    code, output, error = gesso("import", path)
    assert code != 0 and output == "" and len(error.strip().splitlines()) == 1
    assert f"{path} is refused: it " in error and "runs no code of a file" in error
    assert not marker.exists()


OPCODES = {
    "attribute of a name": (b"\x80\x04\x8c\x05torch\x8c\x0bhub.os.path\x93.", "refers to torch.hub.os.path"),
    "method of a class": (b"\x80\x04\x8c\x08builtins\x8c\x0ddict.fromkeys\x93.", "refers to builtins.dict.fromkeys"),
    "INST": (b"(S'touch x'\nios\nsystem\n.", "opcode INST"),
    "OBJ": (b"(cbuiltins\ndict\no.", "opcode OBJ"),
    "extension registry": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "persistent id": (b"\x80\x02X\x01\x00\x00\x00aQ.", "objects outside the file"),
    "call of a result": (b"\x80\x02ccollections\nOrderedDict\n)R)R.", "calls a dict"),
    "class of a module": (b"\x80\x02csubprocess\nPopen\n)\x81.", "refers to subprocess.Popen"),
    "state of a list": (b"\x80\x02]}b.", "state of a list"),
    "no stop": (b"\x80\x02]", "damaged"),
    "empty stack": (b"\x80\x02a.", "damaged"),
    "no pickle": (b"hello", "damaged"),
    "empty": (b"", "damaged"),
    "long claim": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "damaged"),
}


@pytest.mark.parametrize("name", list(OPCODES))
def test_opcodes_that_weights_do_not_need(name):
    data, message = OPCODES[name]
    with pytest.raises(RunError, match=message):
        read_pickle(io.BytesIO(data), "a.pkl")


def test_source_code_in_a_pickle_does_not_run(edm2_file):
    """The helper's pickles have source that exits and a function that fails."""
    assert b"gesso ran the source code" in edm2_file.read_bytes()
    files.read_state(edm2_file, "a")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(size=(2**20, 2**20), stride=(0, 0)), "does not fit its 4 stored values"),
        (dict(size=(8,), stride=(0,)), "does not fit its 4 stored values"),
        (dict(offset=3), "does not fit its 4 stored values"),
        (dict(offset=-1), "impossible shape"),
        (dict(stride=(-1,)), "impossible shape"),
    ],
)
def test_tensors_must_fit_their_values(change, message):
    part = dict(offset=0, size=(4,), stride=(1,)) | change
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    call = Call(
        torch._utils._rebuild_tensor_v2, storage, part["offset"], part["size"], part["stride"], False, OrderedDict()
    )
    with pytest.raises(RunError, match=message):
        read_pickle(io.BytesIO(pickle.dumps(call)), "a.pkl")


def test_other_pickles_are_named(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(UsageError, match="no pickle of EDM2: it has none of ema, net"):
        files.read_state(path, "a.pkl")
    path.write_bytes(pickle.dumps({"ema": 1}))
    with pytest.raises(RunError, match="no module of PyTorch"):
        files.read_state(path, "a.pkl")


def test_checkpoints_are_read_without_code(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"ema": {"x": torch.ones(3)}, "opt": {}}, path)
    actual, notes = files.read_state(path, "a.pt")
    assert actual["x"].equal(torch.ones(3)) and "only 'ema'" in notes["checkpoint"]
    torch.save({"ema": touch(tmp_path / "ran")}, path)
    with pytest.raises(RunError, match="contains code, which gesso never runs"):
        files.read_state(path, "a.pt")
    torch.save({"x": torch.zeros(1).expand(1000, 1000)}, path)
    with pytest.raises(RunError, match=r"x of shape \(1000, 1000\) is larger than what the file stores"):
        files.read_state(path, "a.pt")
    assert not (tmp_path / "ran").exists()
