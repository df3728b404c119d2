"""The `--out` of every command that writes: refused before any work is done."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from lbdt.runs.reasons import unwritable

_PROBE = 1 << 16  # bytes: a disk with less room than that is full


def check_out(path: Path, what: str, option: str = "--out") -> None:
    """ValueError unless a file of this name can be written there, its folder made if needed; leaves nothing behind.

    `what` names the file in the message, e.g. "picture".
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
    """ValueError unless files can be written in a folder of this name, made if needed; leaves nothing behind."""
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option} {path}: is a file; give a folder")
        _name_fits(path)
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {unwritable(error)}") from error
    _probe(path, path, option)


def _name_fits(path: Path) -> None:
    """OSError where the file system refuses the name itself: by looking for it."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass


def _probe(path: Path, folder: Path, option: str) -> None:
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
