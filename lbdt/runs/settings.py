"""What a run in a folder follows from, and whether the folder is of the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lbdt.runs.files import json_bytes, read_json, write_files

_MOST = 12
_LONGEST = 60


class Difference(NamedTuple):
    """One setting of two values; `name` has a dot for every level, such as "source.prompts"."""

    name: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.name}: {_short(json.dumps(self.there))} there, {_short(json.dumps(self.here))} here"

    def in_brackets(self) -> str:
        """The difference as "steps (3 there, 4 now)"."""
        return f"{self.name} ({_short(str(self.there))} there, {_short(str(self.here))} now)"


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as JSON gives them back."""
    return json.loads(json.dumps(settings, allow_nan=False))


def differing(there: Any, here: Any, name: str = "") -> list[Difference]:
    """What differs between two JSON-like settings, by name; what is missing counts as null."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            difference
            for key in sorted(there.keys() | here.keys())
            for difference in differing(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if there == here else [Difference(name, there, here)]


def require_same_settings(
    where: Any,
    there: Any,
    here: Mapping[str, Any],
    wording: str,
    each: Callable[[Difference], str] = str,
) -> None:
    """ValueError unless `there`, what an earlier run says that it followed from, is `here`, this one's.

    Args:
        where: what holds the earlier run, which the message begins with.
        wording: the message's rest, in which "{names}" stands for the settings that differ and "{differences}" for
            what they are on either side.
        each: how one of the differences is told.
    """
    found = differing(there if isinstance(there, dict) else {}, plain(here))
    if not found:
        return
    names = dict.fromkeys(difference.name.partition(".")[0] for difference in found)
    told = [each(difference) for difference in found[:_MOST]]
    told += [f"{len(found) - _MOST} more"] if found[_MOST:] else []
    text = wording.replace("{names}", ", ".join(names)).replace("{differences}", "; ".join(told))
    raise ValueError(f"{where}: {text}")


def keep_settings(
    folder: Path, name: str, settings: Mapping[str, Any], wording: str, where: Any = None
) -> None:
    """Writes the settings to the file `name` of `folder`, or compares them with those that an earlier call wrote there.

    Raises ValueError as `require_same_settings`, or naming the file where it cannot be read.
    """
    if not (folder / name).is_file():
        write_files(folder, {name: json_bytes(plain(settings))})
    require_same_settings(folder if where is None else where, read_json(folder / name), settings, wording)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]}..."
