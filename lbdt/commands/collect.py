"""`lbdt collect`: a pipeline's activations, in a folder of shards."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbdt.activations.collecting import ActivationFiles, collect, human
from lbdt.activations.sites import Site
from lbdt.activations.stored import Stored
from lbdt.commands.pipeline import CANVAS, Sampling, load_pipeline
from lbdt.runs.out import check_out_folder
from lbdt.runs.processes import joined_on


def run(
    sites: Sequence[str], out: Path, *, sampling: Sampling, seed: int, device: str
) -> tuple[dict[str, Any], list[str]]:
    """Writes the missing shards to `out`; returns the figures for JSON, and the lines of the table.

    Started by torchrun or `accelerate launch`, every process writes its share.
    """
    start = time.perf_counter()
    wanted = [Site.parse(site) for site in sites]
    check_out_folder(out)
    labelled = sampling.labelled()
    with joined_on(device) as (world, where):
        source = sampling.source(load_pipeline(sampling.model, where), labelled, wanted, where, seed)
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
        "model": sampling.model or CANVAS,
        "device": str(where),
        "process": world.rank,
        "processes": world.size,
        "prompts": stored.prompts,
        "timesteps": list(stored.timesteps),
        "sites": [
            {
                "site": str(site),
                "patches": stored.patches(site),
                "width": stored.width(site),
                "rows": stored.rows(site),
            }
            for site in stored.sites
        ],
        "dtype": sampling.dtype,
        "shards": files.layout.shards,
        "resumed": resumed,
        "bytes": files.bytes,
        "seconds": time.perf_counter() - start,
    }
    return values, _table(values)


def _processes(count: int) -> str:
    # `accelerate launch --num_processes 2` starts a single process where there is no GPU, and does not say so.
    return "1 process" if count == 1 else f"{count} processes"


def _table(values: dict[str, Any]) -> list[str]:
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
