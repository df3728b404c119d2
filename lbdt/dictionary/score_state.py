"""The state of an unfinished `score`: one file for each process and pass, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lbdt.runs.files import open_tensors, read_tensors, remove_leftovers, write_files
from lbdt.runs.reading import parse_json

_PREFIX = "score.state"
_POLL_SECONDS = 0.2


class Finished(Exception):
    """The first process has written the dictionary, so there is nothing left to do for this one."""


class ScoreState:
    """The files `score.state.PASS-PROCESS-of-PROCESSES.safetensors` of one run in a folder.

    Each holds the pass's tensors, how many shards they are of, the run's settings, and a SHA-256 of all that.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Mapping[str, Any]],  # what each pass depends on
        process: int,
        processes: int,
        finished: Callable[[], bool],  # whether the folder holds the dictionary of these settings
    ) -> None:
        """Refuses a folder with the state of other settings or with a damaged one: ValueError naming the file."""
        self.folder, self.process, self.processes, self._finished = folder, process, processes, finished
        self._settings = plain(settings)
        for path in self._all():
            self._header(path)

    def load(
        self, name: str, process: int, shapes: Mapping[str, Any]
    ) -> tuple[int, dict[str, Tensor]] | None:
        """Shards done and tensors of a process in a pass; None where there is no file.

        Raises:
            ValueError: naming the file: damaged, or of other settings.
        """
        path = self._path(name, process)
        header = self._header(path)
        if header is None:
            return None
        try:
            tensors = read_tensors(path, shapes, torch.float64)
        except ValueError:
            if path.is_file():
                raise
            return None
        if header["sha256"] != _sha256(header["settings"], header["done"], tensors):
            raise _damaged(path, "its contents are not those that were written")
        return int(header["done"]), tensors

    def save(self, name: str, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Replaces this process's file of a pass."""
        settings = json.dumps(self._settings[name], sort_keys=True)
        about = {"settings": settings, "done": str(done), "sha256": _sha256(settings, str(done), tensors)}
        path = self._path(name, self.process)
        write_files(self.folder, {path.name: safetensors.torch.save(dict(tensors), metadata=about)})

    def gather(self, name: str, process: int, shards: int, shapes: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of another process, once it has done all its shards of a pass.

        Raises:
            Finished: the first process is through, and has removed the files.
            ValueError: as `load`.
        """
        told = False
        while True:
            header = self._header(self._path(name, process))
            # A complete file is not written again, but may be removed.
            if header is not None and int(header["done"]) >= shards:
                try:
                    return self.load(name, process, shapes)[1]
                except (TypeError, ValueError):
                    self.leave_if_finished()
                    raise
            if not told:
                sys.stderr.write(f"score: waiting for process {process} of {self.processes} ({name})\n")
                told = True
            self.leave_if_finished()
            time.sleep(_POLL_SECONDS)

    def leave_if_finished(self) -> None:
        """Raises Finished where the first process has written the dictionary."""
        if self.process and self._finished():
            raise Finished

    def wait_for_end(self) -> None:
        """Waits for the first process; raises Finished."""
        while True:
            self.leave_if_finished()
            time.sleep(_POLL_SECONDS)

    def remove(self) -> None:
        """Deletes every file, of all processes, and what killed ones left half written."""
        remove_leftovers(self.folder)
        for path in self._all():
            path.unlink(missing_ok=True)

    def exists(self) -> bool:
        """Whether any process has left a file of this run."""
        return bool(self._all())

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}.*.safetensors"))

    def _path(self, name: str, process: int) -> Path:
        return self.folder / f"{_PREFIX}.{name}-{process}-of-{self.processes}.safetensors"

    def _header(self, path: Path) -> dict[str, str] | None:
        if not path.exists():
            return None
        try:
            with open_tensors(path, "the state of an unfinished run") as file:
                header = file.metadata() or {}
            if not {"done", "sha256", "settings"} <= set(header) or not re.fullmatch(
                "[0-9]{1,18}", header["done"]
            ):
                raise ValueError("incomplete header")
            found = parse_json(header["settings"], "settings", advice="")
        except ValueError as error:
            if not path.exists():  # the first process has just removed it
                return None
            raise _damaged(path, str(error)) from error
        name = path.name.removeprefix(f"{_PREFIX}.").partition("-")[0]
        differences = differing(found, self._settings.get(name))
        if differences:
            raise ValueError(
                f"{path}: the unfinished run here has other settings: {'; '.join(differences)}. Give those to finish it, "
                f"another --out, or delete {self.folder}/{_PREFIX}.* to start anew"
            )
        return header


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as JSON gives them back."""
    return json.loads(json.dumps(settings, allow_nan=False))


def differing(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two JSON-like settings, as "NAME: VALUE there, VALUE here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in sorted(set(there) | set(here))
            for line in differing(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        ]
    if there == here:
        return []
    return [f"{name}: {_short(there)} there, {_short(here)} here"]


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 of texts and tensors, hexadecimal."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            sha.update(f"{part.dtype} {tuple(part.shape)}".encode())
            # Any dtype as bytes: NumPy has no bfloat16.
            sha.update(memoryview(part.reshape(-1).view(torch.uint8).numpy()))
        else:
            sha.update(str(part).encode() + b"\0")
    return sha.hexdigest()


def _sha256(settings: str, done: str, tensors: Mapping[str, Tensor]) -> str:
    parts = [part for name in sorted(tensors) for part in (name, tensors[name])]
    return digest([settings, done, *parts])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]}..."


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: damaged state of an unfinished run ({why}); delete it to do that part again")
