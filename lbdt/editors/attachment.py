"""The handle on a pipeline that `attach` returns, what it looks at, and the checks of `attach`'s arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdt.editors.edit_report import Blind, PictureReport, Report, StepMask, picture_reports, step_masks
from lbdt.hooks import lookup
from lbdt.hooks.call_state import CallState
from lbdt.hooks.detection_plan import DetectionPlan
from lbdt.hooks.recorder import Call, Recorder
from lbdt.runs.reading import brief

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

    from lbdt.dictionary import Selection
    from lbdt.editors.call_watch import CallWatch
    from lbdt.editors.exchange import CompiledStand
    from lbdt.hooks.lookup import Denoiser
    from lbdt.hooks.pipeline_calls import PipelineCall

EXAMPLE = "unet.mid_block.attentions.0"
BRANCHES = ("uncond", "cond", "image", "perturbed")
"""The guidance branches that `layout` may name."""


class LatentColumns(NamedTuple):
    """The U latents that an attachment looks at. Every concept keeps columns of its own: two may share a latent at
    different thresholds."""

    owners: list[str]
    """The concept of each column."""
    latents: Tensor
    """[U] int64, the SAE's own ids."""
    thresholds: Tensor
    """[T, U] float32, on activations; +inf where not selected in a bin."""
    enabled: Tensor
    """[S, U] bool, one row a concept set."""
    selections: Mapping[str, Selection]
    """Where the columns come from, by concept."""

    @classmethod
    def of(cls, sets: list[list[str]], selections: Mapping[str, Selection], bins: int) -> LatentColumns:
        """The columns of the `selections`, by name; a row for each set of their names.

        Raises:
            ValueError: thresholds of another number of bins than `bins`.
        """
        for name, selection in selections.items():
            if selection.thresholds.shape[0] != bins:
                raise ValueError(
                    f"selections: {name!r} has thresholds for {selection.thresholds.shape[0]} timesteps, and the "
                    f"dictionary {bins}; give what this editor's select returned"
                )
        chosen = selections.values()
        owners = [name for name, s in selections.items() for _ in range(len(s.latents))]
        enabled = torch.tensor([[name in names for name in owners] for names in sets], dtype=torch.bool)
        return cls(
            owners,
            torch.cat([torch.zeros(0, dtype=torch.int64), *(s.latents for s in chosen)]),
            torch.cat([torch.zeros(bins, 0), *(s.thresholds for s in chosen)], dim=1),
            enabled.view(len(sets), len(owners)),
            selections,
        )

    def padded(self, room: int) -> LatentColumns:
        """The columns, and behind them such as nothing passes: `room` in all, or as many as there are."""
        more = max(0, room - len(self.latents))
        return self._replace(
            latents=F.pad(self.latents, (0, more)),
            thresholds=F.pad(self.thresholds, (0, more), value=torch.inf),
            enabled=F.pad(self.enabled, (0, more)),
        )


class KeptCalls(NamedTuple):
    """What a recorder held."""

    calls: list[Call]
    masks: bool

    def read(self) -> list[Call]:
        """The calls, oldest first."""
        return self.calls


class Attachment:
    """Something attached to a pipeline. A context manager; `remove()` takes it off, and may be called again."""

    def __init__(
        self,
        name: str,
        pipe: Any,
        hooks: Iterable[tuple[nn.Module, ModelHook]],
        recorder: Recorder,
        summary: Callable[[list[Call]], Report],
        texts: tuple[Callable[[int | None, list[str]], None], Callable[[], None]] | None = None,
        calls: CallWatch | None = None,
        changed: Callable[..., bool] | None = None,
        stand: CompiledStand | None = None,
    ) -> None:
        """Registers `hooks` on their modules as `name`, or puts those of `stand` back, and watches the pipeline's
        calls, and with `texts` what it encodes. `calls`: the checks of a call; `changed`: what `set` does; `stand`
        gets back what `remove` takes off.

        Whatever was put on before an error comes off again.
        """
        from lbdt.hooks import pipeline_calls, registry

        self.pipe, self.name = pipe, name
        self._recorder, self._summary, self._calls, self._changed = recorder, summary, calls, changed
        self._stand = stand
        self._undo: list[Callable[[], None]] = []
        with pipeline_calls.between_calls(pipe):
            try:
                records = {} if stand is None else {id(record.module): record for record in stand.parked}
                if stand is not None:
                    stand.parked.clear()
                for module, hook in hooks:
                    record = records.get(id(module))
                    if record is None or not registry.restore(record):
                        registry.register(module, hook, name)
                    self._undo.append(lambda module=module: self._take_off(module))
                if texts is not None:
                    self._undo.append(pipeline_calls.watch_texts(pipe, *texts))
                if calls is not None:
                    self._undo.append(calls.on())
                self._undo.append(pipeline_calls.watch(pipe, self))
            except BaseException:
                self.remove()
                raise

    @property
    def is_on(self) -> bool:
        """Whether it was not removed yet."""
        return bool(self._undo)

    def remove(self) -> None:
        """Takes every hook off; the pipeline computes bit for bit what it did before. Waits while another thread is
        within a call of the pipeline."""
        from lbdt.hooks import pipeline_calls

        with pipeline_calls.between_calls(self.pipe):
            while self._undo:
                self._undo.pop()()

    def _take_off(self, module: nn.Module) -> None:
        from lbdt.hooks import registry

        record = registry.unregister(module, self.name)
        if self._stand is not None and record is not None:
            self._stand.parked.append(record)
            self._stand.left()

    def keep_calls(self) -> None:
        """Keeps what was recorded, before another attachment writes to the same tensors."""
        self._recorder = KeptCalls(self._recorder.read(), self._recorder.masks)

    def set(
        self,
        concepts: Sequence[str] | Sequence[Sequence[str]] | None = None,
        seed: int | Sequence[int] | None = None,
        enabled: bool | None = None,
    ) -> None:
        """Exchanges what is erased while the attachment stays on; None: as it is.

        The tensors that the hooks read are written in place, without a host sync: compiled code and captured CUDA
        graphs go on with the new values. Concepts that need more latents than there is room for (`attach(room=)`),
        and those of a steering that need another number, get new tensors: code is compiled for them once more, and a
        captured graph refuses them. Waits while another thread is within a call of the pipeline.

        Args:
            concepts, seed: as in `attach`; lists of as many entries as those that were attached.
            enabled: False lets every picture pass as it is, with nothing detected in it; True treats them again.

        Raises:
            ValueError, TypeError: as `attach`; lists of another length than attached; removed already; an attachment
                of a text encoder.
        """
        if self._changed is None:
            raise ValueError(
                "set: a steering of a text encoder has nothing to exchange; remove it and attach again"
            )
        if not self.is_on:
            raise ValueError("set: this attachment was removed; attach again")
        from lbdt.hooks import pipeline_calls

        with pipeline_calls.between_calls(self.pipe):
            on = self._changed(concepts, seed, enabled)
            if self._calls is not None:
                self._calls.enabled = on

    def begin_run(self) -> None:
        """Says that the next denoiser call begins other pictures, for a denoising loop of one's own: what the gate has
        counted of those before is forgotten (METHOD.md, 2.6). Calls of the pipeline do so, and timesteps that rise."""
        if self._calls is not None:
            self._calls.state.begin_run()

    def turn(self) -> Any:
        """See `CallWatch.turn`."""
        return None if self._calls is None else self._calls.turn()

    def begin(self, call: PipelineCall) -> None:
        """A call of the pipeline begins; see `CallWatch.begin`."""
        if self._calls is not None:
            self._calls.begin(call)

    def leave(self, outer: PipelineCall | None) -> None:
        """A call of the pipeline is over; see `CallWatch.leave`."""
        if self._calls is not None:
            self._calls.leave(outer)

    def judge(self, call: PipelineCall) -> None:
        """A call of the pipeline has made its pictures; see `CallWatch.judge`."""
        if self._calls is not None:
            self._calls.judge(call)

    def report(self) -> Report:
        """What happened under this attachment. Waits for the device."""
        return self._summary(self._recorder.read())

    def pictures(self) -> tuple[PictureReport, ...]:
        """What happened to each picture of the pipeline's last call, in their order. Waits for the device.

        Raises:
            ValueError: no call, or one that ended by an error; another attachment has taken this one's place.
        """
        if self._calls is None or self._calls.last is None or isinstance(self._recorder, KeptCalls):
            raise ValueError(
                "pictures: no call of the pipeline under this attachment is kept; call it before"
            )
        return picture_reports(self._recorder.since(*self._calls.last))

    def patches_changed(self) -> Tensor:
        """int64 [images]: the patches of each image that were overwritten in all kept calls, in all branches of
        guidance. An image of which there are none keeps every bit. Waits for the device.

        Raises:
            ValueError: no call, or calls of different numbers of images.
        """
        calls = self._recorder.read()
        images = sorted({call.rows // call.halves for call in calls})
        if len(images) != 1:
            raise ValueError(
                "patches_changed: expected calls of one number of images, got "
                f"{', '.join(map(str, images)) or 'no call'}; attach anew for every pipeline call"
            )
        return sum(torch.tensor(call.changed).view(call.halves, images[0]).sum(0) for call in calls)

    def masks(self) -> list[StepMask]:
        """The masks of every UNet call, oldest first; needs `attach(..., keep_masks=True)`.

        Raises:
            ValueError: they were not kept.
        """
        if not self._recorder.masks:
            raise ValueError("masks: not kept; attach with keep_masks=True")
        return step_masks(self._recorder.read())

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def attached(pipe: Any) -> tuple[Attachment, ...]:
    """The handles of everything that is attached to a pipeline, oldest first."""
    from lbdt.hooks import pipeline_calls

    return tuple(w for w in pipeline_calls.watchers(pipe) if isinstance(w, Attachment))


def detach(pipe: Any) -> int:
    """Takes off everything that is attached to a pipeline, newest first; returns how many there were. What other
    pipelines with the same UNet have attached stays on."""
    handles = attached(pipe)
    for handle in reversed(handles):
        handle.remove()
    return len(handles)


def around_call(
    denoiser: Denoiser, hookpoint: str, plan: DetectionPlan, state: CallState
) -> list[tuple[nn.Module, ModelHook]]:
    """The hooks that tell a plan of a denoiser call's timesteps and of the grid."""
    from lbdt.hooks import blocks

    hooks = [(denoiser.times, blocks.TimestepHook(plan, state, denoiser.module))]
    around = lookup.grid_parent(denoiser.module, hookpoint)
    if around is not None:
        hooks.append((around, blocks.GridHook(plan, state)))
    if denoiser.patches is not None:
        hooks.append((denoiser.patches, blocks.PatchesHook(plan, state)))
    return hooks


def warn_of_blind(plan: DetectionPlan, owners: Sequence[str]) -> Blind:
    """Where the concepts that own the plan's columns have no latent that could pass its threshold; warns of that.

    Raises ValueError for a concept that has none at any timestep.
    """
    deaf = torch.isposinf(plan.thresholds.cpu()[:, : len(owners)])
    blind = {}
    for name in dict.fromkeys(owners):
        own = torch.tensor([owner == name for owner in owners])
        blind[name] = deaf[:, own].all(1)
        if bool(blind[name].all()):
            raise ValueError(
                f"concepts: no latent of {name!r} can be detected at any timestep (all thresholds are infinite), so it "
                "would never be looked for; lower the percentile, raise false_positive, or score again"
            )
    found = Blind(plan.timesteps.cpu(), blind)
    if found.concepts:
        warnings.warn(
            f"lbdt: no latent can be detected, and so the concept is not looked for: {found} (timesteps); lower the "
            "percentile, raise false_positive, or score at more timesteps",
            RuntimeWarning,
            stacklevel=3,
        )
    return found


def check_hookpoint(name: str, value: Any, example: str = EXAMPLE) -> None:
    """TypeError unless it is a name."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a name such as {example!r}, got {brief(value)}")


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """`value`; ValueError unless it is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {brief(value)}")
    return value


def concept_sets(concepts: Any) -> tuple[list[list[str]], bool]:
    """The sets, and whether there is one per prompt or image."""
    example = "concepts=['Cats'] for all images, or [['Cats'], []], one list per prompt"
    if isinstance(concepts, str) or not isinstance(concepts, Sequence):
        raise TypeError(f"concepts: expected a list of names, got {concepts!r}; write {example}")
    if not concepts:
        raise ValueError(f"concepts: expected one name or more, got an empty list; write {example}")
    if all(isinstance(name, str) for name in concepts):
        return [list(concepts)], False
    for names in concepts:
        if (
            isinstance(names, str)
            or not isinstance(names, Sequence)
            or not all(isinstance(n, str) for n in names)
        ):
            raise TypeError(
                f"concepts: expected names or lists of names, got {names!r} among them; write {example}"
            )
    return [list(names) for names in concepts], True


def row_layout(layout: Any) -> tuple[str, ...] | None:
    """The branches that a user states."""
    if layout is None:
        return None
    names = tuple(layout) if isinstance(layout, Sequence) and not isinstance(layout, str) else (None,)
    if not names or not set(names) <= set(BRANCHES) or len(set(names)) < len(names) or "cond" not in names:
        raise ValueError(
            f"layout: expected the guidance branches in the order of the rows, each once, of {', '.join(BRANCHES)}, "
            f"with 'cond' among them, e.g. ('uncond', 'cond'); got {layout!r}"
        )
    return names


def seed_values(seed: Any) -> tuple[list[int], bool]:
    """The seeds, and whether there is one per prompt or image."""
    values = [seed] if isinstance(seed, int) else seed
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise TypeError(f"seed: expected an integer, or one per prompt or image, got {seed!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"seed: expected integers, got {value!r}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed: expected a 64-bit integer, got {value}")
    return list(values), values is seed


def window(steps: Any) -> tuple[int, int] | None:
    """(first, last) of the schedule, or None for all."""
    if steps is None:
        return None
    pair = tuple(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else ()
    if len(pair) != 2 or any(isinstance(i, bool) or not isinstance(i, int) for i in pair):
        raise TypeError(f"steps: expected (first, last), two integers, got {steps!r}")
    if not 0 <= pair[0] < pair[1]:
        raise ValueError(f"steps: expected 0 <= first < last, got {pair}")
    return pair
