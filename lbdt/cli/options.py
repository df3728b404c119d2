"""What the commands of the command line share: options with their ranges, printing, and failures as one line."""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from lbdt.runs.limits import LARGEST, SEEDS
from lbdt.runs.wording import printable
from lbdt.runs.writable import unwritable, worded


class CanvasKind(enum.StrEnum):
    """Erasers of EmojiCanvas."""

    saeuron = "saeuron"
    saemnesia = "saemnesia"
    gsae = "gsae"
    sdxl = "sdxl"
    saeparate = "saeparate"


class Dtype(enum.StrEnum):
    """Number formats of tensors and activations."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


MOST = 2**31 - 1
"""The largest count."""
MOST_THREADS = 1024


def finite(value: float | None) -> float | None:
    """The callback of options that are numbers: bad usage where one is NaN or infinite."""
    for number in value if isinstance(value, list | tuple) else (value,):
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"expected a finite number, got {number}")
    return value


def inside(
    low: float, high: float, open_low: bool = False, with_high: bool = False
) -> Callable[[float | None], float | None]:
    """The callback of options that are numbers in [low, high), without `low` or with `high` where asked."""

    def check(value: float | None) -> float | None:
        ends = (value == low and not open_low) or (value == high and with_high)
        if value is not None and not (low < value < high or ends):
            left, right = "[("[open_low], ")]"[with_high]
            raise typer.BadParameter(f"expected a number in {left}{low:g}, {high:g}{right}, got {value}")
        return value

    return check


def counted(*names: str, most: int = MOST, **about: Any) -> Any:
    """An option that is a whole number in [min, most], `min` 1 unless given."""
    return typer.Option(*names, **{"min": 1, "max": most, **about})


def number(*names: str, **about: Any) -> Any:
    """An option that is a finite number in [min, max], by default +-`LARGEST`."""
    return typer.Option(*names, callback=finite, **{"min": -LARGEST, "max": LARGEST, **about})


AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Seed = Annotated[int, typer.Option("--seed", **SEEDS, help="Of the start noise and the donor draws.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: CUDA where there is one.")
]
Eraser = Annotated[
    str | None,
    typer.Option(
        "--eraser", metavar="DIR_OR_HUB", help="Eraser folder or repository. Default: EmojiCanvas's."
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR_OR_HUB", help="A diffusers pipeline. Default: EmojiCanvas."),
]
KindOption = Annotated[CanvasKind, typer.Option("--kind", help="Without --eraser: which of EmojiCanvas's.")]
UnusedSeed = Annotated[
    int, typer.Option("--seed", **SEEDS, help="Accepted by every command; nothing is drawn here.")
]
UnusedDevice = Annotated[
    str, typer.Option("--device", help="Accepted by every command; nothing is run here.")
]
_FAILURES = (
    ValueError,
    TypeError,
    LookupError,
    OSError,
    RuntimeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    MemoryError,
)


def require_eraser(model: str | None, eraser: str | None) -> None:
    """Bad usage where a pipeline of one's own is given without an eraser of it."""
    if model is not None and eraser is None:
        raise typer.BadParameter(
            "an eraser belongs to a pipeline: give --eraser with --model", param_hint="--eraser"
        )


def reported(command: Callable) -> Callable:
    """Failures become one line on stderr, those with `faults` one for each, and exit code 1; an interruption one line
    and 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from lbdt import _build

        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by the caller, who wants nothing of it
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        try:
            _check_folder()
            _build.check_variables()
            command(*args, **kwargs)
        except KeyboardInterrupt as error:
            # An interruption that passed through an `exec` of text makes `python -m` end by the signal; another resets
            # it.
            exec("")
            say("lbdt: interrupted")
            raise typer.Exit(128 + signal.SIGINT) from error
        except _FAILURES as error:
            # An error of several faults has a line for each.
            lines = str(error).split("\n") if hasattr(error, "faults") else [_in_words(error)]
            say("lbdt: " + "\n".join(map(printable, lines)))
            raise typer.Exit(1) from error

    return run


def _check_folder() -> None:
    """ValueError in a folder that has been deleted: MKL, for one, ends a process there."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ValueError("the current folder has been deleted; cd to one that is there") from error


def _in_words(error: BaseException) -> str:
    """The error in one line."""
    text = str(error)
    if isinstance(error, OSError):
        text = worded(error)
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # str(KeyError) would quote it
    return " ".join(text.split()) or type(error).__name__


def say(line: str) -> None:
    """A line, or several, on stderr, if it still takes one; characters that it cannot show are escaped."""
    with contextlib.suppress(OSError):
        sys.stderr.write(_shown(line, sys.stderr) + "\n")


def print_result(values: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """`values` as JSON, or `lines` as text, on stdout; numbers that are not finite are null in JSON."""
    text = json.dumps(_strict(values), indent=2, allow_nan=False) if as_json else _visible(lines)
    try:
        sys.stdout.write(_shown(text, sys.stdout) + "\n")
        sys.stdout.flush()
    except OSError as error:
        # Or the interpreter would write what is left once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `| head -1` has what it wanted
            raise OSError(error.errno, f"stdout cannot be written: {unwritable(error)}") from error


def _visible(lines: Sequence[str]) -> str:
    """Text in which no name steers the terminal."""
    return "\n".join(printable(line) for text in lines for line in text.split("\n"))


def _shown(text: str, stream: Any) -> str:
    """`text` with what the stream's encoding cannot say escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _strict(value: Any) -> Any:
    """JSON-like values without NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    return [_strict(inner) for inner in value] if isinstance(value, list | tuple) else value
