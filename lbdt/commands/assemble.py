"""`lbdt assemble`: an SAE, its dictionary and settings as one eraser folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lbdt.activations import Site
from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.score import DONE_FILE
from lbdt.eraser import CONFIG_FILE, ConceptEraser
from lbdt.files import read_json
from lbdt.sae import SparseAutoencoder
from lbdt.steering import Steering
from lbdt.steering.steering import CONFIG_FILE as STEERING_FILE

_BEGUN = ".assembling"


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

    An eraser that is there is replaced, and one that a killed run left half written.

    Raises:
        ValueError: parts that do not fit each other, a concept without any latent, or an `out` that holds other files.
    """
    begun = out / _BEGUN
    ours = begun.is_file() or (out / CONFIG_FILE).is_file()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not ours)):
        raise ValueError(f"--out {out}: holds something else than an eraser; give a new folder")
    eraser = ConceptEraser(
        SparseAutoencoder.from_pretrained(sae), ConceptDictionary.from_pretrained(dictionary), **settings
    )
    _check_sites(dictionary, eraser)
    latents = {concept: eraser.select(concept).latents.tolist() for concept in eraser.concepts}
    steering = None if rule is None else Steering.from_eraser(eraser, rule=rule, strength=strength)
    out.mkdir(parents=True, exist_ok=True)
    begun.touch()
    eraser.save_pretrained(out, dtype=getattr(torch, dtype), decoder=steering is not None)
    if steering is None:
        # Of an earlier eraser here, whose decoder has just been dropped.
        (out / STEERING_FILE).unlink(missing_ok=True)
    else:
        steering.save_settings(out)
    begun.unlink()
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


def _check_sites(dictionary: str, eraser: ConceptEraser) -> None:
    """ValueError where `lbdt score` says that it made the dictionary, or drew its bank, at another site."""
    path = Path(dictionary) / DONE_FILE
    if not path.is_file():
        return
    made = read_json(path)
    looked = Site(eraser.detect_at or eraser.hookpoint, "update" if eraser.sae.config.update else "output")
    sites = {"site": (looked, "--hookpoint and --detect-at")}
    if eraser.dictionary.bank is not None:
        sites["bank_site"] = (Site(eraser.hookpoint, eraser.target), "--hookpoint and --target")
    for name, (wanted, options) in sites.items():
        found = made.get(name) if isinstance(made, dict) else None
        if found not in (None, str(wanted)):
            raise ValueError(
                f"{path}: {name.replace('_', ' ')}: the dictionary is of {found}, and the eraser of {wanted}; change "
                f"{options}, or score again"
            )
