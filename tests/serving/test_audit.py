"""The audit's writer: its files, and those who share it."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lbdt.serving.audit import AuditError, AuditLog, read_key
from lbdt.serving.audit_check import verify
from lbdt.serving.audit_lines import MOST_LINE
from tests.serving.audits import KEY, fields, lines, record, written

# The file.


def test_a_file_is_a_header_its_pictures_and_an_end(tmp_path):
    folder = tmp_path / "new" / "audit"
    with AuditLog(folder) as log:
        first = log.last_hash
        second = log.write([record(0), record(1)])
        assert log.write([]) == second == log.last_hash != first
    header, *pictures, end = map(json.loads, lines(log.path))
    assert log.path.name.startswith("audit-") and stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert (header["lbdt_audit"], header["hashing"], header["hash"]) == (1, "sha256", first)
    assert header["follows"] is header["previous"] is None and len(header["chain"]) == 64
    assert [line["n"] for line in pictures] == [1, 2] and pictures[1]["hash"] == second
    assert [line["previous"] for line in (*pictures, end)] == [first, pictures[0]["hash"], second]
    assert (end["end"], end["next"], end["hash"]) == (2, None, log.last_hash)


@pytest.mark.parametrize(("sync", "synced"), [(True, ["folder", 1, 3, 3, 4]), (False, [])])
def test_what_is_on_the_disk_when_a_call_returns(sync, synced, tmp_path, monkeypatch):
    """The folder with the file's name in it, then every call's lines."""
    found, fsync = [], os.fsync

    def counted(handle):
        folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        found.append("folder" if folder else len(lines(next(tmp_path.iterdir()))))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counted)
    with AuditLog(tmp_path, sync=sync) as log:
        log.write([record(0), record(1)])
        log.write([])
    assert found == synced


def test_two_writers_have_a_file_and_a_chain_each(tmp_path):
    paths = {written(tmp_path / "audit", 0) for _ in range(3)}
    chains = {json.loads(lines(path)[0])["chain"] for path in paths}
    assert len(paths) == len(chains) == 3


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        pytest.param({"max_lines": 3}, [3, 3, 1], id="lines"),
        pytest.param({"max_lines": 7}, [7], id="just-full"),
        pytest.param({"max_lines": 1}, [1] * 7, id="one-each"),
        pytest.param({"max_bytes": 1}, [1] * 7, id="one-byte"),
    ],
)
def test_the_chain_goes_on_in_another_file(options, counts, tmp_path):
    written(tmp_path, 7, **options)
    files = sorted(tmp_path.iterdir())
    ends = [json.loads(lines(path)[-1]) for path in files]
    headers = [json.loads(lines(path)[0]) for path in files]
    assert [end["end"] for end in ends] == counts
    assert [end["next"] for end in ends] == [*(path.name for path in files[1:]), None]
    assert [header["follows"] for header in headers] == [None, *(path.name for path in files[:-1])]
    assert [header["previous"] for header in headers] == [None, *(end["hash"] for end in ends[:-1])]
    assert len({header["chain"] for header in headers}) == 1 and verify(tmp_path, strict=True).pictures == 7


def test_a_call_s_lines_are_not_divided(tmp_path):
    with AuditLog(tmp_path, max_lines=3) as log:
        log.write([record(0)])
        log.write([record(number) for number in range(1, 6)])
        log.write([record(6)])
    assert [file.outcomes["protected"] for file in verify(tmp_path, strict=True).files] == [1, 5, 1]


def test_a_line_that_is_too_long_is_refused_and_nothing_is_written(tmp_path):
    with AuditLog(tmp_path) as log:
        before = log.path.read_bytes()
        with pytest.raises(
            ValueError, match=f"at most {MOST_LINE} bytes a line, got 1.* 1100 concepts and 3 steps"
        ):
            log.write([record(0), record(1, concepts=["x" * 1000] * 1100)])
        assert log.path.read_bytes() == before


@pytest.mark.parametrize(
    ("given_records", "words"),
    [
        pytest.param([fields()], "records: expected PictureRecord, got dict", id="dict"),
        pytest.param(record(), "records: expected a sequence of PictureRecord, got PictureRecord", id="one"),
        pytest.param(
            (record(n) for n in range(2)), "records: expected a sequence .* got generator", id="generator"
        ),
    ],
)
def test_what_write_refuses(given_records, words, tmp_path):
    with AuditLog(tmp_path) as log, pytest.raises(ValueError, match=words):
        log.write(given_records)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"key": b"short"}, "key: expected at least 16 bytes, got 5", id="short-key"),
        pytest.param({"key": "k" * 32}, "key: expected bytes, got str", id="text-key"),
        pytest.param({"max_lines": 0}, "max_lines: expected a whole number from 1, got 0", id="no-lines"),
        pytest.param({"max_bytes": 1.5}, "max_bytes: expected a whole number from 1, got 1.5", id="bytes"),
    ],
)
def test_what_a_log_refuses(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        AuditLog(tmp_path / "audit", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "key"),
    [
        pytest.param(KEY, KEY, id="bytes"),
        pytest.param(KEY.hex().encode() + b"\n", KEY.hex().encode(), id="line-end"),
        pytest.param(KEY + b"\r\n\n", KEY, id="line-ends"),
    ],
)
def test_a_key_is_read_without_line_ends(data, key, tmp_path):
    (tmp_path / "key").write_bytes(data)
    assert read_key(tmp_path / "key") == key


def test_a_key_that_cannot_be_used_is_told_with_its_file(tmp_path):
    (tmp_path / "key").write_bytes(b"abc\n")
    with pytest.raises(ValueError, match="key: key: expected at least 16 bytes, got 3; make one of 32"):
        read_key(tmp_path / "key")
    with pytest.raises(ValueError, match="none: the key cannot be read"):
        read_key(tmp_path / "none")


# Threads and processes.


def test_eight_threads_share_a_log(tmp_path):
    def write(thread: int) -> None:
        for number in range(200):
            log.write([record(1000 * thread + number)])

    with AuditLog(tmp_path, sync=False, max_lines=300) as log:
        threads = [threading.Thread(target=write, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    summary = verify(tmp_path, strict=True)
    assert summary.pictures == 1600 and len(summary.files) == 6


def test_a_forked_process_makes_its_own_log(tmp_path):
    log = AuditLog(tmp_path)
    with log._lock:  # as a thread of the parent may have it
        child = os.fork()
        if child == 0:
            try:
                log.write([record(0)])
            except AuditError as error:
                log.close()
                os._exit(0 if "make an AuditLog in each process" in str(error) else 1)
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    log.write([record(0)])
    log.close()
    assert verify(tmp_path, strict=True).pictures == 1


WRITER = """
import sys
from lbdt.serving.audit import AuditLog
from tests.serving.audits import record
log = AuditLog(sys.argv[1], max_lines=50)
number = 0
while True:
    log.write([record(number), record(number + 1)])
    number += 2
    print(number, flush=True)
"""


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_writer_s_lines_are_whole(seed, tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    path = os.pathsep.join([str(root), *sys.path])
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    ) as writer:
        told = int(writer.stdout.readline())
        time.sleep(random.Random(seed).uniform(0, 0.3))
        writer.send_signal(signal.SIGKILL)
        told = [told, *map(int, writer.stdout.read().split())][-1]
    summary = verify(tmp_path)
    begun = [file for file in summary.files if file.lines]  # the next file may have been made, and no more
    assert not summary.finished and len(summary.files) - len(begun) <= 1
    assert all(file.finished for file in begun[:-1])
    assert summary.pictures in range(told, told + 3)  # the last call may not have come to its end


def test_importing_the_audit_imports_nothing_heavy():
    code = (
        "import sys, lbdt.serving.audit, lbdt.serving.audit_check\n"
        "print([m for m in ('torch', 'ray', 'pydantic', 'numpy', 'tqdm', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
