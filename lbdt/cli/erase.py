"""`lbdt erase`: one prompt without and with the eraser, from the same seed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt import __version__
from lbdt.app.settings import RemovalMethod
from lbdt.cli.options import (
    AsJson,
    CanvasKind,
    Device,
    Eraser,
    KindOption,
    Model,
    Seed,
    counted,
    number,
    print_result,
    reported,
    require_eraser,
    say,
)
from lbdt.donors import AvoidedPatches, DonorSource
from lbdt.runs.limits import MOST_PADDING, MOST_PATCHES, MOST_STEPS

if TYPE_CHECKING:
    from PIL import Image

    from lbdt.editors import Report, UnetEditor
    from lbdt.editors.edit_report import StepReport

_BESIDE = ("settings", "out", "device", "as_json")
"""What may be given beside a file of settings."""


@reported
def command(
    ctx: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help='E.g. "An image of Dogs and Cats in Sketch style."')
    ] = None,
    concept: Annotated[
        list[str] | None, typer.Option("--concept", metavar="NAME", help="What to erase; may be repeated.")
    ] = None,
    model: Model = None,
    eraser: Eraser = None,
    kind: KindOption = CanvasKind.saeuron,
    method: Annotated[
        RemovalMethod, typer.Option(help="Replace patches, or the steering baseline of the same folder.")
    ] = RemovalMethod.per,
    strength: Annotated[
        float | None, number(help="Of steering, negative to erase. Default: the folder's.")
    ] = None,
    padding: Annotated[
        int | None, counted(min=0, most=MOST_PADDING, help="Patches around the mask. Default: the eraser's.")
    ] = None,
    source: Annotated[DonorSource | None, typer.Option(help="Donor patches. Default: the eraser's.")] = None,
    min_patches: Annotated[
        int | None,
        counted(
            most=MOST_PATCHES,
            help="Detected patches below which the picture is left; 1: off. Default: the eraser's.",
        ),
    ] = None,
    avoid: Annotated[
        AvoidedPatches | None, typer.Option(help="Whose patches are no donors. Default: the eraser's.")
    ] = None,
    steps: Annotated[
        int | None, counted(most=MOST_STEPS, help="Denoising steps. Default: 20, for kind sdxl 4.")
    ] = None,
    guidance: Annotated[
        float | None,
        number(
            min=0,
            help="Guidance scale. Default: on EmojiCanvas 3, for kind sdxl none; else the pipeline's own.",
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Repeat a picture: take everything but --out, --device and --json from here.",
        ),
    ] = None,
    save_settings: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write what --settings repeats the picture by.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")] = Path("erased.png"),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate PROMPT without and with the eraser, from the same seed, and write one picture of both."""
    given = _given(ctx)
    if settings is not None:
        if beside := [flag for name, flag in given.items() if name not in _BESIDE]:
            raise typer.BadParameter(
                f"has everything in its file; leave out {', '.join(beside)}", param_hint="--settings"
            )
    else:
        missing = {"PROMPT": prompt is None, "--concept": not concept}
        if any(missing.values()):
            names = " and ".join(name for name, lacks in missing.items() if lacks)
            raise typer.BadParameter(f"missing; give {names}, or a picture's --settings", param_hint=names)
        _check_method(given, method)
    require_eraser(model, eraser)
    from lbdt.app.drawing import draw
    from lbdt.app.settings import PictureSettings, load_editor, read_settings
    from lbdt.canvas.defaults import NAME, pipeline_of
    from lbdt.cli import erase_picture
    from lbdt.runs.files import write_file
    from lbdt.runs.processes import usable_device
    from lbdt.runs.writable import check_out

    # Everything that can be refused is refused before the first image is generated.
    asked = (
        PictureSettings(
            prompt,
            tuple(dict.fromkeys(concept)),
            model=model,
            eraser=eraser,
            kind=kind.value,
            method=method.value,
            strength=strength,
            padding=padding,
            source=None if source is None else source.value,
            avoid=None if avoid is None else avoid.value,
            min_patches=min_patches,
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        if settings is None
        else read_settings(settings)
    )
    if asked.version != __version__:
        say(f"lbdt: {settings}: is of lbdt {asked.version}, and this is {__version__}: bits may differ")
    erase_picture.check_path(out)
    if save_settings is not None:
        check_out(save_settings, "settings", "--save-settings")
    where = usable_device(device)
    loaded = load_editor(asked)
    # An unknown concept is told from the dictionary alone, before gigabytes of pipeline are read.
    chosen = {name: loaded.select(name) for name in asked.concepts}
    asked.resolved(loaded)
    pipe = pipeline_of(asked.model, where)
    asked = asked.resolved(loaded, pipe)
    editor = asked.applied(loaded)
    attach = partial(editor.attach, pipe, list(asked.concepts), seed=asked.seed, selections=chosen)
    attach().remove()

    # The first call of a process pays for allocations and kernel choices that the second finds made.
    for label, number_of_steps in (("warm-up", 1), ("without", None)):
        pipe.set_progress_bar_config(desc=label, file=sys.stderr)
        before, seconds_without = draw(pipe, asked, steps=number_of_steps)
    pipe.set_progress_bar_config(desc="with", file=sys.stderr)
    with attach(keep_masks=True) as attached:
        after, seconds_with = draw(pipe, asked)
    report, masks = attached.report(), attached.masks()

    erased, steer = ", ".join(asked.concepts), asked.method == RemovalMethod.steering
    captions = ("without", f"patches of {erased}", f"{erased} {'steered' if steer else 'erased'}")
    erase_picture.save(erase_picture.compose(before, masks, after, captions), out)
    if save_settings is not None:
        write_file(save_settings, asked.to_json().encode())
    overhead = 100 * (seconds_with / seconds_without - 1)
    values = {
        "prompt": asked.prompt,
        "concepts": list(asked.concepts),
        "model": asked.model or NAME,
        "eraser": asked.eraser or f"{NAME}, {asked.kind}",
        "method": asked.method,
        "hookpoint": editor.hookpoint,
        **{name: editor.settings[name] for name in editor.SHOWN},
        "steps": asked.steps,
        "guidance": asked.guidance,
        "seed": asked.seed,
        "device": str(where),
        "seconds": {"without": seconds_without, "with": seconds_with},
        "overhead_percent": overhead,
        "report": report.to_dict(),
        "verdict": _verdict(before, after) if asked.model is None else None,
        "out": str(out),
    }
    print_result(values, _table(values, editor, report), as_json)


def _given(ctx: typer.Context) -> dict[str, str]:
    """The arguments that the command line names, as they are written there, by name."""
    return {
        param.name: param.opts[0] if param.opts[0].startswith("-") else param.opts[0].upper()
        for param in ctx.command.params
        if getattr(ctx.get_parameter_source(param.name), "name", "") == "COMMANDLINE"
    }


def _check_method(given: dict[str, str], method: RemovalMethod) -> None:
    """Bad usage where an option of the other method was given."""
    if method is RemovalMethod.steering and given.keys() & {"padding", "source", "min_patches", "avoid"}:
        raise typer.BadParameter(
            "--padding, --source, --min-patches and --avoid are of --method per", param_hint="--method"
        )
    if method is RemovalMethod.per and "strength" in given:
        raise typer.BadParameter("is of --method steering: PER has no strength", param_hint="--strength")


def _verdict(before: Image.Image, after: Image.Image) -> dict[str, dict[str, Any]]:
    from lbdt import canvas

    seen, styles = canvas.classify([before, after])
    return {
        name: {
            "objects": [canvas.OBJECTS[index] for index in seen[i].nonzero().flatten().tolist()],
            "style": canvas.STYLES[int(styles[i])],
        }
        for i, name in enumerate(("without", "with"))
    }


def _seen(verdict: dict[str, Any]) -> str:
    return f"{' and '.join(verdict['objects']) or 'nothing'} in {verdict['style']} style"


def _table(values: dict[str, Any], editor: UnetEditor, report: Report) -> list[str]:
    rows = max((step.rows for step in report.steps), default=0)
    seconds = values["seconds"]
    steps = report.steps
    settings = (f"{name} {value}" for name, value in editor.shown.items())
    edited = "patches steered" if values["method"] == "steering" else "patches replaced"
    lines = [
        f"{'erased':22}{', '.join([*values['concepts'], *settings])}",
        f"{'hookpoint':22}{values['hookpoint']}",
        f"{'patches detected':22}{report.detected:.1%} of {len(steps)} steps' patches{_range(steps, 'detected')}",
        f"{edited:22}{report.replaced:.1%}{_range(steps, 'replaced')}",
        f"{'seconds':22}{seconds['without']:.2f} without, {seconds['with']:.2f} with: "
        f"{values['overhead_percent']:+.1f} %",
    ]
    if values["verdict"]:
        before, after = (values["verdict"][name] for name in ("without", "with"))
        lines.append(f"{'classifiers see':22}{_seen(before)} -> {_seen(after)}")
    full = sum(step.without_free for step in steps)
    if full:
        fate = (
            f"{report.unchanged} left unchanged (no bank)"
            if report.unchanged
            else "took the bank's embeddings"
        )
        lines.append(f"{'no undetected patch':22}in {full} of {rows * len(steps)} feature maps: {fate}")
    if report.gated:
        lines.append(
            f"{'left by the gate':22}at {report.gated} of {len(steps)} steps: too few patches detected"
        )
    if report.not_finite:
        lines.append(f"{'not looked at':22}{report.not_finite} patches that are NaN or infinite")
    blind = dict.fromkeys(name for step in steps for name in step.blind)
    for name in blind:
        count = sum(name in step.blind for step in steps)
        lines.append(f"{'not looked for':22}{name} at {count} of {len(steps)} steps: no latent")
    lines.append(f"{'picture':22}{values['out']}")
    return lines


def _range(steps: Sequence[StepReport], name: str) -> str:
    shares = [getattr(step, name) for step in steps]
    return f" ({min(shares):.1%} to {max(shares):.1%} by step)" if shares else ""
