"""SAeUron's and SAEmnesia's latents pickle, `cls_latents_dict_HOOKPOINT.pkl`, as a `ConceptDictionary`.

The pickle is {class: array [samples, steps, latents]} (torch in SAeUron's own script, numpy elsewhere), float16,
spatial means of the TopK activations (METHOD.md, 7.3). At 6.55 GB for 20 classes it is never held: samples are added up
as they are read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.checks import checked_timesteps
from lbdt.formats.arrays import StoredArray
from lbdt.formats.pickles import read_pickle
from lbdt.runs.reading import MAX_FLOAT, listed
from lbdt.runs.wording import require_unicode

SPACINGS = ("leading", "trailing", "linspace")
_TRAINED = 1000
_MAX_CLASSES = 10_000


@dataclass(frozen=True)
class Latents:
    """A dictionary read from a latents pickle."""

    dictionary: ConceptDictionary
    samples: dict[str, int]
    """Samples behind each class's mean."""
    assumptions: tuple[str, ...]
    """What the file does not say, one sentence each."""


def spaced_timesteps(steps: int, spacing: str = "leading") -> Tensor:
    """[steps] int64 descending: the timesteps of diffusers' DDIM over 1000 trained ones under `timestep_spacing`;
    "leading" with `steps_offset` 1, as SD 1.5's scheduler has (100 steps: 991, 981, ..., 1).

    Raises:
        ValueError: an unknown spacing, steps out of [1, 1000].
    """
    if spacing not in SPACINGS:
        raise ValueError(f"timesteps: expected {', '.join(SPACINGS)} or a list of numbers, got {spacing!r}")
    if not 1 <= steps <= _TRAINED:
        raise ValueError(
            f"timesteps: expected 1 to {_TRAINED} steps, got {steps}; give the timesteps as a list"
        )
    if spacing == "leading":
        return (torch.arange(steps) * (_TRAINED // steps) + 1).flip(0)
    if spacing == "trailing":
        return (_TRAINED - torch.arange(steps, dtype=torch.float64) * (_TRAINED / steps)).round().long() - 1
    return torch.linspace(0, _TRAINED - 1, steps, dtype=torch.float64).round().long().flip(0)


def read_latents(
    path: Path,
    timesteps: str | Sequence[int] = "leading",
    concepts: Sequence[str] | None = None,
    progress: bool = True,
) -> Latents:
    """The dictionary of a latents pickle: `mean` [C, T, L] float32, uncalibrated, without a bank.

    `timesteps` of the T steps, first step first, or the name of their spacing (`spaced_timesteps`); `concepts`: the
    classes to take, in that order (None: all, in the file's order). A class may also be a list of arrays [steps,
    latents] or [samples, steps, latents]. Memory: the means, and 64 MiB.

    Raises:
        ValueError: a file that `read_pickle` refuses, classes or arrays that do not fit each other, NaN, infinite or
            negative values, timesteps that are not T descending numbers.
    """
    classes = _classes(path, read_pickle(path), concepts)
    first_name, first = next(iter(classes.items()))
    steps, latents = first[0].shape[1:]
    for name, arrays in classes.items():
        for array in arrays:
            if array.shape[1:] != (steps, latents):
                raise ValueError(
                    f"{path}: {name}: expected {steps} steps and {latents} latents as in {first_name}, got an array of "
                    f"shape {list(array.shape)}"
                )
    size = path.stat().st_size
    total = sum(array.nbytes for arrays in classes.values() for array in arrays)
    if total > size:
        raise ValueError(
            f"{path}: its arrays add up to {total} bytes, but the file has {size}; refused as damaged"
        )
    values, notes = _timesteps(timesteps, steps)

    mean = torch.empty(len(classes), steps, latents)
    peak = 0.0
    samples = {name: sum(array.shape[0] for array in arrays) for name, arrays in classes.items()}
    with _bar(total, progress) as bar:
        for row, (name, arrays) in enumerate(classes.items()):
            mean[row], largest = _mean(path, name, arrays, samples[name], bar)
            peak = max(peak, largest)
    counts = torch.tensor(list(samples.values())).unsqueeze(1).expand(-1, steps).clone()
    notes += (
        "counts are numbers of samples (images), not of patches: the file has spatial means only",
        "the largest spatial mean stands for the largest activation, which the file does not have",
    )
    dictionary = ConceptDictionary(tuple(classes), values, mean, counts, peak=peak)
    return Latents(dictionary, samples, notes)


def _classes(path: Path, value: Any, concepts: Sequence[str] | None) -> dict[str, list[StoredArray]]:
    """Arrays [samples, steps, latents] of each class that is wanted."""
    named = type(value) is dict and all(type(name) is str and name for name in value)
    if not named or not value:
        got = type(value).__name__ if type(value) is not dict else "other keys" if value else "none"
        raise ValueError(
            f"{path}: expected a dictionary of classes {{name: array [samples, steps, latents]}}, got {got}"
        )
    if len(value) > _MAX_CLASSES:
        raise ValueError(f"{path}: expected at most {_MAX_CLASSES} classes, got {len(value)}")
    for name in value:
        require_unicode(f"{path}: name of a class", name)
    if concepts is not None:
        absent = [name for name in concepts if name not in value]
        if absent or not concepts:
            raise ValueError(
                f"{path}: concepts: no class {', '.join(absent) or 'named'}; it has {listed(value)}"
            )
        value = {name: value[name] for name in concepts}
    return {name: _arrays(path, name, given) for name, given in value.items()}


def _arrays(path: Path, name: str, given: Any) -> list[StoredArray]:
    arrays = given if type(given) is list else [given]
    if not arrays or not all(type(array) is StoredArray for array in arrays):
        kinds = ", ".join(sorted({type(array).__name__ for array in arrays})) or "nothing"
        raise ValueError(
            f"{path}: {name}: expected an array [samples, steps, latents] or a list of them, got {kinds}"
        )
    full = []
    for array in arrays:
        if len(array.shape) == 2:
            array = StoredArray(array.path, (1, *array.shape), array.dtype, array.data, array.start)
        if len(array.shape) != 3 or not all(array.shape):
            raise ValueError(
                f"{path}: {name}: expected an array [samples, steps, latents] with values, got shape "
                f"{list(array.shape)}"
            )
        full.append(array)
    return full


def _mean(path: Path, name: str, arrays: list[StoredArray], samples: int, bar) -> tuple[Tensor, float]:
    """The mean over samples [steps, latents] float32, and the largest value."""
    total = torch.zeros(arrays[0].shape[1:], dtype=torch.float64)
    largest = 0.0
    for array in arrays:
        for part in array.rows():
            low, high = (float(value) for value in part.aminmax())
            if not 0 <= low <= high <= MAX_FLOAT:
                raise ValueError(
                    f"{path}: {name}: expected finite activations >= 0, got values from {low} to {high}"
                )
            for sample in part:
                total += sample
            largest = max(largest, high)
            bar.update(part.numel() * part.element_size())
    return (total / samples).float(), largest


def _timesteps(given: str | Sequence[int], steps: int) -> tuple[Tensor, tuple[str, ...]]:
    if isinstance(given, str):
        values = spaced_timesteps(steps, given)
        offset = ", steps_offset 1" if given == "leading" else ""
        return values, (
            f"timesteps {int(values[0])} to {int(values[-1])}: DDIM, {steps} steps, {given} spacing{offset}; the file "
            f"does not say them (--timesteps)",
        )
    values = checked_timesteps(given)
    if len(values) != steps:
        raise ValueError(f"timesteps: expected {steps}, one for each step of the file, got {len(values)}")
    return values, ()


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(
        total=total, unit="B", unit_scale=True, desc="read latents", file=sys.stderr, disable=not progress
    )
