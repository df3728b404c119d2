"""Folders that belong to one run at a time, and folders whose files belong together: replaced whole, and checked."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from lbdt.runs.digests import blocks, sha256
from lbdt.runs.files import json_bytes, read_json, remove_leftovers, temporary_folder, write_files, writing
from lbdt.runs.reading import listed, open_regular

DIGESTS_FILE = "digests.json"
PARTS = (
    "sae/cfg.json",
    "sae/sae.safetensors",
    "dictionary/dictionary.json",
    "dictionary/dictionary.safetensors",
)
"""What an eraser and a steering are made of."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF)
"""What network file systems without locks answer, EBADF for a folder."""
_new: set[Path] = set()


@contextlib.contextmanager
def held(folder: Path, command: str, shared: bool = False) -> Iterator[None]:
    """Holds `folder`, made if needed, against other runs; the processes of one run share it.

    The lock ends with the process, however it ends. On file systems without locks nothing is held. A folder that was
    made here and is still empty in the end is removed.

    Raises:
        ValueError: another run holds it, a `command` perhaps.
        OSError: it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another `{command}` is writing there; wait for it, or give another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def replaced(folder: Path, own: Collection[str]) -> Iterator[Path]:
    """An empty folder, which takes the place of `folder` when the block ends, and is removed if the block fails.

    `own`: the names that belong together. Of those that `folder` holds none is left; other files stay. At any moment
    `folder` is the old or the new one; where the file system cannot exchange folders, or where others than files are
    beside `own`, it is for a moment one that lacks some of them, never one of old and new.

    Raises:
        OSError: the folder, why it cannot be written, and what to do.
    """
    folder = Path(os.path.realpath(folder))
    if folder in _new:
        yield folder
        return
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        others = _others(folder, own)
        inside = others is None or os.path.ismount(folder) or folder == Path.cwd()
        inside = inside or (folder.exists() and not os.access(folder.parent, os.W_OK))
        place = folder if inside else folder.parent
        remove_leftovers(place)
        new = temporary_folder(place, folder.name)
        handle = os.open(new, os.O_RDONLY)
    _new.add(new)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield new
        with writing(folder):
            shutil.copymode(folder, new) if folder.exists() else new.chmod(0o755)
            if inside or not _exchange(new, folder, others):
                _move_in(new, folder, own)
    finally:
        _new.discard(new)
        os.close(handle)
        shutil.rmtree(new, ignore_errors=True)


def write_folder(directory: Path, contents: Mapping[str, bytes]) -> None:
    """`write_files` for files that belong together: those of an earlier call are replaced all at one moment."""
    if not any((directory / name).exists() for name in contents):
        write_files(directory, contents)
        return
    with replaced(directory, contents) as new:
        write_files(new, contents)


def write_digests(folder: Path) -> None:
    """Writes the SHA-256 of an eraser's PARTS to `digests.json`.

    A file of its own, and not a key of the configuration, where older versions of lbdt would refuse it.
    """
    write_files(folder, {DIGESTS_FILE: json_bytes({name: _sha256(folder / name) for name in PARTS})})


def check_digests(folder: Path) -> None:
    """ValueError, naming the file, unless the PARTS are those of the folder's `digests.json`; one without it passes."""
    path = folder / DIGESTS_FILE
    if not path.is_file():
        return
    digests = read_json(path)
    if not isinstance(digests, dict) or set(digests) != set(PARTS):
        raise ValueError(
            f"{path}: expected the SHA-256 of {', '.join(PARTS)}; the file is damaged, get it again"
        )
    for name, expected in digests.items():
        got = _sha256(folder / name) if (folder / name).is_file() else None
        if got != expected:
            found = "no such file" if got is None else f"SHA-256 {got[:12]}..."
            raise ValueError(
                f"{folder / name}: expected SHA-256 {listed([expected])[:12]}... by {DIGESTS_FILE}, got {found}; the "
                f"file is damaged or of another folder: get or make them all again (delete {DIGESTS_FILE} "
                "if you changed it)"
            )


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return sha256(blocks(file))


def _others(folder: Path, own: Collection[str]) -> list[Path] | None:
    """The files of a folder beside `own`; None where there are others than files."""
    if not folder.exists():
        return []
    others = [path for path in folder.iterdir() if path.name not in own]
    return others if all(path.is_file() and not path.is_symlink() for path in others) else None


def _exchange(new: Path, folder: Path, others: Collection[Path]) -> bool:
    """Puts `new`, with links to the `others` in it, in the place of `folder`; False where it cannot be done at once."""
    try:
        for path in others:
            os.link(path, new / path.name)
        if not folder.exists():
            os.rename(new, folder)
            return True
        sys.audit("os.rename", str(new), str(folder), -1, -1)
        names = (os.fsencode(new), os.fsencode(folder))
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
    except (OSError, AttributeError):
        return False


def _move_in(new: Path, folder: Path, own: Collection[str]) -> None:
    """Removes `own` from `folder`, JSON first, and moves those of `new` there, JSON last: without it none is read."""
    folder.mkdir(exist_ok=True)
    for name in sorted(own, key=lambda name: not name.endswith(".json")):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for name in sorted(own, key=lambda name: name.endswith(".json")):
        if (new / name).exists():
            os.rename(new / name, folder / name)
