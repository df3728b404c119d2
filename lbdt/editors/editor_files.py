"""The files of an editor: its settings, and beside them its SAE and its dictionary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from lbdt.dictionary import ConceptDictionary
from lbdt.runs.folder import DIGESTS_FILE, PARTS, check_digests, replaced, write_digests
from lbdt.runs.reading import brief, listed
from lbdt.sae import SparseAutoencoder

FOLDER = ("sae", "dictionary", DIGESTS_FILE)
"""What an editor's `save_pretrained` writes beside the settings' file."""
_VERSION = 1


class EditorFiles:
    """What of an editor is saved and loaded; the editor itself has the rest."""

    FILE: ClassVar[str]
    """The JSON file of the settings."""
    _OTHERWISE: ClassVar[tuple[str, ...]] = ()
    """Files that are read instead of `FILE` where there is none."""
    SETTINGS: ClassVar[tuple[str, ...]]
    _ADDED: ClassVar[dict[str, Any]] = {}

    def save_settings(self, directory: str | os.PathLike[str]) -> None:
        """Writes `eraser.json` or `steering.json` alone, into the folder of another editor with the same SAE and
        dictionary; a steering needs the SAE's decoder there."""
        from lbdt.runs.files import json_bytes, write_files

        self._check()
        write_files(Path(directory), {self.FILE: json_bytes({"version": _VERSION, **self.settings})})

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **settings: Any) -> Self:
        """The editor in a folder, or in a Hugging Face repository (`owner/name`). `settings` are keywords of the class,
        and come before those of the file.

        An eraser's folder that was saved with `decoder=True` holds a `Steering` too: without a `steering.json`, give
        `strength`.

        Raises:
            ValueError: anything absent, unreadable or contradictory, or an SAE or dictionary other than those it was
                saved with (where it says which); the text names the file.
        """
        from lbdt.runs.hub import resolve_folder

        files = (cls.FILE, *cls._OTHERWISE, DIGESTS_FILE, *PARTS)
        folder = resolve_folder(path_or_repo, None, marker=cls.FILE, files=files)
        path, stored = cls._stored(folder, settings)
        check_digests(folder)
        sae = SparseAutoencoder.from_pretrained(folder / "sae")
        dictionary = ConceptDictionary.from_pretrained(folder / "dictionary")
        try:
            return cls(sae, dictionary, **stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _stored(cls, folder: Path, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The file of the settings, and what it says where nothing else is given."""
        from lbdt.runs.files import read_json

        path, keys = folder / cls.FILE, ("version", *cls.SETTINGS)
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
        if values.get("version") != _VERSION:
            raise ValueError(f"{path}: expected version {_VERSION}, got {brief(values.get('version'))}")
        values = cls._ADDED | values
        wrong = sorted(set(values) ^ set(keys))
        if wrong:
            raise ValueError(
                f"{path}: expected exactly the keys {', '.join(keys)}; missing or unknown: {listed(wrong)}"
            )
        del values["version"]
        return path, values | given

    def _save(self, directory: str | os.PathLike[str], dtype: torch.dtype | None, decoder: bool) -> None:
        self._check()
        with replaced(Path(directory), (self.FILE, *FOLDER)) as folder:
            self.sae.save_pretrained(folder / "sae", encoder_only=not decoder, dtype=dtype)
            self.dictionary.save_pretrained(folder / "dictionary", dtype=dtype)
            write_digests(folder)
            self.save_settings(folder)
