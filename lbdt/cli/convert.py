"""The command `lbdt convert`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from lbdt.cli.options import AsJson, Dtype, UnusedDevice, UnusedSeed, print_result, reported
from lbdt.formats import SOURCES

Source = enum.StrEnum("Source", {name.replace("-", "_"): name for name in SOURCES})


class Target(enum.StrEnum):
    """What is written."""

    lbdt = "lbdt"
    sdxl_unbox = "sdxl-unbox"


@reported
def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder or Hub repository (owner/name, owner/name@revision) of a checkpoint, or a file: "
            "cls_latents_dict_HOOKPOINT.pkl, class_params.pth.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    source_format: Annotated[
        Source, typer.Option("--from", help="auto goes by the files; a G-SAE must be named.")
    ] = Source.auto,
    target: Annotated[Target, typer.Option("--to", help="Whose files to write.")] = Target.lbdt,
    hookpoint: Annotated[
        str | None,
        typer.Option("--hookpoint", metavar="NAME", help="Subfolder (or path of them) of the source."),
    ] = None,
    update: Annotated[
        bool | None,
        typer.Option(
            "--update/--no-update",
            help="The SAE is one of the block's output minus its input, or of its output. Default: the format's.",
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            help="Of the latents' steps, first step first: 991,981,... or a DDIM spacing: leading, trailing, linspace. "
            "Default: leading."
        ),
    ] = None,
    concepts: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Classes of the latents to take: Cats,Dogs. Default: all."),
    ] = None,
    encoder_only: Annotated[
        bool, typer.Option("--encoder-only", help="Leave the SAE's decoder out: detection needs none.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the tensors written.")] = Dtype.float32,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files of an earlier conversion in --out.")
    ] = False,
    seed: UnusedSeed = 0,
    device: UnusedDevice = "cpu",
    as_json: AsJson = False,
) -> None:
    """Turn another project's SAE, latents pickle or steering parameters into lbdt's files, without running its code."""
    from lbdt.commands.convert import run

    values, lines = run(
        source,
        out=out,
        source_format=source_format.value,
        target=target.value,
        hookpoint=hookpoint,
        update=update,
        timesteps=timesteps,
        concepts=concepts,
        encoder_only=encoder_only,
        dtype=dtype.value,
        force=force,
    )
    print_result(values, lines, as_json)
