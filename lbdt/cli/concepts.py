"""The command `lbdt concepts`."""

from __future__ import annotations

from lbdt.cli.options import (
    AsJson,
    Eraser,
    Kind,
    KindOption,
    UnusedDevice,
    UnusedSeed,
    print_result,
    reported,
)


@reported
def command(
    eraser: Eraser = None,
    kind: KindOption = Kind.saeuron,
    seed: UnusedSeed = 0,
    device: UnusedDevice = "cpu",
    as_json: AsJson = False,
) -> None:
    """List the concepts an eraser knows, their latents, and how often these fire on and off the concept."""
    from lbdt.commands.concepts import run

    print_result(*run(eraser, kind.value), as_json)
