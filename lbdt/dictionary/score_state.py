"""The state of an unfinished `score`: one file for each process and pass, written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lbdt.runs.digests import marked, sha256
from lbdt.runs.files import open_tensors, read_tensors, remove_leftovers, write_files
from lbdt.runs.processes import awaited
from lbdt.runs.reading import parse_json
from lbdt.runs.settings import plain, require_same_settings

_PREFIX = "score.state"


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

        def complete() -> dict[str, Tensor] | None:
            header = self._header(self._path(name, process))
            if header is None or int(header["done"]) < shards:
                self.leave_if_finished()
                return None
            # A complete file is not written again, but may be removed.
            try:
                return self.load(name, process, shapes)[1]
            except (TypeError, ValueError):
                self.leave_if_finished()
                raise

        return awaited(complete, f"score: waiting for process {process} of {self.processes} ({name})")

    def leave_if_finished(self) -> None:
        """Raises Finished where the first process has written the dictionary."""
        if self.process and self._finished():
            raise Finished

    def wait_for_end(self) -> None:
        """Waits for the first process; raises Finished."""
        awaited(self.leave_if_finished)

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
        require_same_settings(
            path,
            found,
            self._settings.get(name, {}),
            "the unfinished run here has other settings: {differences}. Give those to finish it, another --out, or "
            f"delete {self.folder}/{_PREFIX}.* to start anew",
        )
        return header


def _sha256(settings: str, done: str, tensors: Mapping[str, Tensor]) -> str:
    parts = [part for name in sorted(tensors) for part in (name, tensors[name])]
    return sha256(marked([settings, done, *parts]))


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: damaged state of an unfinished run ({why}); delete it to do that part again")
