"""The command `lbdt collect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbdt.cli.options import SEEDS, AsJson, Device, Dtype, print_result, reported
from lbdt.cli.sampling import (
    CanvasSeeds,
    Guidance,
    Model,
    Numbers,
    Patches,
    Prompts,
    PromptsPerShard,
    Steps,
    Threads,
    Timesteps,
    sampling_of,
)


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
    model: Model = None,
    prompts: Prompts = "canvas",
    canvas_seeds: CanvasSeeds = "100:104",
    steps: Steps = 20,
    guidance: Guidance = None,
    timesteps: Timesteps = None,
    patches: Patches = None,
    dtype: Numbers = Dtype.float16,
    prompts_per_shard: PromptsPerShard = 16,
    threads: Threads = 1,
    seed: Annotated[
        int, typer.Option("--seed", **SEEDS, help="Of the draw of patches; prompts have seeds of their own.")
    ] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write the activations of a pipeline's blocks to a folder of shards, with the prompts' labels.

    The same command continues a run that was killed, and several processes may share one; the files are the same. On a
    CPU: `torchrun --nproc_per_node N -m lbdt collect ...`; on GPUs also `accelerate launch --num_processes N`, which
    starts one process only where there is no GPU.
    """
    from lbdt.commands.collect import run

    sampling = sampling_of(
        model=model,
        prompts=prompts,
        canvas_seeds=canvas_seeds,
        steps=steps,
        guidance=guidance,
        timesteps=timesteps,
        patches=patches,
        dtype=dtype.value,
        prompts_per_shard=prompts_per_shard,
        threads=threads,
    )
    values, lines = run(site, out, sampling=sampling, seed=seed, device=device)
    if values["process"] == 0:
        print_result(values, lines, as_json)
