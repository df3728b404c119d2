"""The diffusers hooks: on the timestep embedding, on the hooked block, and where needed on two more blocks.

Only pre_forward and post_forward, as removing a hook with its own forward breaks others (METHOD.md, 9).
No host sync and no count of calls: everything follows from the timestep that the UNet was called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import ModelHook
from torch import Tensor, nn

from lbdt.hooks import feature_maps
from lbdt.hooks.detection_plan import CallState, DetectionPlan, EditPlan, ErasePlan
from lbdt.hooks.recorder import Recorder


class _Hook(ModelHook):
    def __init__(self, plan: DetectionPlan, state: CallState) -> None:
        super().__init__()
        self.plan, self.state = plan, state

    def __repr__(self) -> str:
        return f"lbdt.{type(self).__name__}"

    def _feature_map(self, output: Any) -> Tensor:
        if self.state.timesteps is None:
            raise RuntimeError("hookpoint: its block ran outside of a UNet call, so no timestep is known")
        x = feature_maps.to_patches(feature_maps.tensor_of(output), self.plan.options.width)
        if x.shape[0] != self.state.timesteps.shape[0]:
            raise ValueError(
                f"hookpoint: its block ran on {x.shape[0]} rows, but the UNet on {self.state.timesteps.shape[0]}; "
                "hook a block that keeps one row per image"
            )
        if self.plan.weight.device != x.device or self.plan.weight.dtype != x.dtype:
            self.plan.to(x.device, x.dtype)
        return x


class TimestepHook(_Hook):
    """The hook on `unet.time_proj`: keeps the timestep of every row, and refuses lists that do not fit the batch."""

    def __init__(self, plan: DetectionPlan, state: CallState, embeds_classes: bool) -> None:
        super().__init__(plan, state)
        self.embeds_classes = embeds_classes

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        # A UNet with timestep-like class labels embeds those by the same module, after the timesteps.
        if self.state.timesteps is None or not self.embeds_classes:
            timesteps = args[0] if args else next(iter(kwargs.values()))
            self.plan.check_call(self.state, timesteps.shape[0])
            self.state.timesteps = timesteps
            self.state.rows = self.state.mask = self.state.avoid = self.state.sums = self.state.gated = None
        return args, kwargs


class GridHook(_Hook):
    """The hook on the attention block around a hookpoint: keeps the grid of its input [B, d, H, W]."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        x = args[0] if args else kwargs["hidden_states"]
        self.state.grid = (x.shape[2], x.shape[3]) if x.dim() == 4 else None
        return args, kwargs


class _InputHook(_Hook):
    """Keeps the block's input from pre_forward to post_forward where the update is asked for."""

    def __init__(self, plan: DetectionPlan, state: CallState, needs_input: bool) -> None:
        super().__init__(plan, state)
        self.needs_input = needs_input
        self.input: Tensor | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if self.needs_input:
            self.input = args[0] if args else kwargs["hidden_states"]
        return args, kwargs

    def _taken_input(self, x: Tensor) -> Tensor | None:
        given, self.input = self.input, None
        if given is None:
            return None
        given = feature_maps.to_patches(given, self.plan.options.width)
        if given.shape != x.shape:
            raise ValueError(
                f"hookpoint: its block has input {tuple(given.shape)} and output {tuple(x.shape)}, so it has no "
                "update; hook a block that keeps the shape"
            )
        return given


class DetectHook(_InputHook):
    """The hook on the block of `detect_at`: leaves the mask for the target block."""

    def __init__(self, plan: DetectionPlan, state: CallState) -> None:
        super().__init__(plan, state, needs_input=plan.options.on_update)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        x = self._feature_map(output)
        given = self._taken_input(x)
        self.plan.add_up(x, given, self.state)
        self.state.mask = self.plan.detect(x, given, self.state)
        return output


class _TargetHook(_InputHook):
    """A hook on the block whose output changes, which is the last that runs in a UNet call."""

    def __init__(self, plan: DetectionPlan, state: CallState, recorder: Recorder, needs_input: bool) -> None:
        super().__init__(plan, state, needs_input)
        self.recorder = recorder

    def _finish(self, mask: Tensor, changed: Tensor, height: int, width: int) -> None:
        """Records the call, and drops its state: nothing of it may be kept alive, nor met by the next one."""
        if self.recorder.rows.device != mask.device:
            self.recorder.to(mask.device)
        rows = self.plan.rows(self.state)
        state = self.state
        self.recorder.add(rows.timesteps, mask, changed, state.sums, height, width, rows.halves, state.gated)
        state.timesteps = state.rows = state.mask = state.avoid = state.sums = state.gated = state.grid = None


class EraseHook(_TargetHook):
    """The eraser's hook on the target block: detects (unless another block did), replaces, records."""

    def __init__(self, plan: ErasePlan, state: CallState, recorder: Recorder, detects: bool) -> None:
        on_update = plan.target == "update"
        needs_input = on_update or (detects and plan.options.on_update)
        super().__init__(plan, state, recorder, needs_input)
        self.detects, self.on_update = detects, on_update

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        raw = feature_maps.tensor_of(output)
        x = self._feature_map(output)
        given = self._taken_input(x)
        height, width = feature_maps.grid_of(x, self.state.grid)
        mask = self.state.mask
        if self.detects:
            minus = given if self.plan.options.on_update else None
            self.plan.add_up(x, minus, self.state)
            mask = self.plan.detect(x, minus, self.state)
        elif mask is None:
            raise RuntimeError("detect_at: its block did not run before the hookpoint's in this UNet call")
        elif mask.shape[1] != height * width:
            raise ValueError(
                f"detect_at: its block has {mask.shape[1]} patches, the hookpoint's {height * width}; name a block "
                "on the same grid"
            )
        if self.on_update:
            update, replaced = self.plan.replace(x - given, mask, height, width, self.state)
            # Patches outside the mask keep their bits: input + (output - input) would round.
            where = replaced.view(x.shape[0], 1, *x.shape[2:])
            out = (given + update).where(where, x)
        else:
            out, replaced = self.plan.replace(x, mask, height, width, self.state)
        self._finish(mask, replaced, height, width)
        return feature_maps.with_tensor(output, feature_maps.from_patches(out, raw))


class SteerHook(_TargetHook):
    """The hook on the steered block: edits its output by `plan.edit`, records."""

    def __init__(self, plan: EditPlan, state: CallState, recorder: Recorder) -> None:
        super().__init__(plan, state, recorder, needs_input=plan.options.on_update)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        raw = feature_maps.tensor_of(output)
        x = self._feature_map(output)
        height, width = feature_maps.grid_of(x, self.state.grid)
        given = self._taken_input(x)
        self.plan.add_up(x, given, self.state)
        out, detected, changed = self.plan.edit(x, given, self.state)
        self._finish(detected, changed, height, width)
        return feature_maps.with_tensor(output, feature_maps.from_patches(out, raw))


class TextHook(ModelHook):
    """The hook on a text encoder's layer: gives its output [B, N, d] to `edit`, which returns the new one."""

    def __init__(self, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.edit = edit

    def __repr__(self) -> str:
        return "lbdt.TextHook"

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return feature_maps.with_tensor(output, self.edit(feature_maps.tensor_of(output)))
