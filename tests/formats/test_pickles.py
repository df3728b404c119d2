"""Pickles of arrays are read where they lie; everything else in a pickle is refused before it can run."""

import os
import pickle
import struct
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from lbdt.formats.pickles import UnsafePickle, read_pickle


def values(array) -> torch.Tensor:
    return torch.cat(list(array.rows(max_bytes=1000)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 4, 5), (30, 40, 50)], ids=["in-line", "left-in-the-file"])
def test_numpy_arrays(tmp_path, protocol, dtype, shape):
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    given = OrderedDict(Cats=array, more=[array, array[:1].copy()], n=np.float64(3.5), i=np.int64(7))
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(given, protocol))
    read = read_pickle(path)
    assert torch.equal(values(read["Cats"]), torch.from_numpy(array))
    assert torch.equal(values(read["more"][1]), torch.from_numpy(array[:1]))
    assert read["more"][0] is read["Cats"] and (read["n"], read["i"]) == (3.5, 7)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 4, 5), (30, 40, 50)], ids=["in-line", "left-in-the-file"])
def test_torch_tensors(tmp_path, protocol, dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = tmp_path / "a.pkl"
    given = defaultdict(list, Cats=tensor, part=tensor[1:])
    path.write_bytes(pickle.dumps(given, protocol))
    read = read_pickle(path)
    assert torch.equal(values(read["Cats"]), tensor) and torch.equal(values(read["part"]), tensor[1:])


class Calls:
    """Pickles as a call of `function` with `arguments`, with a state if given."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def raw(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


ARRAY = np.zeros(4, np.float32)
BIG = b"(K\x01K\x02K\x03K\x04t"
CANARY = "touch canary"
# A name put together from the memo instead of written beside its use.
COMPUTED = text("system") + b"\x94" + text("os") + b"\x94" + b"h\x01h\x00\x93" + text(CANARY) + b"\x85R"
RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
DTYPE = b"cnumpy\ndtype\n(" + text("f4") + b"\x89\x88tR"


def dtype_state(*state) -> bytes:
    return pickle.dumps(state, 4)[2:-1].replace(b"\x94", b"")


MALICIOUS = {
    "os.system": (pickle.dumps(Calls(os.system, CANARY)), "'posix.system'"),
    "os.system in a tuple in a list": (pickle.dumps([(1, [Calls(os.system, CANARY)])]), "'posix.system'"),
    "os.system as a dictionary's value": (pickle.dumps({"a": ARRAY, "b": Calls(os.system, CANARY)}), "posix"),
    "eval": (pickle.dumps(Calls(eval, f"__import__('os').system('{CANARY}')")), "'builtins.eval'"),
    "eval of protocol 2": (pickle.dumps(Calls(eval, "1"), 2), "'__builtin__.eval'"),
    "getattr": (pickle.dumps(Calls(getattr, "", "join")), "'builtins.getattr'"),
    "a name from the memo": (raw(COMPUTED), "'os.system'"),
    "a name that is no string": (raw(b"K\x01K\x02\x93"), "a name that is not two strings"),
    "a dotted name": (raw(text("numpy") + text("ndarray.dump") + b"\x93"), "'numpy.ndarray.dump'"),
    "INST": (raw(b"(" + text(CANARY) + b"ios\nsystem\n"), "opcode INST"),
    "OBJ": (raw(b"(cos\nsystem\n" + text(CANARY) + b"o"), "'os.system'"),
    "OBJ of a known name": (raw(b"(cnumpy\ndtype\n" + text("f4") + b"o"), "opcode OBJ"),
    "NEWOBJ": (raw(b"cnumpy\nndarray\n)\x81"), "opcode NEWOBJ"),
    "NEWOBJ_EX": (raw(b"cnumpy\nndarray\n)}\x92"), "opcode NEWOBJ_EX"),
    "EXT1": (raw(b"\x82\x01"), "opcode EXT1"),
    "EXT4": (raw(b"\x84\x01\x00\x00\x00"), "opcode EXT4"),
    "PERSID": (raw(b"Pos.system\n"), "opcode PERSID"),
    "BINPERSID": (raw(b"K\x01Q"), "a persistent id outside of a torch storage"),
    "BUILD of a dictionary": (
        raw(b"}" + b"}" + text("x") + b"K\x01s" + b"b"),
        "sets the state of dict to dict",
    ),
    "BUILD with __setstate__": (
        pickle.dumps(Calls(OrderedDict, state={"__setstate__": 1})),
        "sets the state",
    ),
    "an array of objects": (pickle.dumps(np.array([{}, []], object)), "dtype 'O8'"),
    "an object dtype": (raw(b"cnumpy\ndtype\n(" + text("O8") + b"\x89\x88tR"), "dtype 'O8'"),
    "a structured dtype": (pickle.dumps(np.zeros(2, [("a", "f4")])), "dtype 'V4'"),
    "a dtype with metadata": (
        raw(DTYPE + dtype_state(3, "<", None, None, None, -1, -1, 0, {"a": 1}) + b"b"),
        "sets the state of DType",
    ),
    "a big-endian dtype": (pickle.dumps(np.zeros(3, ">f4")), "sets the state of DType to tuple"),
    "a scalar of objects": (
        raw(
            b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n(" + text("O8") + b"\x89\x88tR" + b"C\x01b\x86R"
        ),
        "dtype 'O8'",
    ),
    "a scalar with a pickle in it": (
        raw(b"cnumpy._core.multiarray\nscalar\n" + DTYPE + b"C\x0e" + raw(b"cos\nsystem\n") + b"\x86R"),
        "which makes no array",
    ),
    "a subclass of ndarray": (
        raw(RECONSTRUCT.replace(b"numpy\nndarray", b"numpy\nmemmap")),
        "'numpy.memmap'",
    ),
    "ndarray called": (raw(b"cnumpy\nndarray\n(K\x08tR"), "calls numpy.ndarray"),
    "encode with another codec": (
        raw(b"c_codecs\nencode\n" + text("x") + text("zip_codec") + b"\x86R"),
        "calls _codecs.encode",
    ),
    "a default factory that is no container": (
        pickle.dumps(defaultdict(os.getcwd)),
        "'posix.getcwd'",
    ),
    "a half-made array as the answer": (raw(RECONSTRUCT), "got Pending"),
    "a bare name as the answer": (raw(b"cnumpy\nndarray\n"), "got numpy.ndarray"),
    "torch.load from bytes in a pickle": (
        raw(b"ctorch.storage\n_load_from_bytes\nC\x0e" + raw(b"cos\nsystem\n") + b"\x85R"),
        "'os.system'",
    ),
    "another torch function": (raw(b"ctorch._utils\n_rebuild_parameter\n"), "_rebuild_parameter"),
    "torch.load itself": (
        raw(b"ctorch.serialization\nload\n" + text("x") + b"\x85R"),
        "torch.serialization.load",
    ),
    "a key that is a tuple": (raw(b"}((tK\x01t" + b"K\x01s"), "expected names as keys"),
    "keys of one hash": (
        raw(
            b"}("
            + b"".join(b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"N" for i in range(1, 9))
            + b"u"
        ),
        "expected names as keys, got int",
    ),
    "a negative key": (raw(b"}J\xff\xff\xff\xffNs"), "expected names as keys, got int"),
    "half a surrogate pair": (raw(b"}\x8c\x03\xed\xa0\x80Ns"), "a string that is not UTF-8"),
    "an integer of a gigabyte": (raw(b"\x8b" + struct.pack("<i", 1 << 30)), "an integer of"),
    "an empty stack": (raw(b"R"), "takes a value that is not there"),
    "no mark": (raw(b"t"), "takes a mark that is not there"),
    "an unknown memo": (raw(b"h\x05"), "never stored"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "two values": (raw(b"NN"), "expected one value at the end"),
    "bytes after the end": (raw(b"N") + b"rm -rf", "expected nothing after the pickle's end"),
}


@pytest.mark.parametrize("name", MALICIOUS, ids=[name.replace(" ", "-") for name in MALICIOUS])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, message = MALICIOUS[name]
    path = tmp_path / "bad.pkl"
    path.write_bytes(data)
    with pytest.raises(UnsafePickle, match="nothing in it was run") as refused:
        read_pickle(path)
    assert message in str(refused.value) and str(path) in str(refused.value)
    assert os.listdir(tmp_path) == ["bad.pkl"]


def test_the_canary_would_have_appeared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (MALICIOUS["os.system"][0], MALICIOUS["a name from the memo"][0]):
        pickle.loads(data)
        assert os.listdir(tmp_path) == ["canary"]
        os.remove("canary")


ARRAYS = {
    "a shape larger than the bytes": (
        (1, (5,), "f4", bytes(16)),
        "an array of shape [5] and 20 bytes holds 16",
    ),
    "a shape that overflows": ((1, (1 << 39, 1 << 39), "f4", bytes(16)), "and 12089258196146291747061"),
    "a negative shape": ((1, (-1, -4), "f4", bytes(16)), "expected a shape of non-negative integers"),
    "a shape of floats": ((1, (4.0,), "f4", bytes(16)), "expected a shape of non-negative integers"),
    "integers": ((1, (4,), "i4", bytes(16)), "expected an array of float16, float32 or float64"),
    "Fortran order": ((1, (2, 2), "f4", bytes(16), True), "in Fortran order"),
    "a list of objects": ((1, (1,), "f4", [None]), "an array of Python objects"),
}


@pytest.mark.parametrize("name", ARRAYS, ids=[name.replace(" ", "-") for name in ARRAYS])
def test_an_array_that_does_not_fit_its_bytes_is_refused(tmp_path, name):
    (version, shape, code, data, *fortran), message = ARRAYS[name]
    dumped = [pickle.dumps(value, 4)[2:-1] for value in (shape, data)]
    dumped = [part[9:] if part[:1] == b"\x95" else part for part in dumped]
    flag = b"\x88" if fortran else b"\x89"
    dtype = DTYPE.replace(b"f4", code.encode())
    body = RECONSTRUCT + b"(K\x01" + dumped[0] + dtype + flag + dumped[1] + b"tb"
    path = tmp_path / "bad.pkl"
    path.write_bytes(raw(body))
    with pytest.raises(UnsafePickle) as refused:
        read_pickle(path)
    assert message in str(refused.value)


def torch_bytes(**change) -> bytes:
    """A pickled tensor of 4 float32 whose storage or view is tampered with."""
    data = pickle.dumps(torch.arange(4.0), 4)
    for old, new in change.get("replace", ()):
        assert old in data
        data = data.replace(old, new)
    return data


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ([(b"K\x00K\x04\x85", b"K\x00K\x09\x85")], "a tensor of shape [9] outside of its storage"),
        ([(b"K\x00K\x04\x85", b"K\x02K\x04\x85")], "a tensor of shape [4] outside of its storage"),
        ([(b"K\x01\x85", b"K\x00\x85")], "a tensor with strides of its own"),
        ([(b"cpuq\x03K\x04Nt", b"cpuq\x03K\x09Nt")], "a torch storage of 9 values and 16 bytes"),
        ([(b"little_endianq\x02\x88", b"little_endianq\x02\x89")], "a big-endian machine"),
        ([(b"FloatStorage", b"QInt8Storage")], "'torch.QInt8Storage'"),
    ],
    ids=["size", "offset", "stride-0", "numel", "endian", "quantised"],
)
def test_a_tampered_tensor_is_refused(tmp_path, replace, message):
    path = tmp_path / "bad.pkl"
    data = torch_bytes(replace=replace)
    path.write_bytes(data)
    with pytest.raises(UnsafePickle) as refused:
        read_pickle(path)
    assert message in str(refused.value)


def test_a_big_tensor_of_protocol_2_is_refused_with_advice(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(torch.zeros(5000), 2))
    with pytest.raises(UnsafePickle, match="pickle it with protocol 4"):
        read_pickle(path)


@pytest.mark.parametrize("keep", [0, 1, 10, 60, -1], ids=["empty", "header", "name", "array", "end"])
def test_a_truncated_pickle(tmp_path, keep):
    path = tmp_path / "cut.pkl"
    path.write_bytes(pickle.dumps({"Cats": np.zeros((50, 60, 7), np.float16)}, 4)[:keep])
    with pytest.raises(ValueError, match="truncated, get it again"):
        read_pickle(path)


def test_a_pickle_that_multiplies_is_bounded(tmp_path):
    """Lists of the same list, 60 deep, mean 2**60 values; the machine holds 60 lists. Opcodes are counted."""
    path = tmp_path / "laughs.pkl"
    value = []
    for _ in range(60):
        value = [value, value]
    path.write_bytes(pickle.dumps(value))
    assert len(read_pickle(path)) == 2
    path.write_bytes(raw(b"](" + b"N" * 1_000_001 + b"e"))
    with pytest.raises(UnsafePickle, match="at most 1000000 opcodes"):
        read_pickle(path)


def test_a_scrambled_pickle_raises_nothing_but_valueerror(tmp_path):
    """Bytes replaced at random: whatever comes of it, never another exception than ValueError."""
    path = tmp_path / "fuzz.pkl"
    generator = np.random.default_rng(0)
    originals = [pickle.dumps({"a": ARRAY, "b": torch.ones(3)}, protocol) for protocol in (2, 4, 5)]
    for trial in range(600):
        data = bytearray(originals[trial % 3])
        for place in generator.integers(0, len(data), 3):
            data[place] = generator.integers(0, 256)
        path.write_bytes(data)
        try:
            read = read_pickle(path)
            for value in read.values() if isinstance(read, dict) else ():
                if hasattr(value, "rows"):
                    list(value.rows())
        except ValueError:
            pass
