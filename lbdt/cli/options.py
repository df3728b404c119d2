"""What the commands of the command line share: options, printing, and failures as one line."""

from __future__ import annotations

import enum
import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer


class Kind(enum.StrEnum):
    """Erasers of EmojiCanvas."""

    saeuron = "saeuron"
    saemnesia = "saemnesia"
    gsae = "gsae"
    sdxl = "sdxl"


class Dtype(enum.StrEnum):
    """Number formats of tensors and activations."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the start noise and the donor draws.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: CUDA where there is one.")
]
Eraser = Annotated[
    str | None,
    typer.Option(
        "--eraser", metavar="DIR_OR_HUB", help="Eraser folder or repository. Default: EmojiCanvas's."
    ),
]
KindOption = Annotated[Kind, typer.Option("--kind", help="Without --eraser: which of EmojiCanvas's.")]
UnusedSeed = Annotated[int, typer.Option("--seed", help="Accepted by every command; nothing is drawn here.")]
UnusedDevice = Annotated[
    str, typer.Option("--device", help="Accepted by every command; nothing is run here.")
]


def reported(command: Callable) -> Callable:
    """Failures become one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError) as error:
            # str(KeyError) would quote its text.
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            sys.stderr.write(f"lbdt: {' '.join(str(text).split()) or type(error).__name__}\n")
            raise typer.Exit(1) from error

    return run


def print_result(values: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """`values` as JSON, or `lines` as text, on stdout."""
    sys.stdout.write(json.dumps(values, indent=2) + "\n" if as_json else "\n".join(lines) + "\n")
