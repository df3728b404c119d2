"""Steering parameters of SAeUron, SAEmnesia and G-SAE, `class_params.pth` {class: {percentile, multiplier or alpha}}
(METHOD.md, 7.4), the same in JSON, and both as an editor's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lbdt.formats.pth import read_pth
from lbdt.runs.files import json_bytes, read_json
from lbdt.runs.reading import MAX_FLOAT, brief, listed
from lbdt.runs.wording import require_unicode

PTH_FILE = "class_params.pth"
JSON_FILE = "class_params.json"
_RULES = {"multiplier": "saeuron", "alpha": "gsae"}
"""The steering rule whose strength each key is."""


@dataclass(frozen=True)
class ClassParams:
    """How one class is steered away."""

    percentile: float
    """Latents that score above this percentile are steered; in (0, 100)."""
    strength: float
    """The rule's; negative to erase."""
    key: str = "multiplier"
    """What the file calls the strength: SAeUron's and SAEmnesia's "multiplier" (gamma: what a steered latent is
    multiplied with, times its mean activation) or G-SAE's "alpha" (of the decoder rows, times the patch's norm)."""

    def to_json(self) -> dict[str, float]:
        """The class's entry in the file."""
        return {"percentile": self.percentile, self.key: self.strength}


class ClassSettings(NamedTuple):
    """The parameters of classes as settings of `lbdt.Steering` and, but for rule and strength, `lbdt.ConceptEraser`."""

    rule: str
    strength: dict[str, float]
    """Each concept's strength."""
    selection: dict[str, dict[str, Any]]
    """Each concept's criteria: the percentile, and thresholds as SAeUron's, the means over concepts."""


def load_class_params(path: str | os.PathLike[str]) -> dict[str, ClassParams]:
    """The parameters of every class, from `class_params.pth` or `class_params.json`, or the folder that holds one.

    Raises:
        ValueError: no such file, one that `lbdt.formats.pth` refuses, other keys, keys of two rules, numbers that are
            not finite in float32, a percentile outside (0, 100).
    """
    path = _file(path)
    values = read_json(path) if path.suffix == ".json" else read_pth(path)
    if not isinstance(values, Mapping) or not values:
        raise ValueError(
            f"{path}: expected classes {{name: {{percentile, multiplier or alpha}}}}, got {_short(values)}"
        )
    params = {_name(path, name): _params(path, name, given) for name, given in values.items()}
    if len({given.key for given in params.values()}) > 1:
        raise ValueError(
            f"{path}: expected the same keys for every class, got multiplier (SAeUron, SAEmnesia) for some and alpha "
            "(G-SAE) for others; make a file of each"
        )
    return params


def load_class_settings(path: str | os.PathLike[str], concepts: Sequence[str]) -> ClassSettings:
    """The parameters of a file for those of a dictionary's `concepts` that it has; its other classes are passed over.

    Raises:
        ValueError: as `load_class_params`; none of the concepts in it, or some concepts that it lacks beside some
            classes that are no concepts: names that are not spelt alike, perhaps.
    """
    params = load_class_params(path)
    known = {name: params[name] for name in concepts if name in params}
    absent, others = [name for name in concepts if name not in params], [n for n in params if n not in known]
    if not known or (absent and others):
        raise ValueError(
            f"{_file(path)}: has no class {listed(absent)}, but {listed(others)}, which the dictionary lacks; rename "
            "them, or give the file that was made with this dictionary"
        )
    (key,) = {given.key for given in known.values()}
    return ClassSettings(
        _RULES[key],
        {name: given.strength for name, given in known.items()},
        {name: {"percentile": given.percentile, "thresholds": "published"} for name, given in known.items()},
    )


def class_params_json(params: Mapping[str, ClassParams]) -> bytes:
    """The contents of `class_params.json`."""
    return json_bytes({name: given.to_json() for name, given in params.items()})


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        path = path / (JSON_FILE if (path / JSON_FILE).exists() else PTH_FILE)
    return path


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: expected names of classes, got {_short(name)}")
    require_unicode(f"{path}: name of a class", name)
    return name


def _params(path: Path, name: str, given: Any) -> ClassParams:
    keys = set(given) if isinstance(given, Mapping) else set()
    key = next((key for key in _RULES if keys == {"percentile", key}), None)
    if key is None:
        got = listed(given) if isinstance(given, Mapping) else _short(given)
        raise ValueError(
            f"{path}: {name}: expected percentile and multiplier (G-SAE: alpha), got {got or 'nothing'}"
        )
    numbers = []
    for part in ("percentile", key):
        value = given[part]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= MAX_FLOAT:
            raise ValueError(f"{path}: {name}: {part}: expected a finite number, got {_short(value)}")
        numbers.append(float(value))
    if not 0 < numbers[0] < 100:
        raise ValueError(f"{path}: {name}: percentile: expected a number between 0 and 100, got {numbers[0]}")
    return ClassParams(*numbers, key)


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, str) else brief(value)
