"""`lbdt convert`: other projects' files as lbdt's, or an SAE as sdxl-unbox's."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lbdt.cli.options import AsJson, Dtype, UnusedDevice, UnusedSeed, print_result, reported
from lbdt.formats import SOURCES

SourceFormat = enum.StrEnum("SourceFormat", {name.replace("-", "_"): name for name in SOURCES})


class TargetFormat(enum.StrEnum):
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
            "cls_latents_dict_HOOKPOINT.pkl, style_latents_dict_HOOKPOINT.pkl, class_params.pth.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    source_format: Annotated[
        SourceFormat,
        typer.Option("--from", help="auto goes by the files and their folder; a G-SAE must be named."),
    ] = SourceFormat.auto,
    target: Annotated[TargetFormat, typer.Option("--to", help="Whose files to write.")] = TargetFormat.lbdt,
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
    from lbdt.cli.conversion import convert

    values = convert(
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
    print_result(values, _table(values), as_json)


def _table(values: dict[str, Any]) -> list[str]:
    lines = [f"{'read':12}{values['source']} ({values['from']})"]
    lines += [f"{'tensor':12}{name} {shape}" for name, shape in values["tensors"].items()]
    lines += [
        f"{'setting':12}{name} {_shown(value, exact=True)}" for name, value in values["settings"].items()
    ]
    lines += [f"{'assumed':12}{note}" for note in values["assumptions"]]
    lines += [
        f"{'check':12}{name.replace('_', ' ')} {_shown(value)}" for name, value in values["checks"].items()
    ]
    if values["tensors"]:
        lines.append(f"{'check':12}what was written reads back equal")
    lines.append(f"{'written':12}{values['out']}: {', '.join(values['files'])}")
    return lines


def _shown(value: Any, exact: bool = False) -> str:
    """A value in one line; what was set `exact`, what was measured to four digits."""
    if isinstance(value, float):
        return repr(value) if exact else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner, exact)}" for key, inner in value.items())
    if isinstance(value, list):
        shown = [_shown(inner, exact) for inner in value]
        return (
            ", ".join(shown)
            if len(shown) <= 8
            else f"{', '.join(shown[:3])}, ..., {shown[-1]} ({len(shown)})"
        )
    return str(value)
