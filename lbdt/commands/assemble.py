"""`lbdt assemble`: an SAE, its dictionary and settings as one eraser folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lbdt.dictionary import ConceptDictionary
from lbdt.eraser import CONFIG_FILE, ConceptEraser
from lbdt.sae import SparseAutoencoder
from lbdt.steering import Steering


def run(
    sae: str,
    dictionary: str,
    out: Path,
    *,
    settings: dict[str, Any],
    rule: str | None,
    strength: float | None,
    dtype: str,
) -> tuple[dict[str, Any], list[str]]:
    """Writes the eraser to `out`, and with `rule` its steering baseline; `settings`: keywords of `ConceptEraser`.

    Raises:
        ValueError: parts that do not fit each other, a concept without any latent, or an `out` that holds other files.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / CONFIG_FILE).is_file())):
        raise ValueError(f"--out {out}: holds something else than an eraser; give a new folder")
    eraser = ConceptEraser(
        SparseAutoencoder.from_pretrained(sae), ConceptDictionary.from_pretrained(dictionary), **settings
    )
    latents = {concept: eraser.select(concept).latents.tolist() for concept in eraser.concepts}
    steering = None if rule is None else Steering.from_eraser(eraser, rule=rule, strength=strength)
    eraser.save_pretrained(out, dtype=getattr(torch, dtype), decoder=steering is not None)
    if steering is not None:
        steering.save_pretrained(out, dtype=getattr(torch, dtype))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    values = {
        "out": str(out),
        **settings,
        "steering": rule,
        "strength": strength,
        "bytes": size,
        "concepts": latents,
    }
    lines = [
        f"{'eraser':12}{out}, {size / 1e6:.1f} MB",
        f"{'hookpoint':12}{eraser.hookpoint}, {eraser.target} replaced, padding {eraser.padding}, source {eraser.source}",
        f"{'concepts':12}{len(latents)}, {sum(map(len, latents.values()))} latents in all",
    ]
    if steering is not None:
        lines.append(f"{'steering':12}rule {rule}, strength {strength}")
    return values, lines
