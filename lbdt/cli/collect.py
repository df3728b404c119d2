"""The command `lbdt collect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbdt.cli.options import AsJson, Device, Dtype, print_result, reported


@reported
def command(
    site: Annotated[
        list[str],
        typer.Option(
            "--site",
            metavar="HOOKPOINT[:update]",
            help="Where, e.g. unet.up_blocks.1.attentions.1; with :update its output minus its input. May be repeated.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the shards; continued if begun.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="DIR_OR_HUB",
            help="Any text-to-image pipeline of diffusers. Default: EmojiCanvas.",
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="A .jsonl or .csv file with prompt and, where known, concept, style, seed; or canvas: EmojiCanvas's.",
        ),
    ] = "canvas",
    canvas_seeds: Annotated[
        str, typer.Option("--canvas-seeds", metavar="FIRST:END", help="Pictures of every prompt of canvas.")
    ] = "100:104",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. Default: 3 on EmojiCanvas, else the pipeline's own.")
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="N or T,T,...", help="So many of the steps, spread evenly, or these. Default: all."
        ),
    ] = None,
    patches: Annotated[
        int | None, typer.Option(min=1, help="Patches drawn of each map. Default: all.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format on disk.")] = Dtype.float16,
    prompts_per_shard: Annotated[
        int, typer.Option(min=1, help="Images of a pipeline call and of a shard.")
    ] = 16,
    threads: Annotated[
        int,
        typer.Option(
            min=1,
            help="CPU threads of a process, recorded with the shards. More cores: `torchrun --nproc_per_node N -m lbdt "
            "collect ...`; more GPUs: also `accelerate launch --num_processes N`, which starts one process on a CPU.",
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the draw of patches; prompts have seeds of their own.")
    ] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write the activations of a pipeline's blocks to a folder of shards, with the prompts' labels.

    The same command continues a run that was killed, and several processes may share one; the files are the same.
    """
    if model is not None and prompts == "canvas":
        raise typer.BadParameter(
            "the prompts of canvas are EmojiCanvas's: give --prompts FILE with --model",
            param_hint="--prompts",
        )
    from lbdt.commands.collect import run
    from lbdt.commands.pipeline import Sampling, parse_seeds, parse_timesteps

    try:
        wanted, seeds = parse_timesteps(timesteps), parse_seeds(canvas_seeds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    sampling = Sampling(
        model=model,
        prompts=prompts,
        canvas_seeds=seeds,
        steps=steps,
        guidance=guidance,
        timesteps=wanted,
        patches=patches,
        dtype=dtype.value,
        prompts_per_shard=prompts_per_shard,
        threads=threads,
    )
    values, lines = run(site, out, sampling=sampling, seed=seed, device=device)
    if values["process"] == 0:
        print_result(values, lines, as_json)
