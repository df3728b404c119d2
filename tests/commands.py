"""The commands of the command line, those of its groups too."""

from __future__ import annotations

from typing import Any

import typer

from lbdt import cli


def groups_and_commands() -> tuple[dict[str, Any], dict[str, Any]]:
    """Both by their names as they are typed, such as "policy check"."""
    groups, found, left = {}, {}, dict(typer.main.get_command(cli.app).commands)
    while left:
        name = next(iter(left))
        command = left.pop(name)
        if inner := getattr(command, "commands", None):
            groups[name] = command
            left |= {f"{name} {other}": each for other, each in inner.items()}
        else:
            found[name] = command
    return groups, found
