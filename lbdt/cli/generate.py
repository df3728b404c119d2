"""`lbdt generate`: a file of prompts to pictures with concepts erased, on one machine or many."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lbdt.cli.options import (
    MOST_THREADS,
    AsJson,
    CanvasKind,
    Device,
    Eraser,
    KindOption,
    Model,
    counted,
    number,
    print_result,
    reported,
    say,
)
from lbdt.runs.limits import MOST_STEPS, SEEDS

_NAMED = 20


class OnPictureFailure(enum.StrEnum):
    """What becomes of a picture whose concepts could not be erased."""

    refuse = "refuse"
    unprotected = "unprotected"


@reported
def command(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.jsonl",
            help='A picture a line: {"prompt": "a cat", "seed": 1, "concepts": ["Cats"], "id": "a1", "size": '
            '"512x512"}; only the prompt is needed. concepts: what is erased, [] for nothing.',
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the pictures; continued if begun.")
    ],
    concept: Annotated[
        list[str] | None,
        typer.Option(
            "--concept", metavar="NAME", help="Erased where a line has no concepts; may be repeated."
        ),
    ] = None,
    model: Model = None,
    eraser: Eraser = None,
    kind: KindOption = CanvasKind.saeuron,
    steps: Annotated[
        int | None, counted(most=MOST_STEPS, help="Denoising steps. Default: 20, for kind sdxl 4.")
    ] = None,
    guidance: Annotated[float | None, number(min=0, help="Guidance scale. Default: as lbdt erase.")] = None,
    batch: Annotated[int, counted(most=256, help="Rows of a call of the pipeline.")] = 8,
    on_failure: Annotated[
        OnPictureFailure,
        typer.Option(help="A picture in which erasing failed is not written, or written with its concepts."),
    ] = OnPictureFailure.refuse,
    workers: Annotated[
        int, counted(most=MOST_THREADS, help="Processes, each with an engine; each takes a GPU, in turn.")
    ] = 1,
    threads: Annotated[
        int | None,
        counted(
            most=MOST_THREADS,
            help="CPU threads of each worker; a picture's bits depend on it. Default: the folder's, if begun, else "
            "cores / workers.",
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="The workers are actors of Ray Data, on nodes that share --out.")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            "--ray-address",
            metavar="ADDRESS",
            help='--ray on this cluster, "auto": this machine\'s. Default: one is started.',
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", **SEEDS, help="A line without a seed has this plus its number, from 1.")
    ] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate a picture for each line of FILE.jsonl, its concepts erased, as DIR/pictures/ID.png.

    The same command continues a run that was stopped or killed, and tries again what was refused; the files are the
    same, whatever the number of workers. Ends with exit code 1 if a picture was refused.
    """
    from lbdt.serving.jobs import PictureJob, generate

    begun = time.perf_counter()
    job = PictureJob(
        prompts=prompts,
        out=out,
        concepts=concept or None,
        seed=seed,
        model=model,
        eraser=eraser,
        kind=kind.value,
        steps=steps,
        guidance=guidance,
        batch=batch,
        on_failure=on_failure.value,
        device=device,
        workers=workers,
        threads=threads,
        ray=ray or ray_address is not None,
        ray_address=ray_address,
    )
    try:
        result = generate(job)
    except KeyboardInterrupt:
        say("lbdt: what was made is kept; the same command goes on")
        raise
    summary = result.summary
    if result.interrupted:
        say(
            f"lbdt: stopped with {summary['pictures']} of {summary['lines']} pictures in {out}; the same command goes "
            "on"
        )
        raise KeyboardInterrupt
    if not result.made and result.there == summary["lines"]:
        say(f"lbdt: nothing to do: all {result.there} pictures are in {out}")
    values = {
        "out": str(out),
        "device": result.device,
        "workers": workers,
        "threads": result.threads,
        "made": result.made,
        "there": result.there,
        **summary,
        "seconds": time.perf_counter() - begun,
    }
    print_result(values, _table(values), as_json)
    if unprotected := summary["unprotected"]:
        say(
            f"lbdt: {len(unprotected)} of {summary['lines']} pictures are not protected, as --on-failure unprotected "
            f"allows: {_named(unprotected)}"
        )
    if refused := summary["refused"]:
        first = next(iter(refused))
        raise RuntimeError(
            f"{len(refused)} of {summary['lines']} pictures were refused: {_named(refused)}; {first}: "
            f"{refused[first]}; {out / 'summary.json'} has all reasons, and the same command tries them again"
        )


def _named(ids: Any) -> str:
    from lbdt.runs.reading import listed

    return listed(ids, _NAMED)


def _table(values: dict[str, Any]) -> list[str]:
    made, there = values["made"], values["there"]
    rows = (
        (
            "pictures",
            f"{values['pictures']} of {values['lines']}" + (f", {there} there already" if there else ""),
        ),
        ("protected", f"{values['protected']}, and {values['without_concepts']} with nothing to erase"),
        ("unprotected", f"{len(values['unprotected'])}"),
        ("refused", f"{len(values['refused'])}"),
        (
            "seconds",
            f"{values['seconds']:.1f} for {made} by {values['workers']} of {values['threads']} threads on "
            f"{values['device']}",
        ),
        ("folder", values["out"]),
    )
    return [f"{name:12}{text}" for name, text in rows]
