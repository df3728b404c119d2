"""`lbdt bench`: kernels and the hook, timed on this machine against the baselines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt.cli.options import MOST_THREADS, AsJson, Device, counted, number, print_result, reported
from lbdt.runs.limits import SEEDS

if TYPE_CHECKING:
    from lbdt.bench.cases import Spec
    from lbdt.bench.runner import BenchOptions

AUTO = "auto"


@reported
def command(
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op",
            metavar="NAME",
            help="detect_patches, replace_patches_, encode_topk, patch_uniform, record_patches or hook; may be "
            "repeated. Default: all.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME",
            help="sd15-b1, sd15-b4, sd15-b8, sdxl-1024, sdxl-turbo, canvas or host (so small that only the host's time "
            "counts); may be repeated. Default: all.",
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
        bool,
        typer.Option(
            "--unet", help="Also the hook's share of a UNet step at SD 1.5's size (on a CPU: some minutes)."
        ),
    ] = False,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Also with cold caches, as between two steps of a denoiser (CPU)."),
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
    from lbdt.bench.runner import BenchOptions
    from lbdt.runs.processes import usable_device

    given = BenchOptions(
        ops=op or (),
        shapes=shape or (),
        shares=[value / 100 for value in share or ()],
        dtypes=dtype or (),
        device=usable_device(device),
        seed=seed,
        quick=quick,
        rounds=rounds,
        unet=unet,
        cold=cold,
    )
    try:
        given.specs()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print_result(*_run(given, threads=threads, out=out), as_json)


def _run(options: BenchOptions, *, threads: int | None, out: str | None) -> tuple[dict[str, Any], list[str]]:
    """The result and its table; written to `out` too.

    Raises Mismatch, a RuntimeError, where a version disagrees with another, before any of its times is shown.
    """
    import torch

    from lbdt.bench import runner, timing_table
    from lbdt.runs.files import write_file

    path = None if out is None else _path(out, options)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        result = runner.run(options, _bar)
    finally:
        torch.set_num_threads(before)
    lines = timing_table.lines(result)
    if path is not None:
        write_file(path, (json.dumps(result, indent=1) + "\n").encode())
        lines.append(f"written: {path}")
    return result, lines


def _bar(specs: list[Spec]) -> Iterator[Spec]:
    from tqdm import tqdm

    with tqdm(specs, desc="bench", unit="case", file=sys.stderr) as bar:
        for spec in bar:
            bar.set_postfix_str(str(spec), refresh=False)
            yield spec


def _path(out: str, options: BenchOptions) -> Path:
    """Where the result goes, refused before anything is measured if it cannot be written."""
    from lbdt.bench import hardware
    from lbdt.runs.writable import check_out

    if out == AUTO:
        folder = hardware.ROOT / "benchmarks" / "results"
        if not folder.parent.is_dir():
            raise ValueError(
                "--out auto: means benchmarks/results of a checkout, but this is an installation"
            )
        if options.quick:
            raise ValueError("--out auto: results of --quick are not kept there; name a file")
        about = hardware.cuda(options.device) if options.device.type == "cuda" else hardware.cpu()
        path = folder / f"{hardware.slug(about)}.json"
    else:
        path = Path(out)
    check_out(path, "result")
    return path
