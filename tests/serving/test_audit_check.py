"""The audit's check: what it finds of everything that may happen to a file, and what it says of files that are fine."""

import json
import os
import time
from pathlib import Path

import pytest

from lbdt.serving.audit import AuditLog
from lbdt.serving.audit_check import verify
from lbdt.serving.audit_lines import MOST_LINE
from tests.serving.audits import KEY, faults, lines, put, rebuilt, record, values, with_record, written

# Files that are fine.


@pytest.mark.parametrize("key", [None, KEY], ids=["sha256", "hmac-sha256"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_finished_file(count, key, tmp_path):
    path = written(tmp_path, count, key)
    summary = verify(path, key=key, strict=True)
    assert summary == verify(tmp_path, key=key, strict=True)
    (file,) = summary.files
    assert (file.name, file.lines, file.finished, file.torn) == (path.name, count + 2, True, 0)
    assert file.last == json.loads(lines(path)[-1])["hash"]
    assert verify(path, key=key, expect=file.last).lines == summary.lines == count + 2
    assert summary.outcomes == {"protected": count, "unprotected": 0, "refused": 0, "failed": 0}


def test_pictures_are_counted_by_outcome_over_all_files(tmp_path):
    with AuditLog(tmp_path, max_lines=2) as log:
        log.write([record(0), record(0, index=1)])
        log.write([record(1, outcome="refused", reason="policy", image=None)])
        log.write([record(2, outcome="failed", reason="out of memory", image=None)])
    with AuditLog(tmp_path) as log:
        log.write([record(3, outcome="unprotected", concepts=())])
    summary = verify(tmp_path, strict=True)
    assert summary.outcomes == {"protected": 2, "unprotected": 1, "refused": 1, "failed": 1}
    assert (len(summary.files), summary.pictures, summary.lines) == (3, 5, 11)
    assert json.loads(json.dumps(summary.as_dict()))["outcomes"] == summary.outcomes


def test_a_file_that_is_being_written(tmp_path):
    log = AuditLog(tmp_path)
    assert verify(tmp_path).pictures == 0
    log.write([record(0)])
    summary = verify(tmp_path, expect=log.last_hash)
    assert not summary.finished and summary.pictures == 1 and summary.files[0].torn == 0
    assert faults(tmp_path, strict=True) == ["0: unfinished: it has no end line"]
    log.close()
    assert verify(tmp_path, strict=True).finished


@pytest.mark.parametrize("cut", [1, 2, 100, -1], ids=["line-end", "two-bytes", "100-bytes", "all-but-one"])
def test_a_line_that_a_kill_cut_off_is_no_fault_but_told(cut, tmp_path):
    path = written(tmp_path, 3)
    *whole, last, _ = lines(path)
    torn = last[:-cut]
    put(path, [*whole, torn])
    (file,) = verify(path).files
    assert (file.lines, file.torn, file.finished, file.outcomes["protected"]) == (3, len(torn), False, 2)
    assert file.last == json.loads(whole[-1])["hash"]
    assert faults(path, strict=True) == [
        f"0: unfinished: it has no end line, and its last line is cut off after {len(torn)} bytes"
    ]


@pytest.mark.parametrize("size", [0, 1, 200])
def test_a_writer_that_was_killed_in_its_header(size, tmp_path):
    path = written(tmp_path)
    os.truncate(path, size)
    (file,) = verify(tmp_path).files
    assert (file.lines, file.torn, file.last, file.finished) == (0, size, None, False)


@pytest.mark.parametrize(
    ("first", "second", "finished"),
    [
        pytest.param(0, None, [False, False], id="before-the-end-line"),
        pytest.param(9, None, [False, False], id="in-the-end-line"),
        pytest.param(None, None, [True, False], id="before-the-header"),
        pytest.param(None, 9, [True, False], id="in-the-header"),
    ],
)
def test_a_writer_that_was_killed_in_a_change_of_files(first, second, finished, tmp_path):
    """`first`: bytes of the end line, None: all of it; `second`: of the next file's header."""
    written(tmp_path, 3, max_lines=2)
    before, after = sorted(tmp_path.iterdir())
    *whole, end = lines(before)
    put(before, [*whole, end[:first]])
    put(after, [after.read_bytes()[: second or 0]])
    summary = verify(tmp_path)
    assert [file.finished for file in summary.files] == finished and summary.pictures == 2
    assert [file.torn for file in summary.files] == [first or 0, second or 0]


def test_zeros_that_a_power_cut_leaves_are_a_line_cut_off(tmp_path):
    path = written(tmp_path, 2)
    put(path, [*lines(path)[:-1], bytes(3 * MOST_LINE)])
    assert verify(path).files[0].torn > MOST_LINE and verify(path).pictures == 2


# Several files.


def chained(folder: Path) -> list[Path]:
    written(folder, 5, max_lines=2)
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("which", "found"),
    [
        pytest.param(0, ["follows: {0} is not in the folder"], id="first"),
        pytest.param(1, ["next: {1} is not in the folder", "follows: {1} is not in the folder"], id="middle"),
        pytest.param(2, ["next: {2} is not in the folder"], id="last"),
    ],
)
def test_a_file_that_is_missing(which, found, tmp_path):
    files = chained(tmp_path)
    files[which].unlink()
    assert [text.partition(": ")[2] for text in faults(tmp_path)] == [
        text.format(*(file.name for file in files)) for text in found
    ]
    for path in {*files} - {files[which]}:
        assert verify(path, strict=True).finished  # alone, a file is not asked for others


def test_files_that_were_exchanged(tmp_path):
    first, second, _ = chained(tmp_path)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    assert len(faults(tmp_path)) >= 3


def test_a_file_that_was_made_anew(tmp_path):
    _, second, _ = chained(tmp_path)
    second.write_bytes(
        rebuilt([with_record(seed=9)(v) if "record" in v else v for v in map(values, lines(second))])
    )
    assert [text.partition(": ")[2] for text in faults(tmp_path)] == [
        f"does not go on from the end of {second.name}, which names it"
    ]


def test_a_header_that_claims_a_file_before_it(tmp_path):
    first, second = written(tmp_path, 1), written(tmp_path, 0)
    header, *rest = map(values, lines(second))
    header |= {"follows": first.name, "previous": json.loads(lines(first)[-1])["hash"]}
    second.write_bytes(rebuilt([header, *rest]))
    assert faults(tmp_path) == [f"1: follows: {first.name} does not end by naming it"]


@pytest.mark.parametrize("together", [False, True], ids=["two-files", "one-file"])
def test_a_picture_has_one_line_in_all_files(together, tmp_path):
    for numbers in ([0, 1, 0],) if together else ([0, 1], [0]):
        with AuditLog(tmp_path) as log:
            for number in numbers:
                log.write([record(number, seed=len(numbers))])
    (told,) = faults(tmp_path)
    assert told.endswith(": request 'request-0', index 0: has a line already")


def test_requests_and_indices_are_not_run_together(tmp_path):
    with AuditLog(tmp_path) as log:
        log.write(
            [
                record(0, request="11", index=1),
                record(0, request="1", index=11),
                record(0, request="1", index=1),
            ]
        )
    assert verify(tmp_path).pictures == 3


# What cannot be read.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(
            lambda path: None, r"cannot be read \(No such file or directory\); expected an audit", id="none"
        ),
        pytest.param(
            lambda path: path.mkdir(), "no audit in it; expected files named audit-", id="empty-folder"
        ),
        pytest.param(lambda path: os.mkfifo(path), "not a regular file", id="fifo"),
        pytest.param(lambda path: path.symlink_to(path), "cannot be read", id="loop"),
    ],
)
def test_places_that_are_no_audit(make, words, tmp_path):
    make(tmp_path / "place")
    with pytest.raises(ValueError, match=f"place: {words}"):
        verify(tmp_path / "place")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            {"expect": "0" * 63}, "expect: expected 64 lower-case hexadecimal digits, got '000", id="hash"
        ),
        pytest.param({"expect": "A" * 64}, "expect: expected 64 lower-case", id="capital"),
        pytest.param({"key": b"k"}, "key: expected at least 16 bytes, got 1", id="key"),
    ],
)
def test_arguments_that_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        verify(written(tmp_path), **options)


def test_a_hundred_thousand_lines_take_seconds(tmp_path):
    with AuditLog(tmp_path, sync=False) as log:
        for first in range(0, 100_000, 5000):
            log.write([record(number) for number in range(first, first + 5000)])
    start = time.perf_counter()
    assert verify(tmp_path, strict=True).pictures == 100_000
    assert time.perf_counter() - start < 60  # 3 s on an idle core; the machine may be busy
