"""What the hooks of an attachment know of the UNet call that runs: whose it is, and which of its rows are whose."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lbdt.hooks import pipeline_calls
from lbdt.hooks.pipeline_calls import PipelineCall

if TYPE_CHECKING:
    from lbdt.hooks.detection_plan import CallRows

_MOST_BRANCHES = 4
OF_THE_PROMPT = ("cond", "perturbed")
"""The guidance branches in which the denoiser reads the prompt that a picture is of."""


class Branches(NamedTuple):
    """How the rows of a UNet call are laid out: branch by branch, in each image by image."""

    names: tuple[str, ...] | None
    """None: not known; then every row counts as an image of its own."""
    images: int
    prompts: int | None
    """None: not known."""
    why: str = ""
    """Where it is not known: why."""
    announced: bool = True
    """Whether a call of the attached pipeline is known to run."""

    @property
    def count(self) -> int:
        """How many branches there are, as far as is known."""
        return 1 if self.names is None else len(self.names)


@dataclass
class Now:
    """What a UNet call hands from its timestep embedding to the hooked blocks; nothing outlives the call."""

    acting: bool = True
    """Whether the attachment treats this call."""
    branches: Branches | None = None
    pipe: Any = None
    timesteps: Tensor | None = None
    """[B]."""
    labels: bool = False
    """Whether the class labels of this call were embedded, as timesteps are."""
    rows: CallRows | None = None
    mask: Tensor | None = None
    """[B, N], of detect_at."""
    avoid: Tensor | None = None
    """[B, N], patches that are no donors."""
    sums: Tensor | None = None
    """[B, N], of what is looked at."""
    gated: Tensor | None = None
    """[B], patches that the gate took."""
    grid: tuple[int, int] | None = None
    cut: tuple[int, int] | None = None
    """The grid that the latents were cut into; it is known before the call's timesteps are."""
    looked_input: Tensor | None = None
    """The input of the block that is looked at before the target."""
    target_input: Tensor | None = None

    @property
    def schedule(self) -> Tensor:
        """The timesteps of the pipeline's scheduler."""
        return self.pipe.scheduler.timesteps

    def clear(self) -> None:
        """Drops everything but whether this call is treated and its rows: nothing may be met by the next call."""
        self.timesteps = self.rows = self.mask = self.avoid = self.sums = self.gated = self.grid = None
        self.looked_input = self.target_input = None
        self.labels = False


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.now = Now()


class CallState:
    """Of one attachment: the UNet calls that run, one a thread, and which of them are its own.

    A call belongs to the pipeline that announced it. One that none announced (a denoising loop of one's own, a pipeline
    that shares the UNet and has no attachment) is treated in the thread that attached, and left alone in others.
    """

    def __init__(self, pipe: Any, layout: tuple[str, ...] | None = None) -> None:
        self.pipe, self.layout = pipe, layout
        self.failed: Callable[[str], None] | None = None
        """What is told of a failure in a hook that may go on with its input; None: the failure is an error."""
        self.overheard = False
        """Whether a call was left alone as nothing announced it, and another thread made it."""
        self._thread = threading.get_ident()
        self._threads = _PerThread()
        self.compiled = False
        """Whether code of the denoiser is compiled. That reads no thread's own values: calls take turns, and what follows is
        set at their beginning."""
        self._traced = Now()
        self._traced_acting = True
        self._traced_branches: tuple[tuple[str, ...] | None, ...] | None = None
        self._traced_size: tuple[int, int] | None = None
        self._traced_name = ""
        self._traced_grid: tuple[int, int] | None = None

    def adopt(self, pipe: Any) -> None:
        """Belongs to another attachment, to `pipe` and by this thread."""
        self.pipe, self.overheard, self._thread = pipe, False, threading.get_ident()

    def now(self) -> Now:
        """The call that runs in this thread."""
        return self._traced if self._is_shared() else self._threads.now

    def _is_shared(self) -> bool:
        return self.compiled or torch.compiler.is_compiling()

    def announce(self, call: PipelineCall | None) -> None:
        """Says which call compiled code will belong to; None: to none that was announced."""
        self._traced_acting = call is None or call.pipe is self.pipe
        self._traced_name = "" if call is None else type(call.pipe).__name__
        size = None if call is None else call.size
        self._traced_size = None if size is None else (size.prompts, size.images)
        self._traced_grid = None if call is None else _packed_grid(call)
        known = None if size is None else tuple(map(call.branches, range(_MOST_BRANCHES + 1)))
        self._traced_branches = known

    def begin(self, timesteps: Tensor) -> Now:
        """A UNet call begins, at `timesteps` [B].

        Raises ValueError where `layout` does not fit it.
        """
        now = self.now()
        now.clear()
        now.pipe = self.pipe
        batch = timesteps.shape[0]
        if self._is_shared():
            now.acting = self._traced_acting
            if now.acting:
                now.branches = self._stated(batch) or self._traced_rows(batch)
        else:
            call = pipeline_calls.running()
            now.acting = self._is_own(call)
            if call is None and not now.acting and not self.overheard:
                self.overheard = True
                warnings.warn(
                    "lbdt: a denoiser with an attached editor was called from another thread than the one that attached, "
                    "and by no pipeline that the editor is attached to; such calls are left as they are. Attach in that "
                    "thread, or to that pipeline, if they are to be treated",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if now.acting:
                now.branches = self._stated(batch) or self._announced(call, batch)
        now.timesteps = timesteps
        return now

    def treats(self, now: Now) -> bool:
        """Whether the call that a block runs in is treated. A block may get its hook while another pipeline is within the
        UNet: then nothing of this attachment has seen the call begin."""
        if now.timesteps is not None or self._is_shared():
            return now.acting
        return self._is_own(pipeline_calls.running())

    def _is_own(self, call: PipelineCall | None) -> bool:
        return call.pipe is self.pipe if call else threading.get_ident() == self._thread

    def forget(self) -> None:
        """Drops what a call that was broken off has left in this thread."""
        self._threads.now.clear()
        self._traced.clear()

    def cut_grid(self) -> tuple[int, int] | None:
        """The grid of the patches that a transformer works on: as its latents were cut in this call, or where they come cut
        already (Flux packs 2 x 2 latents) by the size that the pipeline was asked for."""
        now = self.now()
        if now.cut is not None:
            return now.cut
        call = None if self._is_shared() else pipeline_calls.running()
        if call is None:
            return self._traced_grid
        return _packed_grid(call)

    def steps(self) -> tuple[int, int] | None:
        """The steps [first, last) of the schedule that the running call goes through; None where it does not tell."""
        call = pipeline_calls.running()
        count = getattr(self.pipe, "_num_timesteps", None)
        if call is None or not isinstance(count, int):
            return None
        first = getattr(self.pipe.scheduler, "begin_index", None)
        if first is None:
            # Image to image begins late; where a call ends early, it says so.
            ends_early = call.arguments.get("denoising_end") is not None
            first = 0 if ends_early else self.pipe.scheduler.timesteps.shape[0] - count
        return first, first + count

    def _stated(self, batch: int) -> Branches | None:
        if self.layout is None:
            return None
        count = len(self.layout)
        if batch % count:
            raise ValueError(
                f"layout: {', '.join(self.layout)} is {count} branches, which do not divide the {batch} rows of this UNet "
                "call; attach with the layout of its rows"
            )
        call = None if self._is_shared() else pipeline_calls.running()
        prompts = call.size.prompts if call and call.size and call.size.images == batch // count else None
        return Branches(self.layout, batch // count, prompts)

    def _announced(self, call: PipelineCall | None, batch: int) -> Branches:
        if call is None:
            return _none_announced(batch)
        if call.size is None:
            return _unknown(type(call.pipe).__name__, batch)
        count, rest = batch // call.size.images, batch % call.size.images
        names = None if rest else call.branches(count)
        return _laid_out(names, type(call.pipe).__name__, batch, call.size.prompts, call.size.images)

    def _traced_rows(self, batch: int) -> Branches:
        if not self._traced_name:
            return _none_announced(batch)
        if self._traced_size is None:
            return _unknown(self._traced_name, batch)
        prompts, images = self._traced_size
        count, rest = batch // images, batch % images
        names = None if rest or count > _MOST_BRANCHES else self._traced_branches[count]
        return _laid_out(names, self._traced_name, batch, prompts, images)


def _none_announced(batch: int) -> Branches:
    return Branches(None, batch, None, "no pipeline with this attachment announced this UNet call", False)


def _unknown(name: str, batch: int) -> Branches:
    return Branches(None, batch, None, f"the row layout of {name} is not known to lbdt")


def _laid_out(names: tuple[str, ...] | None, name: str, batch: int, prompts: int, images: int) -> Branches:
    if names is None:
        return Branches(
            None, batch, None, f"{batch} rows for {images} images are no layout of {name} that lbdt knows"
        )
    return Branches(names, images, prompts)


def _packed_grid(call: PipelineCall) -> tuple[int, int] | None:
    if getattr(call.pipe, "transformer", None) is None:
        return None
    scale, size = (
        getattr(call.pipe, "vae_scale_factor", None),
        getattr(call.pipe, "default_sample_size", None),
    )
    if scale is None or size is None:
        return None
    height, width = (call.arguments.get(name) or size * scale for name in ("height", "width"))
    return height // (2 * scale), width // (2 * scale)
