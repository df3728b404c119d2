"""What a visitor asks for, as the page's controls say it, checked before anything is made."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from lbdt.activations.pipelines import cut_off
from lbdt.app.settings import PictureSettings
from lbdt.runs.wording import require_unicode

if TYPE_CHECKING:
    from lbdt.app.world import World
    from lbdt.editors import ConceptEraser


class AskedError(ValueError):
    """What is wrong with what was asked for, in words for the visitor."""


class Asked(NamedTuple):
    """The values of the controls; anything at all, as a visitor need not use the page to send them."""

    prompt: Any
    concepts: Any
    kind: Any
    seed: Any
    steps: Any
    guidance: Any
    """Number; 0 and None: none."""
    padding: Any
    source: Any
    avoid: Any
    min_patches: Any
    """Number; 0 and None: as the eraser was calibrated."""


def asked_of(asked: Asked, world: World) -> tuple[PictureSettings, ConceptEraser]:
    """The resolved settings, and the eraser that they are of.

    Raises:
        AskedError: more than the page's limits, or not what `PictureSettings` takes.
    """
    limits = world.limits
    if asked.kind not in world.kinds:
        raise AskedError(f"Eraser: expected one of {', '.join(world.kinds)}.")
    editor = world.editor(asked.kind)
    if not isinstance(asked.prompt, str) or not asked.prompt.strip():
        raise AskedError("Prompt: say what the picture is to show.")
    if len(asked.prompt) > limits.prompt:
        raise AskedError(f"Prompt: at most {limits.prompt} characters, got {len(asked.prompt)}.")
    if not isinstance(asked.concepts, list) or not 1 <= len(asked.concepts) <= limits.concepts:
        raise AskedError(f"Concepts: choose from 1 to {limits.concepts}.")
    unknown = [name for name in asked.concepts if name not in editor.concepts]
    if unknown:
        raise AskedError(f"Concepts: this eraser does not know {str(unknown[0])[:40]!r}.")
    steps = _whole("Denoising steps", asked.steps, 1, limits.steps)
    try:
        require_unicode("Prompt", asked.prompt)
        if cut := cut_off(world.pipe, asked.prompt):
            raise AskedError(
                f"Prompt: {cut[0]} tokens, and the model reads {cut[1]}; the rest would be left out."
            )
        settings = PictureSettings(
            prompt=asked.prompt,
            concepts=tuple(asked.concepts),
            model=world.model,
            eraser=world.eraser,
            kind=asked.kind,
            padding=_whole("Padding", asked.padding, 0, limits.padding),
            source=asked.source,
            avoid=asked.avoid,
            min_patches=_whole("Gate", asked.min_patches or 0, 0, 2**30) or None,
            steps=steps,
            guidance=_guidance(asked.guidance or 0, world.pipe),
            seed=_whole("Seed", asked.seed, 0, 2**53),
        )
        return settings.resolved(editor, world.pipe), editor
    except (TypeError, ValueError) as error:
        raise AskedError(str(error)) from error


def fields_of(settings: PictureSettings, world: World) -> Asked:
    """The controls' values for settings.

    Raises:
        AskedError: of another model, eraser or method than the page's, or of more steps than it makes; `asked_of` says
            what else is beyond its limits. ValueError: as `PictureSettings.resolved`.
    """
    if (settings.model, settings.eraser) != (world.model, world.eraser) or settings.kind not in world.kinds:
        raise AskedError("they are of another model or eraser than this page's")
    if settings.method != "per":
        raise AskedError("they are of a steering, which is on the tab Compare")
    found = settings.resolved(world.editor(settings.kind), world.pipe if settings.guidance is None else None)
    if found.steps > world.limits.steps:
        raise AskedError(f"{found.steps} steps, and this page makes at most {world.limits.steps}")
    return Asked(
        found.prompt,
        list(found.concepts),
        found.kind,
        found.seed,
        found.steps,
        found.guidance or 0,
        found.padding,
        found.source,
        found.avoid,
        found.min_patches or 0,
    )


def strengths_of(text: Any, most: int) -> list[float]:
    """The numbers of a text such as "-1, -5".

    Raises:
        AskedError: no numbers, or more than `most`.
    """
    given = text.strip() if isinstance(text, str) else "no text"
    try:
        found = [float(part) for part in given.split(",")] if given else []
    except ValueError:
        found = [float("nan")]
    if len(found) > most or not all(abs(value) <= 1000 for value in found):
        raise AskedError(f"Strengths: expected at most {most} numbers from -1000 to 1000, such as -1, -5.")
    return found


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # In this order: neither NaN nor infinity lies between, and neither has an int.
    if not number or not low <= value <= high or value != int(value):
        raise AskedError(f"{name}: expected a whole number from {low} to {high}.")
    return int(value)


def _guidance(value: Any, pipe: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 50:
        raise AskedError("Guidance scale: expected a number from 0 to 50.")
    if "guidance_scale" in inspect.signature(type(pipe).__call__).parameters:
        return float(value)
    if value:
        raise AskedError("Guidance scale: the model takes none; leave it at 0.")
    return None
