"""What an attachment makes sure of when a call of its pipeline begins and ends: that the pictures were treated."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lbdt import call_rows
from lbdt.activations.capture import is_compiled
from lbdt.hooks import lookup, pipeline_calls
from lbdt.hooks.call_state import CallState
from lbdt.hooks.detection_plan import DetectionPlan, check_lengths
from lbdt.hooks.recorder import Recorder, Row

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

    from lbdt.hooks.pipeline_calls import PipelineCall

ON_FAILURE = ("refuse", "generate")
_OTHER_TIMES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
_LOCK = threading.RLock()
_STATES: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[CallState]] = weakref.WeakKeyDictionary()
_TURNS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class UnprotectedError(RuntimeError):
    """Raised in place of pictures that an attached editor did not treat as asked; says why, and what to do."""


class CallWatch:
    """The checks of one attachment to a denoiser."""

    def __init__(
        self,
        name: str,
        root: str,
        denoiser: nn.Module,
        hooks: Sequence[tuple[nn.Module, ModelHook]],
        plan: DetectionPlan,
        state: CallState,
        recorder: Recorder,
        compiled: bool,
        on_failure: str,
    ) -> None:
        """`name`: of the hooks in their registries; `root`: the component that the denoiser is, e.g. "unet";
        `compiled`: whether any of it is compiled, so that calls have to take turns."""
        self.plan, self.state, self.recorder = plan, state, recorder
        self.on_failure, self.enabled = on_failure, True
        self.failures: list[str] = []
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None
        """What was recorded when the pipeline's last call began, and when it had made its pictures; None: it made none,
        or there was no call."""
        self._name, self._root, self._denoiser = name, root, denoiser
        self._modules = [module for module, _ in hooks]
        state.shared = compiled
        state.failed = self.failed if on_failure == "generate" else None

    def on(self) -> Callable[[], None]:
        """Counts the attachment among those of its denoiser; returns the undo."""
        with _LOCK:
            states = _STATES.setdefault(self._denoiser, weakref.WeakSet())
            _TURNS.setdefault(self._denoiser, threading.RLock())
            states.add(self.state)

        def undo() -> None:
            with _LOCK:
                states.discard(self.state)

        return undo

    def turn(self) -> Any:
        """The lock of the denoiser, where code of it is compiled: then its calls take turns, whichever pipeline's."""
        self.state.shared = is_compiled(getattr(self.state.pipe, self._root, None))
        states = self._siblings()
        if not any(state.shared for state in states):
            return None
        for state in states:
            state.shared = True
        return _TURNS[self._denoiser]

    def begin(self, call: PipelineCall) -> None:
        """Refuses a call in which the hooks would not run, or could not know rows or timesteps."""
        self.last = None
        self._check_modules(call.pipe)
        self.plan.check_encoder(bits=True)  # for compiled denoisers, too
        _check_scheduler(getattr(call.pipe, "scheduler", None), self.plan.options.steps is not None)
        if call.size is not None:
            if call.size.frames > 1:
                raise ValueError(
                    f"pipe: a call of {type(call.pipe).__name__} makes {call.size.frames} frames, which are rows of "
                    "its blocks; erasing from videos is not supported"
                )
            check_lengths(self.plan, call.size.images, call.size.prompts)
        self.state.forget()
        call.seen[self] = self.recorder.written.clone(), self.state.begun, len(self.failures)
        self._announce(call)

    def leave(self, outer: PipelineCall | None) -> None:
        """A call is over, and `outer` goes on."""
        self.state.forget()
        self._announce(outer)

    def judge(self, call: PipelineCall) -> None:
        """Raises UnprotectedError, or warns, where pictures were not treated as asked. Waits for the device."""
        if self not in call.seen:
            return
        self.last = call.seen[self][0], self.recorder.written.clone()
        if self.enabled:
            for text in self._found(call, *call.seen[self]):
                self.failed(text)

    def failed(self, text: str) -> None:
        """Says that pictures were not treated, and why, by `on_failure`."""
        if self.on_failure == "refuse":
            raise UnprotectedError(
                f"{text}; no picture is returned. attach(..., on_failure='generate') would return it, with a warning"
            )
        self.failures.append(text)
        warnings.warn(f"lbdt: {text}", RuntimeWarning, stacklevel=2)

    def _siblings(self) -> list[CallState]:
        with _LOCK:
            return list(_STATES.get(self._denoiser, ()))

    def _announce(self, call: PipelineCall | None) -> None:
        if self.state.shared:
            for state in self._siblings():
                state.announce(call)

    def _check_modules(self, pipe: Any) -> None:
        from lbdt.hooks import registry

        present = getattr(pipe, self._root, None)
        if not isinstance(present, nn.Module) or lookup.unwrap(present) is not self._denoiser:
            raise UnprotectedError(
                f"{self._root}: the pipeline's was exchanged since the editor was attached to it, so nothing would be "
                "erased; attach again (lbdt.detach(pipe) takes the old attachment off)"
            )
        for module in self._modules:
            if registry.is_live(module, self._name) is False:
                raise UnprotectedError(
                    f"{type(module).__name__}.forward: was overwritten since the editor was attached, so its hook "
                    "would not run and nothing would be erased; attach again after whatever overwrote it"
                )

    def _found(self, call: PipelineCall, before: torch.Tensor, begun: int, failures: int) -> list[str]:
        calls = self.recorder.since(before)
        rows = [row for rows in calls for row in rows]
        # A user may break a call off and take what there is; and what a failure has said already needs no second
        # reason.
        cut_short = bool(getattr(call.pipe, "_interrupt", False)) or len(self.failures) > failures
        found = [] if cut_short else self._not_run(call, len(calls), self.state.begun - begun)
        broken = [row for row in rows if row.not_finite]
        if broken:
            images = ", ".join(map(str, sorted({row.image for row in broken})))
            found.append(
                f"{sum(row.not_finite for row in broken)} patches of the hooked activation were NaN or infinite, "
                f"where no concept can be detected: images {images} are not protected. Half precision that "
                "overflows does this; run the denoiser in bfloat16 or float32"
            )
        known = self.plan.timesteps.tolist()
        far = sorted({row.timestep for row in rows if _is_far(row.timestep, known)})
        if far:
            found.append(
                f"timesteps {', '.join(f'{t:g}' for t in far[:8])} of this call are far from the dictionary's, "
                f"{min(known):g} to {max(known):g}: no image is protected there; use a scheduler with such "
                "timesteps, or score a dictionary with this one"
            )
        return found if cut_short or not rows else found + self._window(rows, call) + self._early(rows, call)

    def _not_run(self, call: PipelineCall, recorded: int, begun: int) -> list[str]:
        """Where the denoiser is compiled, its calls are not counted: then the pipeline's own number of steps counts."""
        steps = getattr(call.pipe, "_num_timesteps", None)
        expected = begun or max(1, steps if isinstance(steps, int) and self.state.shared else 1)
        if recorded >= expected:
            return []
        return [
            f"hookpoint: its block did not run in {expected - recorded} of {expected} denoiser calls of this call of "
            f"{type(call.pipe).__name__}, so nothing was looked at there; something skips the block (a cache such as "
            "DeepCache, skipped layers), or replaced it"
        ]

    def _window(self, rows: list[Row], call: PipelineCall) -> list[str]:
        window = self.plan.options.steps
        steps = _steps(rows, call) if window is not None else []
        if window is None or any(window[0] <= step < window[1] for step in steps):
            return []
        return [
            f"steps={window}: this call ran the steps {min(steps)} to {max(steps)} of its schedule, so nothing was "
            "treated; attach with a window among them"
        ]

    def _early(self, rows: list[Row], call: PipelineCall) -> list[str]:
        """Whether the calls that are treated end while the gate still relies on those to come."""
        gate, window = self.plan.gate, self.plan.options.steps
        if gate is None or not bool((gate.least[: gate.early] > 1).any() & self.plan.enabled.any()):
            return []
        treated = [row.timestep for row in rows]
        if window is not None:
            steps = zip(treated, _steps(rows, call), strict=True)
            treated = [timestep for timestep, step in steps if window[0] <= step < window[1]]
        bins = self.plan.bins(torch.tensor(treated, device=self.plan.timesteps.device))
        if not treated or int(bins.max()) >= gate.early:
            return []
        return [
            f"timesteps {min(treated):g} to {max(treated):g}: this call is treated in the first {gate.early} of the "
            f"dictionary's {len(self.plan.timesteps)} timesteps only, where the gate leaves pictures to the calls to "
            "come, so a concept may be left; run more steps, attach an eraser with min_patches=1 (eraser.min_patches = "
            "1, lbdt erase --min-patches 1), or score a dictionary at the timesteps of such calls"
        ]


def _steps(rows: list[Row], call: PipelineCall) -> list[int]:
    """The step of the schedule that each row is of."""
    timesteps = torch.tensor([row.timestep for row in rows])
    return call_rows.nearest(timesteps, call.pipe.scheduler.timesteps.float().cpu()).tolist()


def _check_scheduler(scheduler: Any, windowed: bool) -> None:
    config, name = getattr(scheduler, "config", None), type(scheduler).__name__
    if windowed and getattr(scheduler, "order", 1) > 1:
        raise ValueError(
            f"steps: {name} calls the denoiser twice at a timestep, so a window of steps cannot be told from the "
            "timesteps; use a scheduler of order 1, or attach without steps"
        )
    if not isinstance(config, Mapping):
        return
    continuous = (
        config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    )
    if name in _OTHER_TIMES or continuous:
        what = "timestep_type='continuous'" if continuous else "noise levels"
        raise ValueError(
            f"scheduler: {name} calls the denoiser with {what}, which are not the timesteps 0 to 999 that a dictionary "
            "has bins for, so every step would be given a wrong bin; use a scheduler with discrete timesteps"
        )


def _is_far(timestep: float, known: list[float]) -> bool:
    """Whether a timestep lies outside of the bins by more than their widest gap (or, of few bins, a tenth of 1,000)."""
    ordered = sorted(known)
    gap = max([b - a for a, b in zip(ordered, ordered[1:], strict=False)], default=0.0)
    room = max(gap, 100.0 if max(ordered) > 1 else 0.1)
    return not math.isfinite(timestep) or timestep < ordered[0] - room or timestep > ordered[-1] + room


def refuse_others(pipe: Any, block: nn.Module) -> None:
    """ValueError where something is attached to this block of the pipeline."""
    # Imported here, so that looking at an editor's concepts does not load diffusers.
    from lbdt.hooks import registry

    others = [w for w in pipeline_calls.watchers(pipe) if registry.is_registered(block, w.name)]
    if others:
        raise ValueError(
            f"an editor is attached to this block of the pipeline already ({', '.join(w.name for w in others)}); "
            "lbdt.detach(pipe) takes it off, lbdt.attached(pipe) lists it, attach(..., stack=True) puts this one "
            "beside it"
        )


def runs(pipe: Any) -> bool:
    """Whether this thread is within a call of the pipeline."""
    call = pipeline_calls.running()
    return call is not None and call.pipe is pipe
