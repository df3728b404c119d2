"""A picture without and with the eraser, step by step as both emerge."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbdt.activations.capture import quiet
from lbdt.app.drawing import draw
from lbdt.app.previews import previews_of
from lbdt.app.streaming import Waiting, check_wanted, stream, turns_of
from lbdt.evaluation.pictures import found

if TYPE_CHECKING:
    from PIL import Image

    from lbdt.app.settings import PictureSettings
    from lbdt.editors import ConceptEraser, Report, Steering
    from lbdt.editors.attachment import Attachment

WITHOUT, WITH = "without", "with"
_OPACITY = 0.6
_WARM: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class PatchMask:
    """What was found in one step of a picture, on the feature map; the conditional (or only) half of guidance."""

    detected: Tensor
    """bool [H, W]: patches with a concept, before padding."""
    replaced: Tensor
    """bool [H, W]: patches overwritten (steered), after padding."""

    def counts(self) -> tuple[int, int]:
        """How many patches were detected, and replaced."""
        return int(self.detected.sum()), int(self.replaced.sum())


@dataclass(frozen=True)
class EmergingStep:
    """A step of one of the two pictures is over."""

    half: str
    """"without" | "with"."""
    step: int
    """Its number, from 0."""
    steps: int
    """How many there will be."""
    timestep: float
    seconds: float
    """What this picture took so far, without what showing it takes."""
    preview: Image.Image | None
    """RGB; None where none was wanted in this step, or where the pipeline's latents cannot be shown."""
    mask: PatchMask | None
    """None in the picture without, and where the block did not run."""


@dataclass(frozen=True)
class ErasedPicture:
    """Both pictures are done."""

    without: Image.Image
    erased: Image.Image
    report: Report
    seconds_without: float
    seconds_with: float
    settings: PictureSettings
    """Resolved: `lbdt erase --settings` makes the same pictures of them."""


def emerge(
    pipe: Any,
    editor: ConceptEraser | Steering,
    settings: PictureSettings,
    *,
    cancelled: Callable[[], bool],
    preview_every: int = 1,
) -> Iterator[Waiting | EmergingStep | ErasedPicture]:
    """The events of a picture: `Waiting` while others have the pipeline, an `EmergingStep` after each step of the
    picture without and then of that with the editor, and an `ErasedPicture`.

    Both come from the same seed, one after the other: in one batch they would take as long, and their last bits would
    depend on it. The pictures are those of `lbdt erase`, bit for bit. Pictures of one pipeline wait for each other, so
    that visitors never mix. Where it is cancelled, which shows after the step that is on, or where the iterator is
    closed, it ends without an `ErasedPicture`, and the pipeline is what it was.

    Args:
        pipe: a diffusers pipeline as `ConceptEraser.attach` takes it.
        editor: what `load_editor(settings)` gives; it is left as it is.
        settings: resolved or not.
        cancelled: whether the picture is no longer wanted; asked in another thread, after every step.
        preview_every: a preview after every so many steps, and after the last one; 0: none.

    Raises:
        TypeError, ValueError: at once, as `PictureSettings.resolved`; from the iterator, as `ConceptEraser.attach` and
            the pipeline.
    """
    if isinstance(preview_every, bool) or not isinstance(preview_every, int) or preview_every < 0:
        raise ValueError(f"preview_every: expected a whole number >= 0, got {preview_every!r}")
    settings = settings.resolved(editor, pipe)
    applied = settings.applied(editor)

    def work(emit: Callable[[Any], None], stop: Callable[[], bool]) -> None:
        with turns_of(pipe).turn(stop, emit):
            undo = quiet(pipe)
            try:
                emit(_both(pipe, applied, settings, emit, stop, preview_every))
            finally:
                undo()

    return stream(work, cancelled)


def warm(pipe: Any, settings: PictureSettings) -> None:
    """Pays, once a pipeline, for the allocations and kernel choices that its first call makes. Call it in the
    pipeline's turn."""
    if pipe not in _WARM:
        draw(pipe, settings, steps=1)
        _WARM.add(pipe)


def overlay(picture: Image.Image, mask: PatchMask | None) -> Image.Image:
    """The picture with the mask laid over it, which it shows through: red where a concept was detected, amber where
    padding was replaced besides. The picture's own size; without a mask, a copy."""
    ground = picture.convert("RGB")
    return ground if mask is None else found(ground, mask.detected, mask.replaced, _OPACITY)


def _both(
    pipe: Any,
    editor: ConceptEraser | Steering,
    settings: PictureSettings,
    emit: Callable[[EmergingStep], None],
    stop: Callable[[], bool],
    every: int,
) -> ErasedPicture:
    def attach(**how: Any) -> Attachment:
        return editor.attach(pipe, list(settings.concepts), seed=settings.seed, **how)

    attach().remove()  # what is refused is refused before the first picture
    check_wanted(stop)
    previews = previews_of(pipe) if every else None
    warm(pipe, settings)

    def shower(half: str, masks: Callable[[], PatchMask | None]) -> Callable[..., None]:
        def on_step(step: int, timestep: float, latents: Tensor | None, seconds: float) -> None:
            check_wanted(stop)
            steps = int(getattr(pipe, "num_timesteps", None) or settings.steps)
            wanted = previews is not None and (step % every == 0 or step == steps - 1)
            preview = previews.of(latents) if wanted else None
            emit(EmergingStep(half, step, steps, timestep, seconds, preview, masks()))

        return on_step

    before, seconds_without = draw(pipe, settings, on_step=shower(WITHOUT, lambda: None))
    with attach(keep_masks=True) as attached:
        after, seconds_with = draw(pipe, settings, on_step=shower(WITH, _FreshMasks(attached)))
        report = attached.report()
    return ErasedPicture(before, after, report, seconds_without, seconds_with, settings)


class _FreshMasks:
    """The masks of an attachment that came since they were last asked for, as one."""

    def __init__(self, attached: Attachment) -> None:
        self._attached, self._seen = attached, 0

    def __call__(self) -> PatchMask | None:
        masks = self._attached.masks()
        fresh, self._seen = masks[self._seen :], len(masks)
        if not fresh:
            return None
        # A scheduler of order 2 calls the denoiser twice a step.
        detected, replaced = (
            torch.stack([getattr(mask, name)[0] for mask in fresh]).any(0).cpu()
            for name in ("detected", "replaced")
        )
        return PatchMask(detected, replaced)
