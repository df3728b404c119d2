"""`lbdt collect`: a pipeline's activations, in a folder of shards."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lbdt.cli.options import AsJson, Device, Dtype, print_result, reported
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
from lbdt.runs.limits import SEEDS


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
    from lbdt.activations.collecting import ActivationFiles, collect, human
    from lbdt.activations.sites import Site
    from lbdt.activations.stored import Stored
    from lbdt.canvas.defaults import NAME
    from lbdt.runs.processes import joined_on
    from lbdt.runs.writable import check_out_folder

    start = time.perf_counter()
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
    wanted = [Site.parse(text) for text in site]
    check_out_folder(out)
    labelled = sampling.labelled()
    with joined_on(device) as (world, where):
        source = sampling.source(sampling.load_pipeline(where), labelled, wanted, where, seed)
        files = ActivationFiles(source, out)
        files.check_space()
        resumed = files.present()
        if world.main:
            there = f", {resumed} there already" if resumed else ""
            sys.stderr.write(
                f"{out}: {files.layout.shards} shards of {source.prompts} prompts, {human(files.bytes)}{there}; "
                f"written by {_processes(world.size)}\n"
            )
        world.wait()
        collect(source, out, process=world.rank, processes=world.size)
        world.wait()
        stored = Stored(out)
    values = {
        "out": str(out),
        "model": sampling.model or NAME,
        "device": str(where),
        "process": world.rank,
        "processes": world.size,
        "prompts": stored.prompts,
        "timesteps": list(stored.timesteps),
        "sites": [
            {
                "site": str(each),
                "patches": stored.patches(each),
                "width": stored.width(each),
                "rows": stored.rows(each),
            }
            for each in stored.sites
        ],
        "dtype": sampling.dtype,
        "shards": files.layout.shards,
        "resumed": resumed,
        "bytes": files.bytes,
        "seconds": time.perf_counter() - start,
    }
    if values["process"] == 0:
        print_result(values, _table(values), as_json)


def _processes(count: int) -> str:
    # `accelerate launch --num_processes 2` starts a single process where there is no GPU, and does not say so.
    return "1 process" if count == 1 else f"{count} processes"


def _table(values: dict[str, Any]) -> list[str]:
    from lbdt.activations.collecting import human

    width = max(len("site"), *(len(entry["site"]) for entry in values["sites"]))
    lines = [f"{'site':{width}}  patches  width        rows"]
    lines += [
        f"{entry['site']:{width}}  {entry['patches']:7d}  {entry['width']:5d}  {entry['rows']:10d}"
        for entry in values["sites"]
    ]
    shards, resumed = values["shards"], values["resumed"]
    rows = (
        ("prompts", f"{values['prompts']} at {len(values['timesteps'])} timesteps"),
        ("shards", f"{shards}, {resumed} of them there already" if resumed else f"{shards}"),
        ("size", f"{human(values['bytes'])} in {values['dtype']}"),
        ("seconds", f"{values['seconds']:.1f} by {_processes(values['processes'])}"),
        ("folder", values["out"]),
    )
    return lines + [f"{name:{width}}  {text}" for name, text in rows]
