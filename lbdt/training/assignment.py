"""The latents that stand for concepts and styles (METHOD.md, 6.5), and its file `assignment.json`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lbdt.runs.files import json_bytes, read_json, write_files
from lbdt.runs.reading import brief, listed

ASSIGNMENT_FILE = "assignment.json"


@dataclass(frozen=True)
class Assignment:
    """One latent for each name; no latent has two.

    Raises:
        ValueError: a latent that is no integer >= 0, or given twice; no names at all.
    """

    concepts: dict[str, int]
    styles: dict[str, int]

    def __post_init__(self) -> None:
        latents = [*self.concepts.values(), *self.styles.values()]
        if not latents:
            raise ValueError("assignment: expected one or more names with a latent each, got none")
        for latent in latents:
            if isinstance(latent, bool) or not isinstance(latent, int) or latent < 0:
                raise ValueError(f"assignment: expected latents as integers >= 0, got {brief(latent)}")
        twice = sorted(latent for latent, count in Counter(latents).items() if count > 1)
        if twice:
            raise ValueError(f"assignment: latent {listed(twice)} is given more than once")

    @classmethod
    def by_construction(cls, concepts: Sequence[str], styles: Sequence[str]) -> Assignment:
        """Latent i for name i, concepts first, as G-SAE does (METHOD.md, 6.4)."""
        names = [*concepts, *styles]
        places = {name: place for place, name in enumerate(concepts)}
        return cls(places, {name: names.index(name, len(concepts)) for name in styles})

    @property
    def latents(self) -> list[int]:
        """The concepts' latents, then the styles', in the names' order."""
        return [*self.concepts.values(), *self.styles.values()]

    def to_json(self) -> dict[str, dict[str, int]]:
        """The contents of `assignment.json`."""
        return {"concepts": dict(self.concepts), "styles": dict(self.styles)}


def assign(
    scores: Tensor,  # [C, T, L], concepts first, then styles
    concepts: Sequence[str],
    styles: Sequence[str] = (),
) -> Assignment:
    """The unassigned name and free latent of the highest time-averaged score, again and again (METHOD.md, 6.5).

    Concepts come before styles (their scores count 1 more). Equal scores: the earlier name, then the lower latent.

    Raises:
        ValueError: another shape, NaN, or fewer latents than names.
    """
    names = [*concepts, *styles]
    if scores.dim() != 3 or scores.shape[0] != len(names) or scores.shape[2] < len(names):
        raise ValueError(
            f"scores: expected [{len(names)}, T, L >= {len(names)}] for {len(names)} names, got "
            f"{tuple(scores.shape)}"
        )
    mean = scores.double().mean(1).cpu()
    if not bool(torch.isfinite(mean).all()):
        raise ValueError("scores: expected finite values, got NaN or infinity")
    mean[: len(concepts)] += 1.0
    # A name loses at most one latent to each other name, so its best few are enough.
    values, latents = mean.sort(dim=1, descending=True, stable=True)
    values, latents = values[:, : len(names)], latents[:, : len(names)]
    order = values.flatten().sort(descending=True, stable=True).indices.tolist()
    found: dict[int, int] = {}
    for entry in order:
        name, rank = divmod(entry, len(names))
        latent = int(latents[name, rank])
        if name not in found and latent not in found.values():
            found[name] = latent
    latents_of = [found[name] for name in range(len(names))]
    return Assignment(
        dict(zip(concepts, latents_of[: len(concepts)], strict=True)),
        dict(zip(styles, latents_of[len(concepts) :], strict=True)),
    )


def save_assignment(assignment: Assignment, folder: str | os.PathLike[str]) -> None:
    """Writes `assignment.json` into `folder`, atomically."""
    write_files(Path(folder), {ASSIGNMENT_FILE: json_bytes(assignment.to_json())})


def load_assignment(folder: str | os.PathLike[str]) -> Assignment:
    """The assignment in a folder's `assignment.json`; ValueError naming the file if it is absent or not as written."""
    path = Path(folder) / ASSIGNMENT_FILE
    values = read_json(path)
    if (
        not isinstance(values, dict)
        or set(values) != {"concepts", "styles"}
        or not all(isinstance(part, dict) for part in values.values())
    ):
        raise ValueError(f'{path}: expected {{"concepts": {{name: latent}}, "styles": {{name: latent}}}}')
    try:
        return Assignment(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def assignment_for(folder: str, concepts: Sequence[str], styles: Sequence[str]) -> Assignment:
    """The `assignment.json` of a folder, or an assignment by the scores of the dictionary there; ValueError where that
    lacks one of the names."""
    if (Path(folder) / ASSIGNMENT_FILE).is_file():
        return load_assignment(folder)
    from lbdt.dictionary import ConceptDictionary

    dictionary = ConceptDictionary.from_pretrained(folder)
    names = [*concepts, *styles]
    missing = [name for name in names if name not in dictionary.concepts]
    if missing:
        raise ValueError(
            f"--assign {folder}: the dictionary lacks {', '.join(missing)}, which the activations are labelled with; "
            "leave --assign out to score the SAE on the activations"
        )
    order = [dictionary.concepts.index(name) for name in names]
    return assign(dictionary.scores()[order], concepts, styles)
