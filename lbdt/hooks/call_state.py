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
from lbdt.hooks.row_layouts import CallSize
from lbdt.hooks.run_memory import RunMemory

if TYPE_CHECKING:
    from lbdt.hooks.detection_plan import CallRows, Gate

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

    @property
    def cond(self) -> int:
        """The place of the branch that the gate counts for all; -1: each counts for itself."""
        return -1 if self.names is None or len(self.names) == 1 else _place(self.names, "cond")

    @property
    def of_the_prompt(self) -> tuple[int, ...]:
        """The places of the branches that read the prompt, where there are others that can be told from them."""
        if self.cond < 0:
            return ()
        return tuple(place for place, name in enumerate(self.names) if name in OF_THE_PROMPT)


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
    looked: Tensor | None = None
    """[B, d, N], what a pre-encoder made of it, while it is needed."""
    gated: Tensor | None = None
    """[B], patches that the gate took."""
    memory: RunMemory | None = None
    """What a gate over the calls of a run has counted; None where there is none."""
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
        self.memory = self.looked = self.looked_input = self.target_input = None
        self.labels = False


def _place(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.now = Now()
        self.memory: RunMemory | None = None


class Announced(NamedTuple):
    """What is known of the call that a denoiser call belongs to."""

    acting: bool = True
    """Whether the attachment treats it."""
    name: str = ""
    """The class of the pipeline; empty: no call was announced."""
    size: CallSize | None = None
    branches: Callable[[int], tuple[str, ...] | None] | None = None
    """The guidance branches by their number."""
    grid: tuple[int, int] | None = None
    """The grid of the patches, where the pipeline hands these to its denoiser ready cut."""

    def rows(self, batch: int, layout: tuple[str, ...] | None) -> Branches:
        """How the rows of a denoiser call are laid out: as is known of the pipeline, or else as `layout` states.

        Raises ValueError where `layout` is needed and does not divide the rows.
        """
        if not self.name:
            why = "no pipeline with this attachment announced this UNet call"
        elif self.size is None:
            why = f"the row layout of {self.name} is not known to lbdt"
        else:
            prompts, images = self.size.prompts, self.size.images
            names = self.branches(batch // images) if batch % images == 0 else None
            if names is not None:
                return Branches(names, images, prompts)
            why = f"{batch} rows for {images} images are no layout of {self.name} that lbdt knows"
        if layout is None:
            return Branches(None, batch, None, why, announced=bool(self.name))
        count = len(layout)
        if batch % count:
            raise ValueError(
                f"layout: {', '.join(layout)} is {count} branches, which do not divide the {batch} rows of this UNet "
                "call; attach with the layout of its rows"
            )
        return Branches(layout, batch // count, None)


class CallState:
    """The denoiser calls of one attachment: those that run, one a thread, and which of them are its own.

    A call belongs to the pipeline that announced it. One that none announced (a denoising loop of one's own, a pipeline
    that shares the denoiser and has no attachment) is treated in the thread that attached, and left alone in others.
    """

    def __init__(self, pipe: Any, layout: tuple[str, ...] | None = None) -> None:
        self.pipe, self.layout = pipe, layout
        self.failed: Callable[[str], None] | None = None
        """What is told of a failure in a hook that may go on with its input; None: the failure is an error."""
        self.begun = 0
        """How many denoiser calls have begun to be treated, where that is not compiled."""
        self.shared = False
        """Whether code of the denoiser is compiled. That knows no threads: calls take turns, and all of them use what
        `announce` has said."""
        self._thread = threading.get_ident()
        self._threads = _PerThread()
        self._only = Now()
        self._announced = Announced()
        self._concepts, self._device = 0, torch.device("cpu")
        self._epoch = 0
        self._only_memory: RunMemory | None = None

    def remember(self, gate: Gate | None, device: torch.device) -> None:
        """Keeps from here on what a gate over the calls of a run counts; None, or one of single calls: nothing."""
        concepts = gate.least.shape[1] if gate is not None and gate.over_run else 0
        if self._concepts != concepts:
            self._concepts, self._device = concepts, device
            self._only_memory = RunMemory(concepts, device, whole_calls=False) if concepts else None
        self.begin_run()

    def begin_run(self) -> None:
        """The next denoiser call begins a run, in every thread and in every call of the pipeline that goes on."""
        self._epoch += 1
        if self._only_memory is not None:
            self._only_memory.begin()

    def _memory(self, shared: bool, call: PipelineCall | None, known_rows: bool) -> RunMemory:
        """What is kept of the run that the denoiser call belongs to; `shared`: it is compiled, and `call` not known."""
        if shared:
            memory, announced = self._only_memory, bool(self._announced.name)
            memory.whole_calls = announced
        else:
            memory, announced = self._own_memory(call), call is not None
        if announced and not known_rows:
            # It may call the denoiser several times a step, branch by branch: each counts for itself.
            memory.begin()
        return memory

    def _own_memory(self, call: PipelineCall | None) -> RunMemory:
        memory = self._threads.memory if call is None else call.kept.get(self)
        if memory is None or memory.concepts != self._concepts:
            memory = RunMemory(self._concepts, self._device, whole_calls=call is not None)
            if call is None:
                self._threads.memory = memory
            else:
                call.kept[self] = memory
        elif memory.epoch != self._epoch:
            memory.begin()
        memory.epoch = self._epoch
        return memory

    def adopt(self, pipe: Any) -> None:
        """Belongs to another attachment, to `pipe` and by this thread."""
        self.pipe, self._thread = pipe, threading.get_ident()

    def now(self) -> Now:
        """The call that runs in this thread."""
        return self._only if self._is_shared() else self._threads.now

    def _is_shared(self) -> bool:
        return self.shared or torch.compiler.is_compiling()

    def announce(self, call: PipelineCall | None) -> None:
        """Says which call compiled code will belong to; None: to none that was announced."""
        self._announced = Announced()
        if self._only_memory is not None:
            self._only_memory.begin()
        if call is not None:
            known = tuple(call.branches(count, running=False) for count in range(_MOST_BRANCHES + 1))
            self._announced = Announced(
                call.pipe is self.pipe, type(call.pipe).__name__, call.size, _Known(known), _packed_grid(call)
            )

    def begin(self, timesteps: Tensor) -> Now:
        """A denoiser call begins, at `timesteps` [B].

        Raises ValueError where a `layout` that is needed does not fit it.
        """
        shared, call = self._is_shared(), None
        now = self._only if shared else self._threads.now
        now.clear()
        now.pipe = self.pipe
        if shared:
            announced = self._announced
        else:
            call = pipeline_calls.running()
            if call is not None:
                announced = Announced(self._is_own(call), type(call.pipe).__name__, call.size, call.branches)
            else:
                announced = Announced(self._is_own(call))
            if call is None and not announced.acting:
                warnings.warn(
                    "lbdt: a denoiser with an attached editor was called from another thread than the one that "
                    "attached, and by no pipeline that the editor is attached to; such calls are left as they are. "
                    "Attach in that thread, or to that pipeline, if they are to be treated",
                    RuntimeWarning,
                    stacklevel=2,
                )
        now.acting = announced.acting
        if now.acting:
            now.branches = announced.rows(timesteps.shape[0], self.layout)
            if self._concepts:
                now.memory = self._memory(shared, call, now.branches.names is not None)
            if not torch.compiler.is_compiling():
                self.begun += 1
        now.timesteps = timesteps
        return now

    def treats(self, now: Now) -> bool:
        """Whether the call that a block runs in is treated. A block may get its hook while another pipeline is within
        the UNet: then nothing of this attachment has seen the call begin."""
        if now.timesteps is not None or self._is_shared():
            return now.acting
        return self._is_own(pipeline_calls.running())

    def _is_own(self, call: PipelineCall | None) -> bool:
        return call.pipe is self.pipe if call else threading.get_ident() == self._thread

    def forget(self) -> None:
        """Drops what a call that was broken off has left in this thread."""
        self._threads.now.clear()
        self._only.clear()

    def cut_grid(self) -> tuple[int, int] | None:
        """The grid of the patches that a transformer works on: as its latents were cut in this call, or where they
        come cut already (Flux packs 2 x 2 latents) by the size that the pipeline was asked for."""
        now = self.now()
        if now.cut is not None:
            return now.cut
        if self._is_shared():
            return self._announced.grid
        call = pipeline_calls.running()
        return None if call is None else _packed_grid(call)

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


class _Known(NamedTuple):
    """Branches by their number, for code that is compiled."""

    known: tuple[tuple[str, ...] | None, ...]

    def __call__(self, count: int) -> tuple[str, ...] | None:
        return self.known[count] if count < len(self.known) else None


def _packed_grid(call: PipelineCall) -> tuple[int, int] | None:
    scale = getattr(call.pipe, "vae_scale_factor", None)
    size = getattr(call.pipe, "default_sample_size", None)
    if getattr(call.pipe, "transformer", None) is None or scale is None or size is None:
        return None
    height, width = (call.arguments.get(name) or size * scale for name in ("height", "width"))
    return height // (2 * scale), width // (2 * scale)
