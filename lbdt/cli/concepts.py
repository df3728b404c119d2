"""`lbdt concepts`: what an eraser knows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lbdt.cli.options import (
    AsJson,
    CanvasKind,
    Eraser,
    KindOption,
    UnusedDevice,
    UnusedSeed,
    print_result,
    reported,
)


@reported
def command(
    eraser: Eraser = None,
    kind: KindOption = CanvasKind.saeuron,
    seed: UnusedSeed = 0,
    device: UnusedDevice = "cpu",
    as_json: AsJson = False,
) -> None:
    """List the concepts an eraser knows, their latents, and how often these fire on and off the concept."""
    from lbdt.app.inspecting import concept_table
    from lbdt.canvas.defaults import eraser_of

    loaded = eraser_of(eraser, kind.value)
    rows = [asdict(row) for row in concept_table(loaded)]
    values = {
        "hookpoint": loaded.hookpoint,
        "padding": loaded.padding,
        "source": loaded.source,
        "avoid": loaded.avoid,
        "concepts": rows,
    }
    print_result(values, _table(values), as_json)


def _table(values: dict[str, Any]) -> list[str]:
    rows = values["concepts"]
    width = max(len("concept"), *(len(row["concept"]) for row in rows))
    lines = [
        f"hooked at {values['hookpoint']}, padding {values['padding']}, source {values['source']}",
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
    return lines


def _percent(rate: float | None) -> str:
    return f"{'-' if rate is None else f'{rate:.1%}':>10}"
