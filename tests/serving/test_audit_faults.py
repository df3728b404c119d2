"""Disks, people and interruptions in the way of the audit's writer: a call's lines are written wholly or not."""

import errno
import os
from pathlib import Path

import pytest

from lbdt.serving.audit import AuditError, AuditLog
from lbdt.serving.audit_check import verify
from tests.serving.audits import lines, record


def broken(monkeypatch, name: str, *results):
    """Puts `results` in place of the next calls of an `os` function: an errno; a number of bytes; None: as it is."""
    left, original = list(results), getattr(os, name)

    def call(*arguments):
        result = left.pop(0) if left else None
        if result is None:
            return original(*arguments)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return original(arguments[0], arguments[1][:result])

    monkeypatch.setattr(os, name, call)
    return left


@pytest.mark.parametrize(
    ("name", "result", "words"),
    [
        pytest.param("write", 0, "only 0 of", id="nothing-written"),
        pytest.param(
            "write", 1, "only 1 of .* bytes were written, as on a full disk; make room", id="one-byte"
        ),
        pytest.param("write", 700, "only 700 of", id="a-line-and-a-part"),
        pytest.param("write", -errno.ENOSPC, "the disk is full; make room there", id="full"),
        pytest.param("write", -errno.EIO, "the disk failed", id="disk-failed"),
        pytest.param("fsync", -errno.EIO, "cannot be written: the disk failed", id="not-synced"),
    ],
)
def test_a_write_that_fails_leaves_nothing_and_may_be_tried_again(name, result, words, tmp_path, monkeypatch):
    with AuditLog(tmp_path) as log:
        log.write([record(0)])
        before = log.path.read_bytes()
        with monkeypatch.context() as patch:
            broken(patch, name, result)
            with pytest.raises(AuditError, match=f"{log.path}: .*{words}.*; release none of these pictures"):
                log.write([record(1), record(2)])
        assert log.path.read_bytes() == before
        log.write([record(1), record(2)])
    assert verify(tmp_path, strict=True).pictures == 3


def test_what_could_not_be_cut_off_is_by_the_next_call(tmp_path, monkeypatch):
    with AuditLog(tmp_path) as log:
        log.write([record(0)])
        before = log.path.read_bytes()
        with monkeypatch.context() as patch:
            broken(patch, "write", 9, 9)
            left = broken(patch, "ftruncate", -errno.EIO, -errno.EIO, -errno.EIO)
            for _ in range(2):
                with pytest.raises(AuditError):
                    log.write([record(1)])
            assert left == [] and len(log.path.read_bytes()) == len(before) + 9
        log.write([record(1)])
    assert verify(tmp_path, strict=True).pictures == 2


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_an_interruption_leaves_whole_lines(moment, tmp_path, monkeypatch):
    def interrupted(*arguments):
        if moment == "write":
            original(arguments[0], arguments[1][:20])
        raise KeyboardInterrupt

    original = getattr(os, moment)
    with AuditLog(tmp_path) as log:
        with monkeypatch.context() as patch:
            patch.setattr(os, moment, interrupted)
            with pytest.raises(KeyboardInterrupt):
                log.write([record(0)])
        log.write([record(0)])
    assert verify(tmp_path, strict=True).pictures == 1


@pytest.mark.parametrize(
    ("results", "finished"),
    [
        pytest.param([-errno.ENOSPC], [2, 1], id="end-line"),
        pytest.param([-errno.ENOSPC, -errno.ENOSPC], [2, 1], id="end-line-twice"),
        pytest.param([None, 5], [2, 1], id="header"),
        pytest.param([None, 5, 5], [2, 1], id="header-twice"),
        pytest.param([None, None, 5], [2, 1], id="picture"),
    ],
)
def test_a_change_of_files_that_fails_goes_on_with_the_next_call(results, finished, tmp_path, monkeypatch):
    with AuditLog(tmp_path, max_lines=2) as log:
        log.write([record(0)])
        log.write([record(1)])
        with monkeypatch.context() as patch:
            left = broken(patch, "write", *results)
            while left:
                with pytest.raises(AuditError):
                    log.write([record(2)])
                verify(tmp_path)
        log.write([record(2)])
    assert [file.outcomes["protected"] for file in verify(tmp_path, strict=True).files] == finished


@pytest.mark.parametrize("then", ["write", "close"])
def test_a_change_of_files_that_is_interrupted_after_the_end_line(then, tmp_path, monkeypatch):
    """Also where what comes next would have had room in the file before."""

    def interrupted(*arguments):
        end(*arguments)
        raise KeyboardInterrupt

    log = AuditLog(tmp_path, max_lines=2)
    end = log._end
    log.write([record(0)])
    with monkeypatch.context() as patch:
        patch.setattr(log, "_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.write([record(1), record(2)])
    if then == "write":
        log.write([record(1)])
    log.close()
    assert verify(tmp_path, strict=True).pictures == 1 + (then == "write")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "results",
    [
        pytest.param([-errno.ENOSPC], id="before-the-end-line"),
        pytest.param([None, -errno.ENOSPC], id="after-it"),
    ],
)
@pytest.mark.parametrize("full", [False, True], ids=["room-again", "still-full"])
def test_a_log_that_is_closed_in_a_change_of_files(results, full, tmp_path, monkeypatch):
    """Its file's end line may name the next one, which stays then."""
    log = AuditLog(tmp_path, max_lines=1)
    log.write([record(0)])
    with monkeypatch.context() as patch:
        broken(patch, "write", *results)
        with pytest.raises(AuditError):
            log.write([record(1)])
        if full:
            broken(patch, "write", -errno.ENOSPC)
            with pytest.raises(AuditError):
                log.close()
    log.close()
    assert verify(tmp_path).pictures == 1 and verify(tmp_path).finished is not full
    assert len(list(tmp_path.iterdir())) == len(results)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(lambda path: path.unlink(), "was removed or renamed", id="removed"),
        pytest.param(lambda path: path.rename(path.with_name("x")), "was removed or renamed", id="renamed"),
        pytest.param(lambda path: replace(path), "was replaced by another file", id="replaced"),
        pytest.param(lambda path: link(path), "was replaced by another file", id="link"),
        pytest.param(lambda path: os.truncate(path, 0), "was cut by others to 0 of", id="emptied"),
        pytest.param(lambda path: os.truncate(path, 300), "was cut by others to 300 of", id="cut"),
        pytest.param(lambda path: append(path, b"x"), "was written to by others: expected", id="written-to"),
    ],
)
@pytest.mark.parametrize("during", [False, True], ids=["before", "during"])
def test_a_file_that_others_touch_takes_no_line_any_more(fault, words, during, tmp_path, monkeypatch):
    log = AuditLog(tmp_path)
    log.write([record(0)])
    if during:
        original = os.fsync

        def touched(handle):
            original(handle)
            monkeypatch.setattr(os, "fsync", original)
            fault(log.path)

        monkeypatch.setattr(os, "fsync", touched)
    else:
        fault(log.path)
    for _ in range(2):
        with pytest.raises(AuditError, match=f"{words}.*close this log and make another.*; release none"):
            log.write([record(1)])
    with pytest.raises(AuditError, match=words):
        log.close()
    log.close()


def replace(path: Path) -> None:
    path.with_name("x").write_bytes(path.read_bytes())
    os.replace(path.with_name("x"), path)


def link(path: Path) -> None:
    path.rename(path.with_name("x"))
    path.symlink_to("x")


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_what_others_append_is_left_to_be_found(tmp_path):
    log = AuditLog(tmp_path)
    append(log.path, b"x" * 5)
    with pytest.raises(AuditError):
        log.write([record(0)])
    assert log.path.read_bytes().endswith(b"}\nxxxxx")


@pytest.mark.parametrize("call", ["open", "write"])
def test_a_folder_that_takes_no_file(call, tmp_path, monkeypatch):
    """As root, who runs the tests in many places, may write anywhere."""
    broken(monkeypatch, call, -errno.EROFS)
    with pytest.raises(
        AuditError, match="audit-.*the file system is read-only; give a place in a folder of yours"
    ):
        AuditLog(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder(tmp_path, monkeypatch):
    """In a child that is nobody, as root may write anywhere."""
    tmp_path.chmod(0o555)
    monkeypatch.chdir(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            AuditLog(".")
        except AuditError as error:
            os._exit(0 if "you may not write there; give a place in a folder of yours" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "audit").write_text("")
    with pytest.raises(AuditError, match="audit: cannot be made: something is in the way; give another name"):
        AuditLog(tmp_path / "audit")


def test_a_closed_log_takes_nothing(tmp_path):
    log = AuditLog(tmp_path)
    log.close()
    log.close()
    with pytest.raises(AuditError, match="is closed; make another AuditLog"):
        log.write([record(0)])
    assert len(lines(log.path)) == 2
