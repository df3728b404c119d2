"""The options by which `collect`, `train` and `score` run a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt.cli.options import MOST_STEPS, MOST_THREADS, Dtype, counted, number

if TYPE_CHECKING:
    from lbdt.commands.pipeline import Sampling

_PANEL = "The pipeline"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR_OR_HUB",
        help="A text-to-image pipeline of diffusers. Default: EmojiCanvas.",
        rich_help_panel=_PANEL,
    ),
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="A .jsonl or .csv file with prompt and, where known, concept, style, seed; or canvas: EmojiCanvas's.",
        rich_help_panel=_PANEL,
    ),
]
CanvasSeeds = Annotated[
    str,
    typer.Option(
        "--canvas-seeds",
        metavar="FIRST:END",
        help="Pictures of every prompt of canvas.",
        rich_help_panel=_PANEL,
    ),
]
Steps = Annotated[int, counted("--steps", most=MOST_STEPS, help="Denoising steps.", rich_help_panel=_PANEL)]
Guidance = Annotated[
    float | None,
    number(
        "--guidance",
        min=0,
        help="Guidance scale. Default: 3 on EmojiCanvas, else the pipeline's own.",
        rich_help_panel=_PANEL,
    ),
]
Timesteps = Annotated[
    str | None,
    typer.Option(
        "--timesteps",
        metavar="N or T,T,...",
        help="So many of the steps, spread evenly, or these. Default: all.",
        rich_help_panel=_PANEL,
    ),
]
Patches = Annotated[
    int | None,
    counted("--patches", help="Patches drawn of each map. Default: all.", rich_help_panel=_PANEL),
]
Numbers = Annotated[
    Dtype, typer.Option("--dtype", help="Number format of the activations.", rich_help_panel=_PANEL)
]
PromptsPerShard = Annotated[
    int,
    counted(
        "--prompts-per-shard",
        most=65_535,
        help="Images of a pipeline call and of a shard.",
        rich_help_panel=_PANEL,
    ),
]
Threads = Annotated[
    int,
    counted(
        "--threads",
        most=MOST_THREADS,
        help="CPU threads of a process, recorded with the activations, which may depend on them.",
        rich_help_panel=_PANEL,
    ),
]


def sampling_of(
    *, model: str | None, prompts: str, canvas_seeds: str, timesteps: str | None, **others: Any
) -> Sampling:
    """What the options say; `others`: the fields of `Sampling` as they are. Bad usage raises typer.BadParameter."""
    if model is not None and prompts == "canvas":
        raise typer.BadParameter(
            "the prompts of canvas are EmojiCanvas's: give --prompts FILE with --model",
            param_hint="--prompts",
        )
    from lbdt.commands.pipeline import Sampling, parse_seeds, parse_timesteps

    try:
        wanted, seeds = parse_timesteps(timesteps), parse_seeds(canvas_seeds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return Sampling(model=model, prompts=prompts, canvas_seeds=seeds, timesteps=wanted, **others)
