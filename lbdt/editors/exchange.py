"""Other concepts and seeds for an attachment that stays on."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lbdt.editors.attachment import concept_sets, seed_values, warn_of_blind
from lbdt.runs.reading import brief

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook
    from torch import nn

    from lbdt.dictionary import Selection
    from lbdt.editors.attachment import Attachment
    from lbdt.editors.edit_report import Blind
    from lbdt.editors.unet_editor import UnetEditor
    from lbdt.hooks.call_state import CallState
    from lbdt.hooks.detection_plan import DetectionPlan
    from lbdt.hooks.recorder import Recorder
    from lbdt.hooks.registry import Parked


@dataclass
class CompiledStand:
    """What an attachment to a compiled denoiser stands on. It outlives the attachment: the next one of the same editor
    with the same options puts it back with other concepts, so that nothing is compiled again."""

    plan: DetectionPlan
    state: CallState
    recorder: Recorder
    hooks: list[tuple[nn.Module, ModelHook]]
    made_of: tuple
    """What the encoder's rows came from, kept so that the same address stays the same thing."""
    parked: list[Parked] = field(default_factory=list)
    handle: weakref.ref[Attachment] | None = None

    @property
    def is_free(self) -> bool:
        """Whether all of it was taken off and can be put back."""
        return len(self.parked) == len(self.hooks)

    def left(self) -> None:
        """Holds no pipeline between attachments."""
        if self.is_free:
            self.state.pipe = None

    def reuse(self, pipe: Any) -> None:
        """Makes it ready for another attachment, to `pipe`."""
        before = None if self.handle is None else self.handle()
        if before is not None:
            before.keep_calls()
        self.recorder.clear()
        self.state.adopt(pipe)


class Stands(OrderedDict):
    """The stands on a denoiser, by editor and options, the last ones used. They are kept on the denoiser itself, so
    that they go with it; copies of it have none."""

    _MOST = 8

    @classmethod
    def on(cls, denoiser: nn.Module) -> Stands:
        """Those of a denoiser."""
        return vars(denoiser).setdefault("_lbdt_stands", cls())

    def found(self, key: tuple) -> CompiledStand | None:
        """The stand of a key, if it is free and its encoder is as it was."""
        stand = self.get(key)
        usable = stand is not None and stand.is_free and not stand.plan.was_written(bits=True)
        return stand if usable else None

    def keep(self, key: tuple, stand: CompiledStand) -> None:
        """Keeps a stand, in place of the oldest one if they are many."""
        self[key] = stand
        self.move_to_end(key)
        while len(self) > self._MOST:
            self.popitem(last=False)

    def __deepcopy__(self, memo: dict) -> Stands:
        return Stands()

    def __reduce__(self) -> tuple:
        return Stands, ()


MOST_ROOM = 1 << 16
_LEAST = 16


class Exchange:
    """What `Attachment.set` calls."""

    def __init__(
        self,
        editor: UnetEditor,
        plan: DetectionPlan,
        state: CallState,
        blind: Blind,
        sets: list[list[str]],
        seeds: list[int],
        selections: Mapping[str, Selection] | None,
    ) -> None:
        self._editor, self._plan, self._state, self._blind = editor, plan, state, blind
        self._sets, self._seeds, self._enabled = sets, seeds, True
        self._selections = dict(selections or {})

    def __call__(self, concepts: Any, seed: Any, enabled: Any) -> bool:
        """Returns whether pictures are treated from now on."""
        plan = self._plan
        plan.check_encoder()
        sets = (
            self._sets
            if concepts is None
            else _as_many("concepts", *concept_sets(concepts), self._sets, plan)
        )
        seeds = self._seeds if seed is None else _as_many("seed", *seed_values(seed), self._seeds, plan)
        on = self._enabled if enabled is None else enabled
        if not isinstance(on, bool):
            raise TypeError(f"enabled: expected True or False, got {brief(on)}")
        for name in {name for names in sets for name in names} - set(self._selections):
            self._selections[name] = self._editor.select(name)
        with torch.inference_mode(False), torch.no_grad():
            other, owners = self._editor._exchanged(plan, sets, seeds, self._selections)
            blind = warn_of_blind(other, owners)
            if not on:
                other.enabled.zero_()
            if plan.captured and not plan.fits(other):
                raise ValueError(
                    f"set: these concepts need {other.latents.shape[0]} latent columns, and a captured CUDA graph "
                    f"reads the {plan.latents.shape[0]} of this attachment; attach with "
                    f"room={other.latents.shape[0] + 1} and capture again"
                )
            plan.take(other)
            self._state.remember(plan.gate, plan.weight.device)
        self._sets, self._seeds, self._enabled = sets, seeds, on
        self._blind.concepts = blind.concepts
        return on


def room_of(room: Any, needed: int, compiled: bool) -> int:
    """The number of latent columns of an attachment that needs so many."""
    if room is None:
        # More than needed, so that the gate has room for any number of concepts too.
        return max(_LEAST, 1 << needed.bit_length()) if compiled else needed
    if isinstance(room, bool) or not isinstance(room, int):
        raise TypeError(f"room: expected None or an integer, got {brief(room)}")
    if not needed <= room <= MOST_ROOM:
        raise ValueError(
            f"room: expected {needed} latent columns or more for these concepts, up to {MOST_ROOM}; got {room}"
        )
    return room


def _as_many(name: str, values: Sequence, is_list: bool, before: Sequence, plan: DetectionPlan) -> Any:
    """`values`; ValueError unless they are as many as were attached, since the tensors keep their shapes."""
    was_list = plan.options.set_list if name == "concepts" else plan.options.seed_list
    if is_list != was_list or len(values) != len(before):
        kinds = {True: "a list with one entry per prompt or image", False: "one for all"}
        raise ValueError(
            f"{name}: attached as {kinds[was_list]}, {len(before)} in all, got {kinds[is_list]}, {len(values)} in "
            "all; give as many, or attach again"
        )
    return list(values)
