"""The command `lbdt erase`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from lbdt.cli.options import (
    MOST_PADDING,
    MOST_STEPS,
    AsJson,
    Device,
    Eraser,
    Kind,
    KindOption,
    Seed,
    counted,
    number,
    print_result,
    reported,
)
from lbdt.donors import DonorSource


class Method(enum.StrEnum):
    """What removes the concept."""

    per = "per"
    steering = "steering"


@reported
def command(
    prompt: Annotated[str, typer.Argument(help='E.g. "An image of Cats in Sketch style."')],
    concept: Annotated[
        list[str], typer.Option("--concept", metavar="NAME", help="What to erase; may be repeated.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="DIR_OR_HUB", help="A diffusers pipeline with a UNet. Default: EmojiCanvas."
        ),
    ] = None,
    eraser: Eraser = None,
    kind: KindOption = Kind.saeuron,
    method: Annotated[
        Method, typer.Option(help="Replace patches, or the steering baseline of the same folder.")
    ] = Method.per,
    strength: Annotated[
        float | None, number(help="Of steering, negative to erase. Default: the folder's.")
    ] = None,
    padding: Annotated[
        int | None, counted(min=0, most=MOST_PADDING, help="Patches around the mask. Default: the eraser's.")
    ] = None,
    source: Annotated[DonorSource | None, typer.Option(help="Donor patches. Default: the eraser's.")] = None,
    steps: Annotated[
        int | None, counted(most=MOST_STEPS, help="Denoising steps. Default: 20, for kind sdxl 4.")
    ] = None,
    guidance: Annotated[
        float | None,
        number(
            min=0,
            help="Guidance scale. Default: on EmojiCanvas 3, for kind sdxl none; else the pipeline's own.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")] = Path("erased.png"),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate PROMPT without and with the eraser, from the same seed, and write one picture of both."""
    if model is not None and eraser is None:
        raise typer.BadParameter(
            "an eraser belongs to a pipeline: give --eraser with --model", param_hint="--eraser"
        )
    if method is Method.steering and (padding is not None or source is not None):
        raise typer.BadParameter("--padding and --source are of --method per", param_hint="--method")
    if method is Method.per and strength is not None:
        raise typer.BadParameter("is of --method steering: PER has no strength", param_hint="--strength")
    from lbdt.commands.erase import run

    values, lines = run(
        prompt,
        concept,
        model=model,
        eraser=eraser,
        kind=kind.value,
        steer=method is Method.steering,
        strength=strength,
        padding=padding,
        source=None if source is None else source.value,
        steps=steps,
        guidance=guidance,
        out=out,
        seed=seed,
        device=device,
    )
    print_result(values, lines, as_json)
