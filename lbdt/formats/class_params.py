"""SAeUron's and SAEmnesia's steering parameters, `class_params.pth` {class: {percentile, multiplier}} (METHOD.md,
7.4), and the same in JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lbdt.formats.pth import read_pth
from lbdt.runs.files import json_bytes, read_json
from lbdt.runs.reading import MAX_FLOAT, brief, listed
from lbdt.runs.wording import require_unicode

PTH_FILE = "class_params.pth"
JSON_FILE = "class_params.json"
_KEYS = ("percentile", "multiplier")


@dataclass(frozen=True)
class ClassParams:
    """How SAeUron steers one class away."""

    percentile: float
    """Latents that score above this percentile are steered; in (0, 100)."""
    multiplier: float
    """gamma: what a steered latent is multiplied with (times its mean activation); negative."""


def load_class_params(path: str | os.PathLike[str]) -> dict[str, ClassParams]:
    """The parameters of every class, from `class_params.pth` or `class_params.json`, or the folder that holds one.

    Raises:
        ValueError: no such file, one that `lbdt.formats.pth` refuses, other keys, numbers that are not finite in
            float32, a percentile outside (0, 100).
    """
    path = Path(path)
    if path.is_dir():
        path = path / (JSON_FILE if (path / JSON_FILE).exists() else PTH_FILE)
    values = read_json(path) if path.suffix == ".json" else read_pth(path)
    if not isinstance(values, Mapping) or not values:
        raise ValueError(
            f"{path}: expected classes {{name: {{percentile, multiplier}}}}, got {_short(values)}"
        )
    return {_name(path, name): _params(path, name, given) for name, given in values.items()}


def class_params_json(params: Mapping[str, ClassParams]) -> bytes:
    """The contents of `class_params.json`."""
    return json_bytes({name: asdict(given) for name, given in params.items()})


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: expected names of classes, got {_short(name)}")
    require_unicode(f"{path}: name of a class", name)
    return name


def _params(path: Path, name: str, given: Any) -> ClassParams:
    if not isinstance(given, Mapping) or set(given) != set(_KEYS):
        got = listed(given) if isinstance(given, Mapping) else _short(given)
        raise ValueError(f"{path}: {name}: expected {' and '.join(_KEYS)}, got {got}")
    numbers = []
    for key in _KEYS:
        value = given[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= MAX_FLOAT:
            raise ValueError(f"{path}: {name}: {key}: expected a finite number, got {_short(value)}")
        numbers.append(float(value))
    if not 0 < numbers[0] < 100:
        raise ValueError(f"{path}: {name}: percentile: expected a number between 0 and 100, got {numbers[0]}")
    return ClassParams(*numbers)


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, str) else brief(value)
