"""The command `lbdt assemble`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from lbdt.cli.options import (
    MOST_PADDING,
    AsJson,
    Dtype,
    UnusedDevice,
    UnusedSeed,
    counted,
    inside,
    number,
    print_result,
    reported,
)
from lbdt.donors import DonorSource


class Target(enum.StrEnum):
    """What is replaced."""

    output = "output"
    update = "update"


class Thresholds(enum.StrEnum):
    """Where thresholds come from."""

    published = "published"
    calibrated = "calibrated"


class Rule(enum.StrEnum):
    """Steering rules."""

    saeuron = "saeuron"
    gsae = "gsae"
    sdxl = "sdxl"


@reported
def command(
    sae: Annotated[
        str, typer.Option("--sae", metavar="DIR_OR_HUB", help="The SAE, in any format that lbdt reads.")
    ],
    dictionary: Annotated[
        str, typer.Option("--dictionary", metavar="DIR_OR_HUB", help="Of `lbdt score` with that SAE.")
    ],
    hookpoint: Annotated[
        str, typer.Option("--hookpoint", metavar="NAME", help="The block whose patches are replaced.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the eraser.")],
    padding: Annotated[int, counted(min=0, most=MOST_PADDING, help="Patches around the mask.")] = 1,
    source: Annotated[DonorSource, typer.Option(help="Donor patches.")] = DonorSource.random,
    target: Annotated[
        Target, typer.Option(help="Replace the block's output, or what it adds to its input.")
    ] = Target.output,
    detect_at: Annotated[
        str | None, typer.Option(metavar="NAME", help="An earlier block that the SAE looks at.")
    ] = None,
    top_k: Annotated[int | None, counted(help="Latents of a concept per timestep.")] = None,
    percentile: Annotated[
        float | None,
        typer.Option(callback=inside(0, 100), help="Or all above this percentile of the scores, e.g. 99.99."),
    ] = None,
    assigned: Annotated[
        bool, typer.Option("--assigned", help="The latent that supervised training assigned.")
    ] = False,
    thresholds: Annotated[
        Thresholds | None, typer.Option(help="Default: calibrated where the dictionary is.")
    ] = None,
    false_positive: Annotated[
        float | None,
        typer.Option(
            callback=inside(0, 1, open_low=True),
            help="Share of other concepts' patches above a calibrated threshold.",
        ),
    ] = None,
    steering: Annotated[
        Rule | None, typer.Option(help="Also keep the decoder and this steering baseline.")
    ] = None,
    strength: Annotated[float | None, number(help="Of --steering; negative to erase.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the files.")] = Dtype.float32,
    seed: UnusedSeed = 0,
    device: UnusedDevice = "cpu",
    as_json: AsJson = False,
) -> None:
    """Put an SAE, its dictionary and the settings of detection and replacement into one folder: an eraser."""
    if (steering is None) != (strength is None):
        raise typer.BadParameter("give --steering and --strength together", param_hint="--steering")
    from lbdt.commands.assemble import run

    selection = {
        "top_k": top_k,
        "percentile": percentile,
        "assigned": assigned or None,
        "thresholds": None if thresholds is None else thresholds.value,
        "false_positive": false_positive,
    }
    values, lines = run(
        sae,
        dictionary,
        out,
        settings={
            "hookpoint": hookpoint,
            "padding": padding,
            "source": source.value,
            "target": target.value,
            "detect_at": detect_at,
            "selection": {key: value for key, value in selection.items() if value is not None},
        },
        rule=None if steering is None else steering.value,
        strength=strength,
        dtype=dtype.value,
    )
    print_result(values, lines, as_json)
