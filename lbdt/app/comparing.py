"""One prompt and seed by every method, beside each other: pictures, seconds, and how far the block's activations are
from the unedited model's."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbdt import canvas
from lbdt.activations.capture import quiet
from lbdt.app.drawing import draw
from lbdt.app.erasing import warm
from lbdt.app.examples import Progress
from lbdt.app.streaming import Waiting, check_wanted, stream, turns_of
from lbdt.evaluation.block_watch import BlockWatch
from lbdt.evaluation.metrics.activation_shift import BaseActivations, fit
from lbdt.evaluation.values import NO_GUIDANCE
from lbdt.runs.limits import LARGEST
from lbdt.runs.reading import brief

if TYPE_CHECKING:
    from PIL import Image

    from lbdt.activations.prompts import Prompt
    from lbdt.app.settings import PictureSettings
    from lbdt.editors import ConceptEraser, Steering

METHODS = ("without", "per", "steering", "negative")
PATCHES = 64
"""The most patches of a map and timestep that are looked at: all of EmojiCanvas's, a quarter of SD 1.5's."""
MOST_STRENGTHS = 16
_BATCH = 4
_BASE_SEED = 920_000
_BASES: weakref.WeakKeyDictionary[Any, dict[tuple, BaseActivations]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class ComparedPicture:
    """A cell of the grid."""

    method: str
    """One of `METHODS`."""
    strength: float | None
    """A steering's."""
    picture: Image.Image | None
    """None where the method does not apply, which `note` says."""
    seconds: float | None
    outside: float | None
    """The percentage of the values of the block's output, as the later layers see it, beyond the base's 0.1 and 99.9
    percentiles of their dimension (METHOD.md, 8.5), mean over the timesteps; the base itself has about 0.2."""
    outside_by_step: tuple[tuple[float, float], ...] = ()
    """(timestep, per cent), in the order of the schedule."""
    note: str | None = None


def compare(
    pipe: Any,
    eraser: ConceptEraser,
    steering: Steering | None,
    settings: PictureSettings,
    strengths: Sequence[float],
    *,
    cancelled: Callable[[], bool],
    negative: str | None = None,
    base: Sequence[Prompt] = (),
) -> Iterator[Waiting | Progress | ComparedPicture]:
    """The events of a comparison: a `ComparedPicture` without anything, one by PER, one for each strength of the
    steering, and one by a negative prompt. All start from the settings' seed, each alone, and PER's is the picture of
    `emerge`. Before them come `Progress` of the base's pictures, which are made once a pipeline and sampling, and
    `Waiting` as in `emerge`. Cancelled, it ends early.

    Args:
        pipe: a diffusers pipeline as `ConceptEraser.attach` takes it.
        eraser: what `load_editor(settings)` gives.
        steering: the baseline, e.g. `canvas.load_steering(kind)`; None: without it, and then no strengths.
        settings: of method "per", resolved or not.
        strengths: of the steering, each for all concepts.
        negative: the negative prompt; None: the concepts' names.
        base: prompts whose unedited pictures say what activations are usual, best of all concepts; none: the picture
            without, in which then 0.2 per cent are outside whatever it is. `base_prompts()` is for EmojiCanvas.

    Raises:
        TypeError, ValueError: at once, as `PictureSettings.resolved`, and for strengths that are no finite numbers, too
            many, or without a steering.
    """
    settings = settings.resolved(eraser, pipe)
    chosen = [_strength(value) for value in strengths]
    if len(chosen) > MOST_STRENGTHS:
        raise ValueError(f"strengths: expected at most {MOST_STRENGTHS}, got {len(chosen)}")
    if chosen and steering is None:
        raise ValueError("strengths: expected none without a steering; give one, or no strengths")
    if steering is not None and steering.KIND != "steering":
        raise TypeError(f"steering: expected a Steering, got {type(steering).__name__}")
    run = _Comparison(pipe, settings.applied(eraser), steering, settings, chosen, negative, tuple(base))

    def work(emit: Callable[[Any], None], stop: Callable[[], bool]) -> None:
        with turns_of(pipe).turn(stop, emit):
            undo = quiet(pipe)
            try:
                for event in run.events(stop):
                    emit(event)
            finally:
                undo()

    return stream(work, cancelled)


def base_prompts() -> list[Prompt]:
    """A picture of every object of EmojiCanvas, in its styles by turns."""
    from lbdt.canvas.defaults import labelled
    from lbdt.canvas.generate import PictureRequest

    count = len(canvas.STYLES)
    return [
        labelled(PictureRequest((place,), place % count, _BASE_SEED + place))
        for place in range(len(canvas.OBJECTS))
    ]


@dataclass(frozen=True)
class _Comparison:
    """A comparison whose arguments are checked."""

    pipe: Any
    eraser: ConceptEraser
    steering: Steering | None
    settings: PictureSettings
    strengths: list[float]
    negative: str | None
    base: tuple[Prompt, ...]

    def events(self, stop: Callable[[], bool]) -> Iterator[Progress | ComparedPicture]:
        """What is to be told, in the pipeline's turn."""
        names, seed = list(self.settings.concepts), self.settings.seed
        editors = [("per", None, self.eraser)]
        for strength in self.strengths:
            steered = type(self.steering)(
                self.steering.sae,
                self.steering.dictionary,
                **(self.steering.settings | {"strength": strength}),
            )
            editors.append(("steering", strength, steered))
        for _, _, editor in editors:
            editor.attach(self.pipe, names, seed=seed).remove()
        check_wanted(stop)
        warm(self.pipe, self.settings)
        reference = yield from self._reference(stop)
        first, rows = self._made("without", None, contextlib.nullcontext(), stop, reference)
        yield first
        reference = reference or fit(rows)
        for method, strength, editor in editors:
            made, _ = self._made(
                method, strength, editor.attach(self.pipe, names, seed=seed), stop, reference
            )
            yield made
        if self.settings.guidance is None or self.settings.guidance <= 1:
            yield ComparedPicture("negative", None, None, None, None, note=NO_GUIDANCE)
            return
        text = self.negative if self.negative is not None else _named(names)
        made, _ = self._made("negative", None, contextlib.nullcontext(), stop, reference, negative=text)
        yield replace(made, note=text)

    def _made(
        self,
        method: str,
        strength: float | None,
        attached: contextlib.AbstractContextManager,
        stop: Callable[[], bool],
        reference: BaseActivations | None,
        negative: str | None = None,
    ) -> tuple[ComparedPicture, Tensor]:
        """A cell, by the rows' own percentiles without a `reference`, and its rows."""
        watch = self._watch([self.settings.seed])
        with attached, watch:
            picture, seconds = draw(
                self.pipe, self.settings, negative=negative, on_step=lambda *_: check_wanted(stop)
            )
        rows, times = watch.rows(), watch.timesteps
        reference = fit(rows) if reference is None else reference
        by_step = rows.view(len(times), -1, rows.shape[1])
        shares = [reference.outside(each) for each in by_step]
        found = tuple(zip(map(float, times), shares, strict=True))
        return ComparedPicture(
            method, strength, picture, seconds, math.fsum(shares) / len(shares), found
        ), rows

    def _reference(self, stop: Callable[[], bool]) -> Iterator[Progress]:
        """The base's activations, made by unedited pictures where they are not kept; None without any of its own."""
        if not self.base:
            return None
        call = self.settings.call()
        key = (self.eraser.hookpoint, tuple(sorted(call.items())), self.base)
        kept = _BASES.setdefault(self.pipe, {})
        if key not in kept:
            rows = []
            for first in range(0, len(self.base), _BATCH):
                part = self.base[first : first + _BATCH]
                seeds = [prompt.seed for prompt in part]
                with self._watch(seeds) as watch:
                    self.pipe(
                        [prompt.text for prompt in part],
                        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                        output_type="latent",
                        **call,
                    )
                rows.append(watch.rows())
                yield Progress(first + len(part), len(self.base))
                check_wanted(stop)
            kept.clear()  # one sampling's at a time: they are large
            kept[key] = fit(torch.cat(rows))
        return kept[key]

    def _watch(self, seeds: Sequence[int]) -> BlockWatch:
        return BlockWatch(self.pipe, self.eraser.hookpoint, seeds, patches=PATCHES)


def _named(concepts: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in concepts)


def _strength(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"strengths: expected numbers, got {brief(value)}")
    if not (math.isfinite(value) and abs(value) <= LARGEST):
        raise ValueError(f"strengths: expected finite numbers up to {LARGEST:g}, got {brief(value)}")
    return float(value)
