"""The command `lbdt bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from lbdt.cli.options import MOST_THREADS, SEEDS, AsJson, Device, counted, number, print_result, reported


@reported
def command(
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
        number(
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
        int | None,
        counted(min=2, most=1_000_000, help="Timed rounds per case, at most. Default: 15, on a GPU 50."),
    ] = None,
    threads: Annotated[
        int | None, counted(most=MOST_THREADS, help="CPU threads. Default: torch's choice.")
    ] = None,
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
    seed: Annotated[int, typer.Option("--seed", **SEEDS, help="Of the inputs.")] = 0,
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
    print_result(*run(given, threads=threads, out=out), as_json)
