"""The `lbdt` command. Heavy imports happen inside the commands, so `lbdt --help` is quick."""

from __future__ import annotations

import enum
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="lbdt",
    help="Concept erasure in diffusion models: an SAE detects a concept's patches, and they are replaced.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Source(enum.StrEnum):
    """Where donors come from."""

    random = "random"
    nearest = "nearest"
    mean = "mean"


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
UnusedSeed = Annotated[int, typer.Option("--seed", help="Accepted by every command; nothing is drawn here.")]
UnusedDevice = Annotated[
    str, typer.Option("--device", help="Accepted by every command; nothing is run here.")
]


def main() -> int:
    """Runs the command line; exits with 0 (done), 1 (failed) or 2 (bad usage)."""
    app(prog_name="lbdt")
    return 0


def _reported(command: Callable) -> Callable:
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


def _print(values: dict[str, Any], lines: list[str], as_json: bool) -> None:
    sys.stdout.write(json.dumps(values, indent=2) + "\n" if as_json else "\n".join(lines) + "\n")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import lbdt

        sys.stdout.write(f"lbdt {lbdt.__version__}\n")
        raise typer.Exit()


@app.command()
@_reported
def erase(
    prompt: Annotated[str, typer.Argument(help='E.g. "An image of Cats in Sketch style."')],
    concept: Annotated[
        list[str], typer.Option("--concept", metavar="NAME", help="What to erase; may be repeated.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="DIR_OR_HUB", help="A diffusers pipeline with a UNet. Default: EmojiCanvas."
        ),
    ] = None,
    eraser: Eraser = None,
    padding: Annotated[
        int | None, typer.Option(min=0, help="Patches around the mask. Default: the eraser's.")
    ] = None,
    source: Annotated[Source | None, typer.Option(help="Donor patches. Default: the eraser's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. Default: 3 on EmojiCanvas, else the pipeline's own.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")] = Path("erased.png"),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate PROMPT without and with the eraser, from the same seed, and write one picture of both."""
    if model is not None and eraser is None:
        raise typer.BadParameter(
            "an eraser belongs to a pipeline: give --eraser with --model", param_hint="--eraser"
        )
    from lbdt.commands.erase import run

    values, lines = run(
        prompt,
        concept,
        model=model,
        eraser=eraser,
        padding=padding,
        source=None if source is None else source.value,
        steps=steps,
        guidance=guidance,
        out=out,
        seed=seed,
        device=device,
    )
    _print(values, lines, as_json)


@app.command()
@_reported
def concepts(
    eraser: Eraser = None, seed: UnusedSeed = 0, device: UnusedDevice = "cpu", as_json: AsJson = False
) -> None:
    """List the concepts an eraser knows, their latents, and how often these fire on and off the concept."""
    from lbdt.commands.concepts import run

    _print(*run(eraser), as_json)


@app.command()
@_reported
def env(seed: UnusedSeed = 0, device: UnusedDevice = "cpu", as_json: AsJson = False) -> None:
    """Versions, devices, and which backend serves each op, with the reasons why the others do not."""
    from lbdt.env import collect, lines

    values = collect()
    _print(values, lines(values), as_json)


@app.command()
@_reported
def bench(
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op",
            metavar="NAME",
            help="detect_patches, replace_patches_, encode_topk, patch_uniform, record_patches or hook; may be repeated. "
            "Default: all.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="sd15-b1, sd15-b4, sd15-b8, sdxl-1024, sdxl-turbo or canvas; may be repeated. Default: all.",
        ),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            "--share",
            min=0,
            max=100,
            help="Per cent of the patches that are detected; may be repeated. Default: 0, 1, 10, 50 and 100.",
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="float32, float16 or bfloat16; may be repeated. Default: float32, on a GPU float16.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: shows that it works, not how fast.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=2, help="Timed rounds per case, at most. Default: 15, on a GPU 50.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    unet: Annotated[
        bool, typer.Option("--unet", help="Also the hook's share of a UNet step at SD 1.5's size (GPU).")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE.json",
            help="Write the result too; auto: benchmarks/results/DEVICE.json of the checkout.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Time the kernels and the hook on this machine, beside the baselines and the least time possible here.

    Answers are compared before anything is timed; where they differ, no time is shown and the exit code is 1.
    """
    from lbdt.commands.bench import options_of, run

    given = options_of(
        ops=op or (),
        shapes=shape or (),
        shares=[value / 100 for value in share or ()],
        dtypes=dtype or (),
        device=device,
        seed=seed,
        quick=quick,
        rounds=rounds,
        unet=unet,
    )
    try:
        given.specs()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _print(*run(given, threads=threads, out=out), as_json)
