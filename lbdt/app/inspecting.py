"""What an eraser knows: its concepts, their latents' scores and thresholds over the timesteps, and what fires them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lbdt.dictionary.selection import scores

if TYPE_CHECKING:
    from lbdt.app.examples import LatentExample
    from lbdt.editors import ConceptEraser, Steering


@dataclass(frozen=True)
class ConceptRow:
    """A concept, by the latents that its eraser selects for it."""

    concept: str
    latents: tuple[int, ...]
    thresholds: str
    """"published" | "calibrated"."""
    on: float | None
    """The share of the patches of its own pictures on which one latent fires: the most frequent latent of each
    timestep, mean over timesteps; None: not calibrated."""
    off: float | None
    """The same of all other concepts' pictures."""


@dataclass(frozen=True)
class LatentCurve:
    """A latent of a concept over the dictionary's timesteps."""

    latent: int
    timesteps: tuple[int, ...]
    """Descending."""
    scores: tuple[float, ...]
    """How much more of the activation it has on the concept than elsewhere (METHOD.md, 3.2)."""
    thresholds: tuple[float | None, ...]
    """The activation above which a patch carries the concept; None where the latent is not selected."""
    means: tuple[float, ...]
    """Its mean activation on the concept's pictures."""


def concept_table(editor: ConceptEraser | Steering) -> list[ConceptRow]:
    """A row for every concept, in the dictionary's order."""
    return [_row(editor, name) for name in editor.concepts]


def curves(editor: ConceptEraser | Steering, concept: str) -> tuple[LatentCurve, ...]:
    """The latents that are selected for a concept, the one with the highest mean score first; of equal ones the lower
    number.

    Raises:
        ValueError: an unknown concept; the known ones.
    """
    dictionary, selection = editor.dictionary, editor.select(concept)
    place = dictionary.index(concept)
    score = scores(dictionary.mean, dictionary.counts, [place])[0]
    times = tuple(dictionary.timesteps.tolist())
    found = []
    for column, latent in enumerate(selection.latents.tolist()):
        limits = selection.thresholds[:, column].tolist()
        found.append(
            LatentCurve(
                latent,
                times,
                tuple(score[:, latent].tolist()),
                tuple(limit if math.isfinite(limit) else None for limit in limits),
                tuple(dictionary.mean[place, :, latent].tolist()),
            )
        )
    return tuple(sorted(found, key=lambda curve: (-math.fsum(curve.scores), curve.latent)))


def examples(editor: ConceptEraser | Steering, latent: int) -> tuple[LatentExample, ...] | None:
    """The patches that fire a latent most, the strongest first, from the examples that ship with EmojiCanvas's erasers:
    for any of their latents, and none for one that fires nowhere. None: no examples of this SAE are stored;
    `lbdt.app.examples.compute_examples` makes them.

    Raises:
        TypeError, ValueError: a latent that the SAE does not have.
    """
    from lbdt.app.example_files import stored_for
    from lbdt.app.examples import check_latents

    check_latents(editor.sae, [latent])
    stored = stored_for(editor)
    return None if stored is None else stored.of(latent)


def _row(editor: ConceptEraser | Steering, name: str) -> ConceptRow:
    selection, on, off = editor.select(name), None, None
    if editor.dictionary.histograms is not None:
        on, off = editor.dictionary.detection_rates(selection).overall()
    return ConceptRow(name, tuple(selection.latents.tolist()), selection.kind, on, off)
