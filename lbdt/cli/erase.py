"""`lbdt erase`: one prompt without and with the eraser, from the same seed."""

from __future__ import annotations

import enum
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lbdt.cli.options import (
    MOST_PADDING,
    MOST_PATCHES,
    MOST_STEPS,
    AsJson,
    CanvasKind,
    Device,
    Eraser,
    KindOption,
    Seed,
    counted,
    number,
    print_result,
    reported,
)
from lbdt.donors import AvoidedPatches, DonorSource

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lbdt.editors import Report, UnetEditor
    from lbdt.editors.edit_report import StepReport

_STEPS = 20


class RemovalMethod(enum.StrEnum):
    """What removes the concept."""

    per = "per"
    steering = "steering"


@reported
def command(
    prompt: Annotated[str, typer.Argument(help='E.g. "An image of Dogs and Cats in Sketch style."')],
    concept: Annotated[
        list[str], typer.Option("--concept", metavar="NAME", help="What to erase; may be repeated.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="DIR_OR_HUB", help="A diffusers pipeline. Default: EmojiCanvas."),
    ] = None,
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
    if method is RemovalMethod.steering and not (padding is source is min_patches is avoid is None):
        raise typer.BadParameter(
            "--padding, --source, --min-patches and --avoid are of --method per", param_hint="--method"
        )
    if method is RemovalMethod.per and strength is not None:
        raise typer.BadParameter("is of --method steering: PER has no strength", param_hint="--strength")
    from lbdt.canvas.defaults import NAME, eraser_of, pipeline_of, steering_of
    from lbdt.cli import erase_picture
    from lbdt.runs.processes import usable_device

    # Everything that can be refused is refused before the first image is generated.
    erase_picture.check_path(out)
    where = usable_device(device)
    steer = method is RemovalMethod.steering
    loaded = steering_of(eraser, kind.value, strength) if steer else eraser_of(eraser, kind.value)
    if padding is not None:
        loaded.padding = padding
    if source is not None:
        loaded.source = source.value
    if min_patches is not None:
        loaded.min_patches = min_patches
    if avoid is not None:
        loaded.avoid = avoid.value
    # An unknown concept is told from the dictionary alone, before gigabytes of pipeline are read.
    chosen = {name: loaded.select(name) for name in concept}
    pipe = pipeline_of(model, where)
    if model is None:
        from lbdt.canvas import KINDS

        steps = KINDS[kind.value].steps if steps is None else steps
        guidance = KINDS[kind.value].guidance if guidance is None else guidance
    steps = _STEPS if steps is None else steps
    attach = partial(loaded.attach, pipe, list(concept), seed=seed, selections=chosen)
    attach().remove()

    call = {"num_inference_steps": steps} | ({} if guidance is None else {"guidance_scale": guidance})
    # The first call of a process pays for allocations and kernel choices that the second finds made.
    _generate(pipe, prompt, seed, where, "warm-up", call | {"num_inference_steps": 1})
    before, seconds_without = _generate(pipe, prompt, seed, where, "without", call)
    with attach(keep_masks=True) as attached:
        after, seconds_with = _generate(pipe, prompt, seed, where, "with", call)
    report, masks = attached.report(), attached.masks()

    erased = ", ".join(concept)
    captions = ("without", f"patches of {erased}", f"{erased} {'steered' if steer else 'erased'}")
    erase_picture.save(erase_picture.compose(before, masks, after, captions), out)
    overhead = 100 * (seconds_with / seconds_without - 1)
    values = {
        "prompt": prompt,
        "concepts": list(concept),
        "model": model or NAME,
        "eraser": eraser or f"{NAME}, {kind.value}",
        "method": method.value,
        "hookpoint": loaded.hookpoint,
        **{name: loaded.settings[name] for name in loaded.SHOWN},
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "device": str(where),
        "seconds": {"without": seconds_without, "with": seconds_with},
        "overhead_percent": overhead,
        "report": report.to_dict(),
        "verdict": _verdict(before, after) if model is None else None,
        "out": str(out),
    }
    print_result(values, _table(values, loaded, report), as_json)


def _generate(
    pipe: Any, prompt: str, seed: int, device: torch.device, label: str, call: dict[str, Any]
) -> tuple[Image.Image, float]:
    """The image, and the seconds that it took."""
    import torch

    pipe.set_progress_bar_config(desc=label, file=sys.stderr)
    generator = torch.Generator().manual_seed(seed)
    _synchronize(device)
    start = time.perf_counter()
    image = pipe(prompt, generator=generator, **call).images[0]
    _synchronize(device)
    return image, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def _table(values: dict[str, Any], loaded: UnetEditor, report: Report) -> list[str]:
    rows = max((step.rows for step in report.steps), default=0)
    seconds = values["seconds"]
    steps = report.steps
    settings = (f"{name} {value}" for name, value in loaded.shown.items())
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
