"""`lbdt.runs.files`: files are whole or absent, and nothing of a killed process stays."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from lbdt.runs.files import read_json, read_tensors, tensor_bytes, write_file, write_files, writing
from tests.repeats import MISALIGNED


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_whole_and_in_pieces(tmp_path):
    write_files(tmp_path / "new", {"a.bin": b"one", "b.bin": (b"two", memoryview(b"three"))})
    assert names(tmp_path / "new") == ["a.bin", "b.bin"]
    assert (tmp_path / "new/b.bin").read_bytes() == b"twothree"
    assert (tmp_path / "new/a.bin").stat().st_mode & 0o777 == 0o644


def test_a_failure_leaves_every_file_as_it_was(tmp_path):
    write_files(tmp_path, {"a.bin": b"old"})
    with pytest.raises(TypeError):
        write_files(tmp_path, {"a.bin": b"new", "b.bin": "no bytes"})
    assert names(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"old"


def test_what_a_killed_process_left_is_removed_but_not_what_is_in_use(tmp_path):
    for name in (".lbdt-training.ckpt.x1", ".lbdt-sae.safetensors.used", ".mine", "lbdt-report.json"):
        (tmp_path / name).write_bytes(b"half")
    with (tmp_path / ".lbdt-sae.safetensors.used").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_files(tmp_path, {"report.json": b"{}"})
        assert names(tmp_path) == [".lbdt-sae.safetensors.used", ".mine", "lbdt-report.json", "report.json"]
    write_files(tmp_path, {"report.json": b"{}"})
    assert names(tmp_path) == [".mine", "lbdt-report.json", "report.json"]


def test_a_killed_process_leaves_no_folder_behind_that_is_not_in_use(tmp_path):
    for name in (".lbdt-x.dead.new", ".lbdt-x.used.new", ".lbdt-mine"):
        (tmp_path / name / "part").mkdir(parents=True)
    handle = os.open(tmp_path / ".lbdt-x.used.new", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_files(tmp_path, {"a": b""})
    assert names(tmp_path) == [".lbdt-mine", ".lbdt-x.used.new", "a"]
    os.close(handle)
    write_files(tmp_path, {"a": b""})
    assert names(tmp_path) == [".lbdt-mine", "a"]


@contextlib.contextmanager
def no_file_beyond(size):
    """What the kernel answers on a full disk, but for its words; needs no rights and no disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 1 << 20], ids=["no room", "room for one"])
def test_without_room_the_old_files_stay_and_the_file_is_named(tmp_path, size):
    write_files(tmp_path, {"a.bin": b"old", "b.bin": b"old"})
    data = bytes(3 << 20)
    with no_file_beyond(size), pytest.raises(OSError) as caught:
        write_files(tmp_path, {"a.bin": b"new", "b.bin": data})
    name = "b.bin" if size else "a.bin"
    assert str(caught.value) == (
        f"{tmp_path / name}: cannot be written: the file would be larger than is allowed there; make room there, or "
        "write to another disk"
    )
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == ["a.bin", "b.bin"] and (tmp_path / "a.bin").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EROFS, "a folder of yours"),
        (errno.EACCES, "a folder of yours"),
        (errno.EIO, "give another place"),
    ],
    ids=["full", "quota", "read-only", "forbidden", "broken"],
)
def test_each_reason_has_its_own_remedy(tmp_path, code, words):
    with pytest.raises(OSError) as caught, writing(tmp_path / "x"):
        raise OSError(code, os.strerror(code), "somewhere")
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: cannot be written: ")
    assert os.strerror(code) not in str(caught.value) and "Errno" not in str(caught.value)
    assert words in str(caught.value) and caught.value.errno == code


def test_a_full_device_and_one_that_takes_all_stay_devices():
    with pytest.raises(OSError, match="/dev/full: cannot be written: the disk is full; make room"):
        write_file(Path("/dev/full"), b"data")
    write_file(Path("/dev/null"), b"data")
    assert not os.path.isfile("/dev/null")


def test_a_link_is_followed_and_a_long_name_is_a_name(tmp_path):
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"1"
    name = "\N{SNOWMAN}" * 85
    write_file(tmp_path / name, b"2")
    assert (tmp_path / name).read_bytes() == b"2"


def test_a_fifo_among_the_leftovers_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lbdt-fifo")
    write_files(tmp_path, {"report.json": b"{}"})
    assert names(tmp_path) == ["report.json"]


@pytest.mark.parametrize("text", ["1" * 400, "[" * 200_000, "{"], ids=["huge integer", "deep", "cut off"])
def test_json_that_would_break_its_reader_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_json_keeps_every_64_bit_integer(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([2**63 - 1, -(2**63)]))
    assert read_json(tmp_path / "a.json") == [2**63 - 1, -(2**63)]


def test_tensors_are_read_into_memory_of_their_own(tmp_path):
    # A mapped file would change them with it, and lay them where products may round differently.
    path, values = tmp_path / "a.safetensors", torch.arange(5.0)
    path.write_bytes(tensor_bytes({"a": values, "odd": torch.zeros(3, dtype=torch.uint8)}, None))
    read = read_tensors(path, {"a": (5,), "odd": (3,)})
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(read["a"], values)
    assert MISALIGNED or all(tensor.data_ptr() % 64 == 0 for tensor in read.values())
