"""`lbdt assemble`: an SAE, its dictionary and settings as one eraser folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lbdt.activations import Site
from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.scoring import DONE_FILE, sae_settings
from lbdt.editors import ConceptEraser, Steering
from lbdt.editors.editor import FOLDER
from lbdt.runs.files import read_json
from lbdt.runs.folder import replaced
from lbdt.runs.out import check_out_folder
from lbdt.sae import SparseAutoencoder

_BEGUN = ".assembling"
"""What older versions left in a folder while they wrote it."""


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

    An eraser that is there is replaced all at one moment.

    Raises:
        ValueError: parts that do not fit each other, a concept without any latent, or an `out` that holds other files.
        OSError: why `out` cannot be written.
    """
    check_out_folder(out)
    ours = (out / _BEGUN).is_file() or (out / ConceptEraser.FILE).is_file()
    if out.exists() and any(out.iterdir()) and not ours:
        raise ValueError(f"--out {out}: holds something else than an eraser; give a new folder")
    eraser = ConceptEraser(
        SparseAutoencoder.from_pretrained(sae), ConceptDictionary.from_pretrained(dictionary), **settings
    )
    _check_score(dictionary, eraser)
    latents = {concept: eraser.select(concept).latents.tolist() for concept in eraser.concepts}
    steering = None if rule is None else Steering.from_eraser(eraser, rule=rule, strength=strength)
    # With the steering of an earlier eraser, whose decoder may be dropped.
    with replaced(out, (ConceptEraser.FILE, Steering.FILE, *FOLDER, _BEGUN)) as new:
        eraser.save_pretrained(new, dtype=getattr(torch, dtype), decoder=steering is not None)
        if steering is not None:
            steering.save_settings(new)
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


def _check_score(dictionary: str, eraser: ConceptEraser) -> None:
    """ValueError where `lbdt score` says that it made the dictionary of another SAE or site, or drew its bank at
    another."""
    path = Path(dictionary) / DONE_FILE
    if not path.is_file():
        return
    made = read_json(path)
    scored = made.get("sae") if isinstance(made, dict) else None
    wanted = scored.get("sha256") if isinstance(scored, dict) else None
    given = sae_settings(eraser.sae)["sha256"]
    if wanted not in (None, given):
        raise ValueError(
            f"{path}: the dictionary is of an SAE with SHA-256 {str(wanted)[:12]}..., and --sae has {given[:12]}...; "
            "give the SAE that it was scored with, or score again"
        )
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
