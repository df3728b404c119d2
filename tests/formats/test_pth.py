"""`torch.save` files: what would fill the memory or run something is refused before torch sees it."""

import io
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from lbdt.formats.class_params import ClassParams, class_params_json, load_class_params, load_class_settings
from lbdt.formats.pth import read_pth
from lbdt.sae import SparseAutoencoder
from tests.formats import fixtures


def saved(value) -> dict[str, bytes]:
    """The entries of a torch.save file."""
    data = io.BytesIO()
    torch.save(value, data)
    with zipfile.ZipFile(data) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path, entries: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def changed(entries: dict[str, bytes], *replace: tuple[bytes, bytes]) -> dict[str, bytes]:
    entries = dict(entries)
    for old, new in replace:
        assert old in entries["archive/data.pkl"]
        entries["archive/data.pkl"] = entries["archive/data.pkl"].replace(old, new)
    return entries


class Runs:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_what_torch_saves_is_read(tmp_path):
    value = {"a": torch.ones(3), "n": 2.5, "list": [1, "x"], "p": torch.nn.Parameter(torch.zeros(2))}
    torch.save(value, tmp_path / "a.pth")
    read = read_pth(tmp_path / "a.pth")
    assert torch.equal(read["a"], value["a"]) and (read["n"], read["list"]) == (2.5, [1, "x"])


def test_a_compressed_bomb_is_refused_before_it_is_unpacked(tmp_path):
    entries = {**saved({"a": torch.ones(3)}), "archive/data/0": bytes(200_000_000)}
    path = zipped(tmp_path / "bomb.pth", entries, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ValueError, match="expected it uncompressed.* could fill the memory"):
        read_pth(path)


def test_entries_that_overlap_are_refused(tmp_path):
    """Many entries of the directory may point at the same bytes."""
    path = zipped(tmp_path / "bomb.pth", {**saved({}), "archive/data/0": bytes(50_000)})
    with zipfile.ZipFile(path, "a") as archive:
        last = archive.getinfo("archive/data/0")
        archive.filelist += [last] * 100
        archive._didModify = True
    with pytest.raises(ValueError, match=r"the zip entries claim \d+ bytes, but the file has"):
        read_pth(path)


@pytest.mark.parametrize("attribute", ["items", "keys", "__class__", "values", "get"])
def test_attributes_of_an_ordered_dictionary_are_passed_over(tmp_path, attribute):
    """A module's state_dict carries `_metadata`; another name would hide a method."""
    folder = fixtures.unbox(tmp_path / "sae")
    state = torch.load(folder / "state_dict.pth", weights_only=True)["state_dict"]
    wanted = SparseAutoencoder.from_pretrained(folder, format="steerers").state_dict()
    state = OrderedDict(state)
    state._metadata = OrderedDict(version=1)
    if attribute == "__class__":
        state.__dict__[attribute] = 5
    else:
        setattr(state, attribute, 5)
    reduced = OrderedDict, (), vars(state), None, iter(OrderedDict.items(state))

    class Reduced:
        def __reduce__(self):
            return reduced

    torch.save(Reduced(), folder / "state_dict.pth")
    got = SparseAutoencoder.from_pretrained(folder, format="steerers").state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def flood(keys: list[bytes]) -> bytes:
    """A pickle of a dictionary with these keys."""
    return b"\x80\x02}(" + b"".join(key + b"N" for key in keys) + b"u."


DOUBLED = b"".join(b"q\x01h\x01h\x01\x86" for _ in range(60))
FLOODS = {
    "integers of one hash": flood(
        [b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") for i in range(1, 60_000)]
    ),
    "numbers": flood([b"G" + struct.pack(">d", 2.0 ** (61 * i)) for i in range(16)]),
    "a tuple of tuples of tuples": b"\x80\x02})" + DOUBLED + b"Ns.",
    "opcodes": b"\x80\x02" + b"N0" * 500_000 + b"N.",
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS)
def test_what_would_keep_a_dictionary_busy_is_refused_at_once(tmp_path, data):
    path = zipped(tmp_path / "a.pth", {**saved({}), "archive/data.pkl": data})
    start = time.monotonic()
    with pytest.raises(ValueError, match="a.pth: "):
        read_pth(path)
    assert time.monotonic() - start < 10


def test_shared_strided_and_empty_tensors_are_those_that_were_saved(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    value = {
        "whole": base,
        "part": base[1:3, ::2],
        "turned": base.T,
        "none": torch.zeros(0, 3),
        "n": base[0, 0],
    }
    value |= {
        "half": base.half(),
        "bf16": base.bfloat16(),
        "f64": base.double(),
        "i": base.int(),
        "l": base.long(),
    }
    torch.save(value, tmp_path / "a.pth")
    read = read_pth(tmp_path / "a.pth")
    for name, tensor in value.items():
        assert torch.equal(read[name], tensor) and read[name].stride() == tensor.stride(), name
        assert read[name].dtype == tensor.dtype
    assert read["part"].untyped_storage().data_ptr() == read["whole"].untyped_storage().data_ptr()


def test_a_flipped_byte_is_refused(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    place = data.index(torch.ones(100).numpy().tobytes())
    (tmp_path / "a.pth").write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    with pytest.raises(ValueError, match=r"a\.pth: .*Bad CRC-32"):
        read_pth(tmp_path / "a.pth")


def test_too_many_entries_are_refused(tmp_path):
    path = zipped(tmp_path / "many.pth", {**saved({}), **{f"archive/data/{i}": b"" for i in range(300)}})
    with pytest.raises(ValueError, match="expected at most 256 zip entries"):
        read_pth(path)


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (Runs(), "posix.system"),
        ({"a": [Runs()]}, "posix.system"),
        ({"a": np.float64(1)}, "numpy._core.multiarray.scalar"),
        ({"a": bytearray(4)}, "__builtin__.bytearray"),
        ({"a": torch.ones(2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.empty(2, device="meta")}, "torch._utils._rebuild_meta_tensor_no_storage"),
    ],
    ids=["call", "nested-call", "numpy", "bytearray", "sparse", "meta"],
)
def test_other_names_are_refused_before_torch_sees_them(tmp_path, monkeypatch, value, asked):
    monkeypatch.chdir(tmp_path)
    torch.save(value, tmp_path / "bad.pth")
    monkeypatch.setattr(torch, "load", lambda *args, **more: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"asks for '{asked}'.*nothing in it was run"):
        read_pth(tmp_path / "bad.pth")
    assert os.listdir(tmp_path) == ["bad.pth"]


def test_a_name_from_the_stack_is_refused(tmp_path):
    entries = {**saved({}), "archive/data.pkl": pickle.dumps(Runs(), 4)}
    with pytest.raises(ValueError, match="asks for 'posix.system'"):
        read_pth(zipped(tmp_path / "bad.pth", entries))


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    entries = saved({"a": torch.ones(4)})
    claims = changed(entries, (b"K\x04", b"M\x00\x10"))
    with pytest.raises(ValueError, match=r"a storage of 4096 torch.float32 values in 16 bytes"):
        read_pth(zipped(tmp_path / "numel.pth", claims))
    strides = changed(entries, (b"K\x04\x85", b"J\x00\x00\x00\x10\x85"), (b"K\x01\x85", b"K\x00\x85"))
    with pytest.raises(ValueError, match=r"shape \[268435456\] is larger than the file"):
        read_pth(zipped(tmp_path / "strides.pth", strides))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"a": 1}), "not a zip file as torch.save writes"),
        (b"", "not a zip file"),
        (b"PK\x03\x04" + bytes(100), "not a zip file"),
    ],
    ids=["pickle", "empty", "cut"],
)
def test_no_zip_is_refused(tmp_path, data, message):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_pth(tmp_path / "a.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="load it there and save it again"):
        read_pth(tmp_path / "old.pth")


def test_a_folder_with_a_bomb_is_refused_by_name(tmp_path):
    folder = fixtures.unbox(tmp_path / "sae")
    with zipfile.ZipFile(folder / "state_dict.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    zipped(folder / "state_dict.pth", entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"state_dict\.pth: entry .* expected it uncompressed"):
        SparseAutoencoder.from_pretrained(folder, format="sdxl-unbox")
    (folder / "state_dict.pth").unlink()
    with pytest.raises(ValueError, match=r"state_dict\.pth: no such file"):
        SparseAutoencoder.from_pretrained(folder, format="sdxl-unbox")


@pytest.mark.parametrize("key", ["multiplier", "alpha"])
def test_class_params_round_trip(tmp_path, key):
    wanted = {name: ClassParams(*numbers, key) for name, numbers in fixtures.PARAMS.items()}
    path = fixtures.class_params(tmp_path / "class_params.pth", key)
    assert load_class_params(path) == wanted == load_class_params(tmp_path)
    (tmp_path / "class_params.json").write_bytes(class_params_json(wanted))
    path.unlink()
    assert load_class_params(tmp_path) == wanted


@pytest.mark.parametrize(
    ("key", "rule"), [("multiplier", "saeuron"), ("alpha", "gsae")], ids=["SAeUron's", "G-SAE's"]
)
def test_class_params_are_settings(tmp_path, key, rule):
    path = fixtures.class_params(tmp_path / "class_params.pth", key)
    found = load_class_settings(path, ("Dogs", "Cats"))
    assert (found.rule, found.strength) == (rule, {"Dogs": -15.0, "Cats": -30.0})
    assert found.selection["Cats"] == {"percentile": 99.999, "thresholds": "published"}
    assert set(load_class_settings(tmp_path, ("Birds", *fixtures.CLASSES)).strength) == set(fixtures.CLASSES)


@pytest.mark.parametrize("concepts", [("Birds",), ("Cats", "dogs")], ids=["none of them", "spelt otherwise"])
def test_class_params_of_another_dictionary_are_refused(tmp_path, concepts):
    path = fixtures.class_params(tmp_path / "class_params.pth")
    with pytest.raises(
        ValueError, match=rf"class_params\.pth: has no class {concepts[-1]}, but .*Dogs, Trees, which"
    ):
        load_class_settings(tmp_path, concepts)
    assert path.is_file()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "expected classes .* got list"),
        ({}, "expected classes"),
        ({"Cats": 3}, "Cats: expected percentile and multiplier .G-SAE: alpha., got 3"),
        ({"Cats": {"percentile": 99.0}}, "Cats: expected percentile and multiplier .*, got percentile"),
        ({"Cats": {"percentile": 99.0, "multiplier": -1, "alpha": -1}}, "got percentile, multiplier, alpha"),
        (
            {"Cats": {"percentile": 99.0, "multiplier": -1}, "Dogs": {"percentile": 99.0, "alpha": -1}},
            "same keys for every class, got multiplier .* for some and alpha",
        ),
        ({"Cats": {"percentile": 99.0, "alpha": float("inf")}}, "alpha: expected a finite number"),
        ({"Cats": {"percentile": 99.0, "multiplier": float("nan")}}, "multiplier: expected a finite number"),
        ({"Cats": {"percentile": 99.0, "multiplier": -(10**400)}}, "an integer of 167 bytes"),
        ({"Cats": {"percentile": 99.0, "multiplier": -1e300}}, "multiplier: expected a finite number"),
        ({"Cats": {"percentile": "99", "multiplier": -1}}, "percentile: expected a finite number, got str"),
        ({"Cats": {"percentile": True, "multiplier": -1}}, "percentile: expected a finite number, got True"),
        ({"Cats": {"percentile": 100, "multiplier": -1}}, "expected a number between 0 and 100, got 100"),
        ({3: {"percentile": 99, "multiplier": -1}}, "expected names of classes, got 3"),
    ],
    ids=[
        *(
            "list",
            "empty",
            "number",
            "missing",
            "both-keys",
            "two-rules",
            "infinite",
            "nan",
            "huge",
            "float32",
            "text",
        ),
        *("bool", "range", "name"),
    ],
)
def test_wrong_class_params(tmp_path, value, message):
    torch.save(value, tmp_path / "class_params.pth")
    with pytest.raises(ValueError, match=message):
        load_class_params(tmp_path / "class_params.pth")
