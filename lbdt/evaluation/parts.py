"""What an eraser or a steering is made of, in a few bytes, so that no pictures are continued with another."""

from __future__ import annotations

from typing import Any

from lbdt.activations.fingerprint import digest_of_module
from lbdt.dictionary.state import digest

_SETTINGS = ("hookpoint", "detect_at", "target", "rule", "error", "where")
"""Of either; what is set by keyword (padding, source, strength) is told apart by itself."""


def digest_of(editor: Any) -> str:
    """SHA-256 of a `ConceptEraser` or `Steering`: its SAE (`lbdt.activations.fingerprint`), the settings that it was saved
    with, every concept's latents and thresholds, the mean activations and the bank."""
    parts: list[Any] = [digest_of_module(editor.sae)]
    parts += [f"{name}={getattr(editor, name, None)}" for name in _SETTINGS]
    for concept in editor.concepts:
        chosen = editor.select(concept)
        parts += [concept, chosen.latents, chosen.thresholds]
    dictionary = editor.dictionary
    parts += [dictionary.mean, "no bank" if dictionary.bank is None else dictionary.bank]
    return digest(parts)
