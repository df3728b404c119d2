"""How the methods that work by text, a negative prompt and UCE, are told what to erase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lbdt.editors import UCE
from lbdt.evaluation.evaluated_world import EvaluatedWorld
from lbdt.runs.digests import sha256

BY_TEXT = ("negative", "uce")
"""Methods of a series that change prompt or model, by text."""


@dataclass(frozen=True)
class ConceptTexts:
    """The texts of a world's concepts, and what follows from them for a set of erased ones."""

    objects: tuple[str, ...]
    texts: Callable[[str | None], Sequence[str]]
    """`lbdt.evaluation.evaluated_world.EvaluatedWorld.texts`."""

    @classmethod
    def of(cls, world: EvaluatedWorld) -> ConceptTexts:
        """Those of a world; a concept's name, with spaces for underscores, where it says nothing."""
        return cls(world.objects, world.texts or _named)

    def negative(self, erased: Sequence[str]) -> str:
        """The negative prompt: the first text of every concept, in their order."""
        return ", ".join(self.texts(name)[0] for name in erased)

    def editing(self, erased: Sequence[str]) -> UCE:
        """UCE as its users would set it: every text of the erased concepts is mapped to that which names none, and the
        texts of all other objects, and those of none, are preserved, together with the weight of one edit; the rest as
        released.

        Raises:
            ValueError: a concept with another number of texts than there are of none.
        """
        none = self.texts(None)
        for name in erased:
            if len(self.texts(name)) != len(none):
                raise ValueError(
                    f"texts: expected {len(none)} of {name}, as there are of no concept, got {len(self.texts(name))}"
                )
        edits = [pair for name in erased for pair in zip(self.texts(name), none, strict=True)]
        kept = [text for name in self.objects if name not in erased for text in self.texts(name)]
        return UCE(edits, [*kept, *none], preserve_scale=1 / len([*kept, *none]))

    def digest(self, method: str) -> str:
        """SHA-256 of all that pictures by `method` depend on: the negative prompts, or UCE's texts and settings."""
        each = [
            self.negative((n,)) if method == "negative" else self.editing((n,)).digest() for n in self.objects
        ]
        return sha256(repr(each))


def _named(concept: str | None) -> list[str]:
    return ["" if concept is None else concept.replace("_", " ")]
