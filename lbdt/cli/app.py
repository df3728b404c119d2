"""`lbdt app`: a page in the browser."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from lbdt.cli.options import (
    CanvasKind,
    Device,
    Eraser,
    KindOption,
    Model,
    UnusedSeed,
    counted,
    reported,
    require_eraser,
    say,
)
from lbdt.runs.limits import MOST_STEPS


@reported
def command(
    model: Model = None,
    eraser: Eraser = None,
    kind: KindOption = CanvasKind.saeuron,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, counted(most=65_535, help="Port to listen on.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also by a public address of Gradio's, for anyone who has it.")
    ] = False,
    max_steps: Annotated[int, counted(most=MOST_STEPS, help="Most denoising steps of a visitor.")] = 100,
    max_queue: Annotated[
        int, counted(most=1000, help="Visitors who wait; more are told to come again.")
    ] = 16,
    seed: UnusedSeed = 0,
    device: Device = "auto",
) -> None:
    """Open a page: a concept erased as the picture emerges, methods compared, the dictionary inspected."""
    require_eraser(model, eraser)
    from lbdt.runs.extras import needed

    needed("lbdt app", "app", "gradio")
    from lbdt.app.page import launch
    from lbdt.app.world import Limits, World
    from lbdt.runs.processes import usable_device

    where = usable_device(device)
    # As Ctrl-C does, so that what visitors made is deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say("lbdt: loading the model ...")
    world = World(where, model, eraser, kind.value, Limits(steps=max_steps, waiting=max_queue))
    try:
        blocks, address = launch(world, host, port, share)
        say(f"lbdt: {address} (Ctrl-C ends it)")
        blocks.block_thread()
    finally:
        world.close()
