"""The command `lbdt env`."""

from __future__ import annotations

from lbdt.cli.options import AsJson, UnusedDevice, UnusedSeed, print_result, reported


@reported
def command(seed: UnusedSeed = 0, device: UnusedDevice = "cpu", as_json: AsJson = False) -> None:
    """Versions, devices, and which backend serves each op, with the reasons why the others do not."""
    from lbdt.env import collect, lines

    values = collect()
    print_result(values, lines(values), as_json)
