"""Why a file cannot be read or written, in words; one function for every OSError."""

from __future__ import annotations

import errno
import os

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
