"""`lbdt collect`: a pipeline's activations, in a folder of shards."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lbdt.activations.collect import Files, collect, human
from lbdt.activations.generated import Generated
from lbdt.activations.layout import DTYPES
from lbdt.activations.prompts import Prompt, read_prompts
from lbdt.activations.sites import Site
from lbdt.activations.stored import Stored
from lbdt.commands.device import usable_device

# Processes wait for the slowest one at the end, however long it takes.
_PATIENCE = datetime.timedelta(days=365)


def run(
    sites: Sequence[str],
    out: Path,
    *,
    model: str | None,
    prompts: str,
    canvas_seeds: range,
    steps: int,
    guidance: float | None,
    timesteps: int | list[int] | None,
    patches: int | None,
    dtype: str,
    prompts_per_shard: int,
    threads: int,
    seed: int,
    device: str,
) -> tuple[dict[str, Any], list[str]]:
    """Writes the missing shards to `out`; returns the figures for JSON, and the lines of the table.

    `threads` counts on the CPU only. Started by torchrun or `accelerate launch`, every process writes its share.
    """
    start = time.perf_counter()
    wanted = [Site.parse(site) for site in sites]
    labelled = canvas_prompts(canvas_seeds) if prompts == "canvas" else read_prompts(prompts)
    concepts = styles = None
    if prompts == "canvas":
        from lbdt.canvas import OBJECTS as concepts
        from lbdt.canvas import STYLES as styles
    if guidance is None and model is None:
        from lbdt.canvas.generate import GUIDANCE

        guidance = GUIDANCE
    with _team(device) as team:
        where = team.device
        source = Generated(
            load_pipeline(model, where),
            labelled,
            wanted,
            steps=steps,
            guidance=guidance,
            prompts_per_shard=prompts_per_shard,
            patches=patches,
            timesteps=timesteps,
            dtype=DTYPES[dtype][1],
            seed=seed,
            concepts=concepts,
            styles=styles,
            threads=threads if where.type == "cpu" else None,
            model=model or "EmojiCanvas",
        )
        files = Files(source, out)
        files.check_space()
        resumed = files.present()
        if team.process == 0:
            there = f", {resumed} there already" if resumed else ""
            sys.stderr.write(
                f"{out}: {files.layout.shards} shards of {len(labelled)} prompts, {human(files.bytes)}{there}; "
                f"written by {_processes(team.processes)}\n"
            )
        team.wait()
        collect(source, out, process=team.process, processes=team.processes)
        team.wait()
        stored = Stored(out)
    values = {
        "out": str(out),
        "model": model or "EmojiCanvas",
        "device": str(where),
        "process": team.process,
        "processes": team.processes,
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
        "dtype": dtype,
        "shards": files.layout.shards,
        "resumed": resumed,
        "bytes": files.bytes,
        "seconds": time.perf_counter() - start,
    }
    return values, _table(values)


def load_pipeline(model: str | None, device: torch.device):
    """EmojiCanvas, or the diffusers pipeline of a folder or Hub repository, on `device`; half precision on a GPU."""
    if model is None:
        from lbdt import canvas

        pipe = canvas.load_pipeline()
    else:
        from diffusers import DiffusionPipeline

        half = {"torch_dtype": torch.float16} if device.type == "cuda" else {}
        pipe = DiffusionPipeline.from_pretrained(model, **half)
    return pipe.to(device)


def canvas_prompts(seeds: Sequence[int]) -> list[Prompt]:
    """Every object of EmojiCanvas in every style, and in none, for every seed."""
    from lbdt.canvas import OBJECTS, STYLES
    from lbdt.canvas.generate import grid

    return [
        Prompt(
            case.prompt,
            OBJECTS[case.concept],
            None if case.style is None else STYLES[case.style],
            case.seed,
        )
        for case in grid(seeds, plain=True)
    ]


def parse_timesteps(text: str | None) -> int | list[int] | None:
    """A number of timesteps ("10"), or timesteps ("999,749" or "999,"); ValueError for anything else."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
    except ValueError:
        raise ValueError(f"--timesteps: expected a number such as 10, or 999,749; got {text!r}") from None


def parse_seeds(text: str) -> range:
    """ "100:104", the end not included; ValueError for anything else, or none."""
    first, colon, end = text.partition(":")
    try:
        seeds = range(int(first), int(end))
    except ValueError:
        seeds = range(0)
    if not colon or not seeds or seeds[0] < 0:
        raise ValueError(f"--canvas-seeds: expected FIRST:END such as 100:104, got {text!r}")
    return seeds


class _Team(NamedTuple):
    """The processes of one run."""

    process: int
    processes: int
    device: torch.device
    wait: Callable[[], None]


@contextlib.contextmanager
def _team(device: str) -> Iterator[_Team]:
    """This process alone, or where `accelerate launch` or torchrun started several, its place among them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield _Team(0, 1, usable_device(device), lambda: None)
        return
    from accelerate import PartialState

    state = PartialState(cpu=usable_device(device).type == "cpu", timeout=_PATIENCE)
    try:
        # "auto" and "cuda": each process its own GPU; the CPU is one for all.
        where = state.device if device in ("auto", "cuda") else usable_device(device)
        yield _Team(state.process_index, state.num_processes, where, state.wait_for_everyone)
    finally:
        state.destroy_process_group()


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
