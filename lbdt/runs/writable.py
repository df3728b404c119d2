"""Whether something can be written, asked of every `--out` before any work is done, and in words why it cannot."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

_PROBE = 1 << 16  # bytes: a disk with less room than that is full
_ELSEWHERE = "give a place in a folder of yours"
_ROOM = "make room there, or write to another disk"
_WORDS = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("your disk quota is used up", _ROOM),
    errno.EFBIG: ("the file would be larger than is allowed there", _ROOM),
    errno.EROFS: ("the file system is read-only", _ELSEWHERE),
    errno.EACCES: ("you may not write there", _ELSEWHERE),
    errno.EPERM: ("you may not write there", _ELSEWHERE),
    errno.ENOTDIR: ("a file is in the way of a folder", "give another name"),
    errno.EISDIR: ("a folder is in the way of a file", "give another name"),
    errno.EEXIST: ("something is in the way", "give another name"),
    errno.ENOENT: ("no such folder, or none that takes files", _ELSEWHERE),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "give a shorter one"),
    errno.ELOOP: ("links lead in a circle", "give another name"),
    errno.EILSEQ: ("this file system has no such characters", "give another name"),
    errno.EINVAL: ("this file system has no such names", "give another name"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "try again later"),
    errno.EIO: ("the disk failed", "give another place"),
    errno.ESTALE: ("the network disk has gone", "mount it again"),
    errno.ETXTBSY: ("the file is being run", "give another name"),
}


def check_out(path: Path, what: str, option: str = "--out") -> None:
    """ValueError unless a file of this name can be written there, its folder made if needed; leaves nothing behind.

    `what` names the file in the message, e.g. "picture", and `option` is where the path was given.
    """
    try:
        if path.is_dir():
            raise ValueError(f"{option} {path}: is a folder; give the {what}'s file name")
        if path.exists():
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not path.is_file():
                return  # a device or a pipe, which is written to as it is
        _name_fits(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {unwritable(error)}") from error
    # A link is followed: its file is beside its target.
    _probe(path, Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent, option)


def check_out_folder(path: Path, option: str = "--out") -> None:
    """ValueError unless files can be written in a folder of this name, made if needed; leaves nothing behind. `option`
    is where the path was given."""
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option} {path}: is a file; give a folder")
        _name_fits(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {unwritable(error)}") from error
    _probe(path, path, option)


def unwritable(error: OSError) -> str:
    """Why something could not be written, and what to do: "the disk is full; make room, ..."."""
    reason, remedy = _WORDS.get(
        error.errno, (error.strerror or str(error) or type(error).__name__, _ELSEWHERE)
    )
    return f"{reason}; {remedy}"


def worded(error: OSError) -> str:
    """An OSError that nobody caught, with its file and without its number."""
    if error.errno not in _WORDS or error.filename is None:
        return error.strerror if error.filename is None and error.strerror else str(error)
    if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):  # of reading as well
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return f"{os.fsdecode(error.filename)}: {unwritable(error)}"


def _name_fits(path: Path) -> None:
    """OSError where the file system refuses the name itself: by looking for it."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass


def _probe(path: Path, folder: Path, option: str = "--out") -> None:
    """ValueError unless a file of some size can be written in `folder`, or in the nearest one above that there is."""
    try:
        folder = folder.absolute()
        there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {unwritable(error)}") from error
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot write in {there}: {unwritable(error)}") from error
