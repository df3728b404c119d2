"""The folder of a run: its settings, and one file for each pair that is through."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt.attack.search import AttackOutcome
from lbdt.runs.digests import sha256
from lbdt.runs.files import json_bytes, read_json, write_files
from lbdt.runs.reading import brief
from lbdt.runs.settings import keep_settings

if TYPE_CHECKING:
    from lbdt.activations.prompts import Prompt

SETTINGS_FILE = "attack.json"


class AttackFolder:
    """`attack.json` with all that the outcomes follow from but the prompt, and `pairs/NAME.json` for each prompt.

    Files are written whole or not at all, so a killed run goes on, and processes may share a folder.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """
        Args:
            path: made if there is none.
            settings: JSON-like.

        Raises:
            ValueError: the folder is of a run with other settings, or holds something else.
        """
        self.path = path
        strangers = path.exists() and (not path.is_dir() or any(p.name[:1] != "." for p in path.iterdir()))
        # Asked after the look into the folder, which another process may be the first to write to.
        if strangers and not (path / SETTINGS_FILE).is_file():
            raise ValueError(
                f"--out {path}: holds no {SETTINGS_FILE}, but something else; give another folder"
            )
        keep_settings(
            path,
            SETTINGS_FILE,
            settings,
            "of a run with other settings: {differences}. Give those to go on with it, or another folder",
            where=f"--out {path}",
        )

    def load(self, prompt: Prompt) -> AttackOutcome | None:
        """The outcome of a prompt, if it is there.

        Raises:
            ValueError: the file is damaged, or of another prompt.
        """
        path = self._file(prompt)
        if not path.is_file():
            return None
        try:
            outcome = AttackOutcome.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; delete it to attack that pair again") from error
        if (outcome.prompt, outcome.concept, outcome.seed) != (prompt.text, prompt.concept, prompt.seed):
            raise ValueError(
                f"{path}: of {brief(outcome.prompt)}, seed {outcome.seed}, not of {prompt.text!r}, seed {prompt.seed}"
            )
        return outcome

    def save(self, prompt: Prompt, outcome: AttackOutcome) -> None:
        """Writes the outcome of a prompt."""
        path = self._file(prompt)
        write_files(path.parent, {path.name: json_bytes(outcome.to_dict())})

    def _file(self, prompt: Prompt) -> Path:
        words = "-".join(part for part in (prompt.concept, prompt.style) if part)
        key = sha256(f"{prompt.seed} {prompt.concept} {prompt.text}")[:8]
        return self.path / "pairs" / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', words)[:80]}-{key}.json"
