"""The command `lbdt attack`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from lbdt.cli.erase import Method
from lbdt.cli.options import (
    MOST_STEPS,
    MOST_THREADS,
    SEEDS,
    AsJson,
    Device,
    Eraser,
    Kind,
    KindOption,
    counted,
    number,
    print_result,
    reported,
)
from lbdt.cli.sampling import Model

_PANEL = "The search"


class How(enum.StrEnum):
    """Where prefixes come from."""

    gradient = "gradient"
    random = "random"


@reported
def command(
    eraser: Eraser = None,
    kind: KindOption = Kind.saeuron,
    model: Model = None,
    method: Annotated[
        Method,
        typer.Option(help="What is attacked: replaced patches, or the steering baseline of the same folder."),
    ] = Method.per,
    strength: Annotated[
        float | None, number(help="Of steering, negative to erase. Default: the folder's.")
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", metavar="NAME", help="Erased and attacked; may be repeated. Default: all."),
    ] = None,
    style: Annotated[
        list[str] | None,
        typer.Option(
            "--style",
            metavar="NAME",
            help="Of the prompts; may be repeated. Default: EmojiCanvas's, and with --model none.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="MODULE:FUNCTION",
            help="Python function: list of pictures to list of concept names. Default: EmojiCanvas's classifier.",
        ),
    ] = None,
    tokens: Annotated[
        int, counted(help="Learned tokens in front of the prompt.", rich_help_panel=_PANEL)
    ] = 5,
    iterations: Annotated[
        int | None,
        counted(help="At each timestep. Default: 40, quick: 20.", rich_help_panel=_PANEL),
    ] = None,
    timesteps: Annotated[
        int | None,
        counted(
            most=MOST_STEPS,
            help="Spread over the noise schedule. Default: 50, quick: 10.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    check_every: Annotated[
        int,
        counted(
            "--check-every",
            metavar="N",
            help="Timesteps from one judged picture to the next.",
            rich_help_panel=_PANEL,
        ),
    ] = 1,
    search: Annotated[
        How,
        typer.Option(
            help="The attack, or as its control as many checks of random prefixes.", rich_help_panel=_PANEL
        ),
    ] = How.gradient,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Every fifth concept, every third style, and a shorter search, unless given."
        ),
    ] = False,
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
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="One file a pair; continued if begun. Default: not kept."),
    ] = None,
    threads: Annotated[
        int, counted(most=MOST_THREADS, help="CPU threads of a process, on which the outcome may depend.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", **SEEDS, help="Of the pictures, and so of the attack.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Search prompts that bring an erased concept back: UnlearnDiffAtk through the attached eraser.

    Prints UA before and after the attack. With --out the same command continues a run that was killed, and several
    processes may share one (`torchrun --nproc_per_node N -m lbdt attack ...`); the outcomes are the same.
    """
    if model is not None and (eraser is None or judge is None or not concept):
        raise typer.BadParameter(
            "an eraser, a judge and concepts belong to a pipeline: give --eraser, --judge and --concept with --model",
            param_hint="--model",
        )
    if method is Method.per and strength is not None:
        raise typer.BadParameter("is of --method steering: PER has no strength", param_hint="--strength")
    from lbdt.commands.attack import Plan, run

    values, lines = run(
        Plan(
            model=model,
            eraser=eraser,
            kind=kind.value,
            steer=method is Method.steering,
            strength=strength,
            concepts=tuple(concept or ()),
            styles=tuple(style or ()),
            judge=judge,
            tokens=tokens,
            iterations=iterations,
            timesteps=timesteps,
            check_every=check_every,
            search=search.value,
            quick=quick,
            steps=steps,
            guidance=guidance,
        ),
        out=out,
        threads=threads,
        seed=seed,
        device=device,
    )
    if values["process"] == 0:
        print_result(values, lines, as_json)
