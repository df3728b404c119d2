"""`lbdt concepts`: what an eraser knows."""

from __future__ import annotations

from typing import Any

from lbdt.editors import ConceptEraser, Steering


def load_eraser(path_or_repo: str | None, kind: str = "saeuron") -> ConceptEraser:
    """The eraser of a folder or repository, or EmojiCanvas's of a kind; ValueError or OSError where there is none."""
    if path_or_repo is None:
        from lbdt import canvas

        return canvas.load_eraser(kind)
    return ConceptEraser.from_pretrained(path_or_repo)


def load_steering(path_or_repo: str | None, kind: str = "saeuron", strength: float | None = None) -> Steering:
    """The steering baseline of the same folder, or EmojiCanvas's of a kind; `strength` None: the one it was saved with.

    Raises:
        ValueError, OSError: none there, or a bad strength.
    """
    settings = {} if strength is None else {"strength": strength}
    if path_or_repo is None:
        from lbdt import canvas

        return canvas.load_steering(kind, **settings)
    return Steering.from_pretrained(path_or_repo, **settings)


def run(path_or_repo: str | None, kind: str = "saeuron") -> tuple[dict[str, Any], list[str]]:
    """Concepts, latents, and detection rates averaged over timesteps."""
    eraser = load_eraser(path_or_repo, kind)
    rows = [_row(eraser, name) for name in eraser.concepts]
    values = {
        "hookpoint": eraser.hookpoint,
        "padding": eraser.padding,
        "source": eraser.source,
        "concepts": rows,
    }
    width = max(len("concept"), *(len(row["concept"]) for row in rows))
    lines = [
        f"hooked at {eraser.hookpoint}, padding {eraser.padding}, source {eraser.source}",
        f"{'concept':{width}}  on concept  off concept  latents",
    ]
    for row in rows:
        latents = ", ".join(str(latent) for latent in row["latents"])
        lines.append(f"{row['concept']:{width}}  {_percent(row['on'])}  {_percent(row['off'])}   {latents}")
    if rows[0]["on"] is not None:
        lines.append("on, off: patches of images with and without the concept on which one latent fires,")
        lines.append("the most frequent latent of each timestep, mean over timesteps")
    else:
        lines.append("no rates: the dictionary is not calibrated")
    return values, lines


def _row(eraser: ConceptEraser, name: str) -> dict[str, Any]:
    selection = eraser.select(name)
    row = {
        "concept": name,
        "latents": selection.latents.tolist(),
        "thresholds": selection.kind,
        "on": None,
        "off": None,
    }
    if eraser.dictionary.histograms is not None:
        rates = eraser.dictionary.detection_rates(selection).overall()
        row |= dict(zip(("on", "off"), rates, strict=True))
    return row


def _percent(rate: float | None) -> str:
    return f"{'-' if rate is None else f'{rate:.1%}':>10}"
