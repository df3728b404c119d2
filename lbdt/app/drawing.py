"""One picture by a pipeline: what `lbdt erase` and `lbdt app` both call, so that they make the same bits."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lbdt.app.settings import PictureSettings

StepEnd = Callable[[int, float, "Tensor | None", float], None]
"""Told of a step that is over: its number from 0, its timestep, the latents after it (None: the pipeline does not hand
them out), and the seconds so far. What it raises ends the picture."""


def draw(
    pipe: Any,
    settings: PictureSettings,
    *,
    steps: int | None = None,
    negative: str | None = None,
    on_step: StepEnd | None = None,
) -> tuple[Image.Image, float]:
    """The picture of resolved settings, by the pipeline as it is, and the seconds that it took: without those that
    `on_step` took, which changes no bit of it.

    Args:
        steps: another number of them than the settings'.
        negative: a negative prompt.
        on_step: called after every step, if the pipeline tells of its steps.
    """
    call = settings.call() | ({} if steps is None else {"num_inference_steps": steps})
    if negative is not None:
        call["negative_prompt"] = negative
    watch = _StepClock(pipe, on_step)
    if on_step is not None and "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        call["callback_on_step_end"] = watch
    try:
        generator = torch.Generator().manual_seed(settings.seed)
        watch.begin()
        picture = pipe(settings.prompt, generator=generator, **call).images[0]
        return picture, watch.seconds()
    except BaseException:
        # The end of every diffusers call, for models that are moved out of the device's memory.
        getattr(pipe, "maybe_free_model_hooks", lambda: None)()
        raise


def synchronize(pipe: Any) -> None:
    """Waits until the pipeline's device has done what it was given."""
    device = getattr(pipe, "_execution_device", None) or getattr(pipe, "device", torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _StepClock:
    """The callback of a pipeline's steps, and the clock that stands still in it."""

    def __init__(self, pipe: Any, on_step: StepEnd | None) -> None:
        self._pipe, self._on_step = pipe, on_step
        self._start = self._spent = 0.0

    def begin(self) -> None:
        synchronize(self._pipe)
        self._start = time.perf_counter()

    def seconds(self) -> float:
        synchronize(self._pipe)
        return time.perf_counter() - self._start - self._spent

    def __call__(self, pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        seconds = self.seconds()
        before = time.perf_counter()
        self._on_step(step, float(timestep), kept.get("latents"), seconds)
        synchronize(self._pipe)
        self._spent += time.perf_counter() - before
        return {}
