"""One `lbdt` command in a process of its own that something goes wrong for: killed or interrupted before its nth change
to the disk, without room, or without the right to write."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_TORN = 64  # bytes
_CAPABILITIES = 0x20080522  # version 3 of their layout


@dataclass(frozen=True)
class Fault:
    """What goes wrong; nothing by default."""

    signal: int | None = None
    full: bool = False
    """No file may grow any more."""
    torn: bool = False
    """The kernel ends the process in its next write, of which only the first bytes are written."""
    at: int = 0
    """It comes before so many changes and one more: files opened to write, renamed, removed, made."""
    powerless: bool = False
    """It runs without root's right to write where the permissions forbid it."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """The exit code; negative: the signal that ended it."""
    changes: str
    """Changes to files below the folder that was watched: "w" for each that was opened to write, "." for another."""
    errors: str
    """What it said on stderr."""

    @property
    def told(self) -> str:
        """The one line of a failure; empty where there is none, or more than one, or a traceback."""
        lines = [line for line in self.errors.splitlines() if line.startswith("lbdt: ")]
        return lines[0] if len(lines) == 1 and "Traceback" not in self.errors else ""


class Running:
    """A command that has been started by fork, so that nothing has to be imported again.

    The process that forks must not have run anything on several threads.
    """

    def __init__(self, arguments: Sequence[str], watched: Path, fault: Fault) -> None:
        # Pipes, as a limit on the size of files would hold for a file of errors too.
        self._errors, errors = os.pipe()
        self._changes, self._changed = os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if not self._pid:
            code = 70
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(errors, 2)
                code = self._child(arguments, watched, fault)
            finally:
                os._exit(code)
        os.close(errors)
        os.close(self._changed)

    def kill(self) -> None:
        """Kill -9."""
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Waits until it has ended."""
        with os.fdopen(self._errors, "rb") as errors, os.fdopen(self._changes, "rb") as changes:
            said, changed = errors.read().decode(errors="replace"), changes.read().decode()
        status = os.waitpid(self._pid, 0)[1]
        return Ended(os.waitstatus_to_exitcode(status), changed, said)

    def _child(self, arguments: Sequence[str], watched: Path, fault: Fault) -> int:
        from lbdt.cli import app

        signal.signal(signal.SIGINT, signal.default_int_handler)
        if fault.powerless:
            header, none = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
            if ctypes.CDLL(None).capset(header, none):
                return 71
        sys.addaudithook(self._counter(str(watched), fault))
        try:
            app(list(arguments), prog_name="lbdt")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            return 72
        return 0

    def _counter(self, watched: str, fault: Fault) -> Any:
        left = fault.at

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event == "open":
                path, _, flags = arguments
                changes = isinstance(flags, int) and flags & _WRITES
            else:
                path, changes = (arguments or ("",))[0], event in _CHANGES
            # Within a folder that is being removed names are relative.
            if not changes or not isinstance(path, str | os.PathLike):
                return
            path = os.fspath(path)
            if not isinstance(path, str) or (os.path.isabs(path) and not path.startswith(watched)):
                return
            if left == 0 and fault.torn:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (_TORN, _TORN))
            elif left == 0 and fault.full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            elif left == 0 and fault.signal is not None:
                os.kill(os.getpid(), fault.signal)
            left -= 1
            os.write(self._changed, b"w" if event == "open" else b".")

        return count


def run(arguments: Sequence[str], watched: Path, fault: Fault | None = None) -> Ended:
    """Runs `lbdt` with these arguments."""
    return Running(arguments, watched, fault or Fault()).wait()


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk of `size` bytes at `folder`; False where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
