"""`lbdt erase`: one prompt without and with the eraser, from the same seed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lbdt import picture
from lbdt.commands.concepts import load_eraser, load_steering
from lbdt.commands.pipeline import CANVAS, load_pipeline
from lbdt.editors import Report, UnetEditor
from lbdt.runs.processes import usable_device

_STEPS = 20


def run(
    prompt: str,
    concepts: Sequence[str],
    *,
    model: str | None,
    eraser: str | None,
    kind: str,
    steer: bool,
    strength: float | None,
    padding: int | None,
    source: str | None,
    steps: int | None,
    guidance: float | None,
    out: Path,
    seed: int,
    device: str,
) -> tuple[dict[str, Any], list[str]]:
    """Writes the picture to `out`; returns the figures for JSON, and the lines of the table.

    `kind`: EmojiCanvas's eraser, and the sampling it was made for. `steer`: the steering baseline of the same folder.

    Everything that can be refused is refused before the first image is generated.
    """
    picture.check_path(out)
    where = usable_device(device)
    loaded = load_steering(eraser, kind, strength) if steer else load_eraser(eraser, kind)
    if padding is not None:
        loaded.padding = padding
    if source is not None:
        loaded.source = source
    # An unknown concept is told from the dictionary alone, before gigabytes of pipeline are read.
    for name in concepts:
        loaded.select(name)
    pipe = load_pipeline(model, where)
    if model is None:
        from lbdt.canvas import KINDS

        steps = KINDS[kind].steps if steps is None else steps
        guidance = KINDS[kind].guidance if guidance is None else guidance
    steps = _STEPS if steps is None else steps
    loaded.attach(pipe, list(concepts), seed=seed).remove()

    call = {"num_inference_steps": steps} | ({} if guidance is None else {"guidance_scale": guidance})
    # The first call of a process pays for allocations and kernel choices that the second finds made.
    _generate(pipe, prompt, seed, where, "warm-up", call | {"num_inference_steps": 1})
    before, seconds_without = _generate(pipe, prompt, seed, where, "without", call)
    with loaded.attach(pipe, list(concepts), seed=seed, keep_masks=True) as attached:
        after, seconds_with = _generate(pipe, prompt, seed, where, "with", call)
    report, masks = attached.report(), attached.masks()

    erased = ", ".join(concepts)
    captions = ("without", f"patches of {erased}", f"{erased} {'steered' if steer else 'erased'}")
    picture.save(picture.compose(before, masks, after, captions), out)
    overhead = 100 * (seconds_with / seconds_without - 1)
    values = {
        "prompt": prompt,
        "concepts": list(concepts),
        "model": model or CANVAS,
        "eraser": eraser or f"{CANVAS}, {kind}",
        "method": "steering" if steer else "per",
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
    return values, _table(values, loaded, report)


def _generate(pipe, prompt: str, seed: int, device: torch.device, label: str, call: dict[str, Any]):
    pipe.set_progress_bar_config(desc=label, file=sys.stderr)
    generator = torch.Generator().manual_seed(seed)
    _synchronize(device)
    start = time.perf_counter()
    image = pipe(prompt, generator=generator, **call).images[0]
    _synchronize(device)
    return image, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _verdict(before, after) -> dict[str, dict[str, str]]:
    from lbdt import canvas

    objects, styles = canvas.classify([before, after])
    return {
        name: {"object": canvas.OBJECTS[int(objects[i])], "style": canvas.STYLES[int(styles[i])]}
        for i, name in enumerate(("without", "with"))
    }


def _table(values: dict[str, Any], loaded: UnetEditor, report: Report) -> list[str]:
    rows = max((step.rows for step in report.steps), default=0)
    seconds = values["seconds"]
    steps = report.steps
    lines = [
        f"{'erased':22}{', '.join(values['concepts'])}, {', '.join(f'{name} {values[name]}' for name in loaded.SHOWN)}",
        f"{'hookpoint':22}{values['hookpoint']}",
        f"{'patches detected':22}{report.detected:.1%} of {len(steps)} steps' patches{_range(steps, 'detected')}",
        f"{'patches steered' if values['method'] == 'steering' else 'patches replaced':22}{report.replaced:.1%}{_range(steps, 'replaced')}",
        f"{'seconds':22}{seconds['without']:.2f} without, {seconds['with']:.2f} with: {values['overhead_percent']:+.1f} %",
    ]
    if values["verdict"]:
        before, after = (values["verdict"][name] for name in ("without", "with"))
        lines.append(f"{'classifiers see':22}{before['object']} in {before['style']} style -> ")
        lines[-1] += f"{after['object']} in {after['style']} style"
    full = sum(step.without_free for step in steps)
    if full:
        fate = (
            f"{report.unchanged} left unchanged (no bank)"
            if report.unchanged
            else "took the bank's embeddings"
        )
        lines.append(f"{'no undetected patch':22}in {full} of {rows * len(steps)} feature maps: {fate}")
    if report.not_finite:
        lines.append(f"{'not looked at':22}{report.not_finite} patches that are NaN or infinite")
    blind = dict.fromkeys(name for step in steps for name in step.blind)
    for name in blind:
        count = sum(name in step.blind for step in steps)
        lines.append(f"{'not looked for':22}{name} at {count} of {len(steps)} steps: no latent")
    lines.append(f"{'picture':22}{values['out']}")
    return lines


def _range(steps, name: str) -> str:
    shares = [getattr(step, name) for step in steps]
    return f" ({min(shares):.1%} to {max(shares):.1%} by step)" if shares else ""
