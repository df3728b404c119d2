"""What an eraser or a steering is made of, in a few bytes, so that no pictures are continued with another."""

from __future__ import annotations

import hashlib
from typing import Any

from lbdt.activations.fingerprint import digest_of_module


def digest_of(editor: Any) -> str:
    """SHA-256 of a `ConceptEraser` or `Steering`: its SAE (`lbdt.activations.fingerprint`), its hookpoints and rule,
    and every concept's latents and thresholds. What is set by keyword (padding, source, strength) is not part of it,
    nor is the bank that stands in where no donor is left."""
    digest = hashlib.sha256(digest_of_module(editor.sae).encode())
    digest.update(
        f"{editor.hookpoint} {getattr(editor, 'rule', '')} {getattr(editor, 'detect_at', None)}".encode()
    )
    for concept in editor.concepts:
        chosen = editor.dictionary.select(concept, **editor.selection)
        digest.update(concept.encode())
        digest.update(chosen.latents.contiguous().numpy().tobytes())
        digest.update(chosen.thresholds.contiguous().numpy().tobytes())
    return digest.hexdigest()
