"""`lbdt.files`: files are whole or absent, and nothing of a killed process stays."""

import fcntl
import json

import pytest

from lbdt.files import read_json, write_files


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


@pytest.mark.parametrize("text", ["1" * 400, "[" * 200_000, "{"], ids=["huge integer", "deep", "cut off"])
def test_json_that_would_break_its_reader_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_json_keeps_every_64_bit_integer(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([2**63 - 1, -(2**63)]))
    assert read_json(tmp_path / "a.json") == [2**63 - 1, -(2**63)]
