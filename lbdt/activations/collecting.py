"""Writing a source's shards to a folder: resumable, by several processes, the same bytes in any case."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lbdt.activations.generated import Generated
from lbdt.activations.prompts import prompt_lines
from lbdt.activations.shard_layout import FORMAT, Layout
from lbdt.activations.sites import Site
from lbdt.activations.source import Shard
from lbdt.activations.stored import Stored, read_settings
from lbdt.runs.digests import raw, sha256
from lbdt.runs.files import json_bytes, remove_leftovers, write_files
from lbdt.runs.folder import held
from lbdt.runs.reading import read_bytes
from lbdt.runs.settings import Difference, require_same_settings

_SPARE = 1 << 20


def collect(
    source: Generated,
    folder: str | os.PathLike[str],
    *,
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> Stored | None:
    """Writes those shards i of `source` to `folder` that are not there yet and have i % processes == process.

    A shard is written whole or not at all, so a killed run is continued by the same call; the folder then holds the
    same bytes as that of an unbroken run, by whatever number of processes. Shards of a wrong size or header are made
    again, and stderr says so. At most one shard is held in memory.

    Returns:
        The complete folder; None where other processes have still to write theirs.

    Raises:
        ValueError: a folder with other settings (names which differ) or other files, one that another process is
            writing, too little space; activations that cannot be stored.
    """
    if not 0 <= process < processes:
        raise ValueError(f"process: expected one of {processes}, got {process}")
    folder = Path(folder)
    files = ActivationFiles(source, folder)
    with held(folder, "lbdt collect", shared=processes > 1):
        files.prepare()
        mine = range(process, files.layout.shards, processes)
        missing = [index for index in mine if files.problem(index, tell=True)]
        bar = tqdm(
            missing,
            desc=f"collect {folder.name}",
            unit="shard",
            total=len(mine),
            initial=len(mine) - len(missing),
            disable=not progress,
            file=sys.stderr,
            position=process,
        )
        for index in bar:
            files.write(index, source.run(index))
        return files.finish()


class ActivationFiles:
    """The folder of one source's activations, being written."""

    def __init__(self, source: Generated, folder: Path) -> None:
        self.folder = folder
        self.prompts = prompt_lines(source.labelled)
        self.settings: dict[str, Any] = {"format": FORMAT} | source.settings()
        self._settings = json_bytes(self.settings)
        self.layout = Layout(self.settings, sha256(self._settings))

    @property
    def bytes(self) -> int:
        """The size of all shards together."""
        return sum(self.layout.size(index) for index in range(self.layout.shards))

    def present(self) -> int:
        """How many shards are there already."""
        if not (self.folder / "settings.json").is_file():
            return 0
        return sum(self.problem(index) is None for index in range(self.layout.shards))

    def problem(self, index: int, tell: bool = False) -> str | None:
        """Why shard `index` has to be made; with `tell`, said on stderr where a file is there that is no good."""
        try:
            self.layout.check(self.folder, index)
        except ValueError as error:
            if tell and self.layout.path(self.folder, index).exists():
                sys.stderr.write(f"lbdt: {error}; making it again\n")
            return str(error)
        return None

    def prepare(self) -> None:
        """Refuses what cannot go on here, then writes prompts and settings unless they are there.

        Raises ValueError: other settings, other files, too little space.
        """
        # Listed before settings.json is looked for, which is there where another process of this run makes shards.
        others = sorted(
            p.name for p in self.folder.iterdir() if p.name[0] != "." and p.name != "prompts.jsonl"
        )
        begun = (self.folder / "settings.json").is_file()
        if begun:
            self._compare()
        elif others:
            raise ValueError(
                f"{self.folder}: holds other files ({', '.join(others[:3])}); give a folder of its own"
            )
        for place in (self.folder, self.folder / "shards"):
            remove_leftovers(place)
        self.check_space()
        if not begun or not (self.folder / "prompts.jsonl").is_file():
            write_files(self.folder, {"prompts.jsonl": self.prompts})
        if not begun:
            write_files(self.folder, {"settings.json": self._settings})

    def check_space(self) -> None:
        """ValueError where the shards that are missing do not fit on the disk."""
        needed = sum(
            self.layout.size(index)
            for index in range(self.layout.shards)
            if not self.layout.path(self.folder, index).is_file()
        )
        place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        if needed + _SPARE > free:
            raise ValueError(
                f"{self.folder}: the activations need {human(needed)}, and {human(free)} are free; take fewer "
                "--timesteps or --patches, or train without storing them"
            )

    def write(self, index: int, shards: dict[Site, Shard]) -> None:
        """Shard `index`, all sites."""
        tensors = []
        for name, part in self.layout.parts(index).items():
            kind, _, site = name.partition("/")
            shard = shards[Site.parse(site)]
            tensor = shard.x if kind == "x" else shard.patches
            if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
                raise ValueError(
                    f"shard {index}, {name}: expected {part.dtype} {list(part.shape)}, got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            tensors.append(raw(tensor))
        header = self.layout.header(index, sha256(tensors))
        path = self.layout.path(self.folder, index)
        write_files(path.parent, {path.name: (header, *tensors)})

    def finish(self) -> Stored | None:
        """Writes the manifest once every shard is there."""
        shards = []
        for index in range(self.layout.shards):
            try:
                sha256 = self.layout.check(self.folder, index)
            except ValueError:
                return None
            name = self.layout.path(self.folder, index).name
            shards.append({"name": name, "bytes": self.layout.size(index), "sha256": sha256})
        manifest = {"format": FORMAT, "settings": self.layout.digest, "shards": shards}
        write_files(self.folder, {"manifest.json": json_bytes(manifest)})
        return Stored(self.folder)

    def _compare(self) -> None:
        there, _ = read_settings(self.folder)
        require_same_settings(
            self.folder,
            there,
            self.settings,
            "holds activations of other settings: {differences}; give the same settings to continue, or another folder",
            each=Difference.in_brackets,
        )
        if (
            read_bytes(self.folder / "settings.json") != self._settings
        ):  # shards carry the digest of its bytes
            raise ValueError(
                f"{self.folder}: settings.json is not as `lbdt collect` wrote it; give another folder"
            )


def human(count: int) -> str:
    """Bytes for people: 1.5 GB."""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and units[1:]:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 1000 else f"{value / 1000:.3g} TB"
