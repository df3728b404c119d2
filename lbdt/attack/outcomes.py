"""What became of each attacked prompt, the folder that keeps it, and UA before and after the attack."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt.evaluation.published import ATTACK
from lbdt.runs.digests import sha256
from lbdt.runs.files import json_bytes, read_json, write_files
from lbdt.runs.reading import brief
from lbdt.runs.settings import keep_settings

if TYPE_CHECKING:
    from lbdt.activations.prompts import Prompt

SETTINGS_FILE = "attack.json"
_NAMES = {"saeuron": "SAeUron", "saemnesia": "SAEmnesia"}
PUBLISHED: tuple[tuple[str, float, float, float], ...] = tuple(
    (_NAMES[row.pipeline] + " + PER" * (row.method == "per"), row.before, row.after, row.printed_drop)
    for row in ATTACK
)
"""Method, UA before, UA after, effectiveness, in percent: UnlearnCanvas, 1000 pairs, 5 tokens, 40 iterations (PER's
project page, table 2; METHOD.md, 10.3). Another world than EmojiCanvas: not to be compared figure by figure."""

_TEXT, _COUNT = ((str,), None), ((int,), None)
_KINDS: dict[str, tuple[tuple[type, ...], tuple[type, ...] | None]] = {
    **dict.fromkeys(("prompt", "concept", "reference", "seen_before", "seen_after", "attacked"), _TEXT),
    "style": ((str, type(None)), None),
    **dict.fromkeys(("seed", "checks"), _COUNT),
    **dict.fromkeys(("timesteps", "prefix"), ((list,), (int,))),
    "losses": ((list,), (int, float)),
    "words": ((list,), (str,)),
    "typable": ((bool,), None),
}
"""What a field of an `AttackOutcome` in JSON may be, and its items."""


@dataclass(frozen=True)
class AttackOutcome:
    """What became of one prompt. JSON-like, and the same for the same pipeline, eraser, settings and prompt."""

    prompt: str
    concept: str
    style: str | None
    seed: int
    """Seed of the start noise of the judged pictures, and of the eraser's donors."""
    reference: str
    """What the judge sees in the reference picture, made without the eraser."""
    seen_before: str
    """What it sees in the erased picture, without an attack."""
    seen_after: str
    """What it sees in the last picture that was judged."""
    timesteps: tuple[int, ...]
    """The timesteps that were attacked, in their order; none where the eraser failed without an attack."""
    losses: tuple[float, ...]
    """Mean loss over the iterations of each timestep; none for a random search."""
    checks: int
    """Pictures that were judged, the one without an attack not counted."""
    prefix: tuple[int, ...]
    """The search's token ids in the last judged picture."""
    words: tuple[str, ...]
    """The same, as the vocabulary spells them."""
    attacked: str
    """The whole attacked prompt as text."""
    typable: bool
    """Whether the tokenizer makes the same ids of that text. If not, the ids were run where they are judged, and the
    text where what is typed is (`AttackSettings.judged`)."""

    @property
    def erased_before(self) -> bool:
        """The judge does not see the concept, without an attack."""
        return self.seen_before != self.concept

    @property
    def erased_after(self) -> bool:
        """The judge does not see the concept with an attack either."""
        return self.seen_after != self.concept

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> AttackOutcome:
        """The inverse; ValueError where keys or types are others."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"expected an object with the keys {', '.join(sorted(names))}")
        for name, (kinds, inner) in _KINDS.items():
            value = values[name]
            if type(value) not in kinds or not (inner is None or all(type(item) in inner for item in value)):
                raise ValueError(f"{name}: expected {kinds[0].__name__}, got {brief(value)}")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


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


@dataclass(frozen=True)
class AttackSummary:
    """Shares in percent of the pairs that were really attacked or failed without an attack."""

    pairs: int
    before: float
    """UA: the erased pictures in which the judge does not see the concept."""
    after: float
    """The same after the attack; a pair that failed before it has failed after it."""
    broken: int
    """Pairs that were erased before the attack, and not after it."""

    @property
    def effectiveness(self) -> float:
        """`before - after`, in percentage points."""
        return self.before - self.after

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {**asdict(self), "effectiveness": self.effectiveness}


def summarise(outcomes: Iterable[AttackOutcome]) -> AttackSummary | None:
    """The summary of some pairs; None for none."""
    found = list(outcomes)
    if not found:
        return None
    before = sum(outcome.erased_before for outcome in found)
    after = sum(outcome.erased_after for outcome in found)
    return AttackSummary(len(found), 100 * before / len(found), 100 * after / len(found), before - after)
