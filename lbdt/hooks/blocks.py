"""The diffusers hooks: on the timestep embedding, on the hooked block, and where needed on two more blocks.

Only pre_forward and post_forward, as removing a hook with its own forward breaks others (METHOD.md, 9).
No host sync and no count of calls: everything follows from the timestep that the UNet was called with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from lbdt.hooks import feature_maps
from lbdt.hooks.call_state import CallState, Now
from lbdt.hooks.detection_plan import DetectionPlan, EditPlan
from lbdt.hooks.erase_plan import ErasePlan
from lbdt.hooks.recorder import Recorder


class _Hook(ModelHook):
    def __init__(self, plan: DetectionPlan, state: CallState) -> None:
        super().__init__()
        self.plan, self.state = plan, state
        self.place = 0

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.place = feature_maps.place_of(module)
        return module

    def __repr__(self) -> str:
        return f"lbdt.{type(self).__name__}"

    def _feature_map(self, output: Any, now: Now) -> Tensor:
        if now.timesteps is None:
            raise RuntimeError("hookpoint: its block ran outside of a UNet call, so no timestep is known")
        x = feature_maps.to_patches(feature_maps.tensor_of(output, self.place), self.plan.options.width)
        if x.shape[0] != now.timesteps.shape[0]:
            raise ValueError(
                f"hookpoint: its block ran on {x.shape[0]} rows, but the UNet on {now.timesteps.shape[0]}; "
                "hook a block that keeps one row per image"
            )
        if self.plan.weight.device != x.device or self.plan.weight.dtype != x.dtype:
            self.plan.follow(x.device, x.dtype)
        if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            self.plan.captured = True
        return x

    def _within_memory(self, now: Now, function: Callable[[], Any]) -> Any:
        """What `function` returns; None where there is no memory for it, and the call goes on without being treated."""
        if self.state.failed is None:
            return function()
        try:
            return function()
        except torch.OutOfMemoryError as error:
            # The blocks to come have to see that this call has begun, and is given up.
            timesteps, labels = now.timesteps, now.labels
            now.clear()
            now.timesteps, now.labels, now.acting = timesteps, labels, False
            self.state.failed(f"out of memory in the hook ({error}): no image of this UNet call was treated")
            return None

    def _input(self, given: Tensor | None, x: Tensor) -> Tensor | None:
        if given is None:
            return None
        given = feature_maps.to_patches(given, self.plan.options.width)
        if given.shape != x.shape:
            raise ValueError(
                f"hookpoint: its block has input {tuple(given.shape)} and output {tuple(x.shape)}, so it has no "
                "update; hook a block that keeps the shape"
            )
        return given


class TimestepHook(_Hook):
    """The hook on what embeds the timesteps: keeps the timestep of every row, and refuses lists that do not fit the
    batch."""

    def __init__(self, plan: DetectionPlan, state: CallState, denoiser: nn.Module) -> None:
        super().__init__(plan, state)
        self.denoiser = denoiser
        self.embeds_classes = getattr(denoiser.config, "class_embed_type", None) == "timestep"

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        now = self.state.now()
        # A UNet with timestep-like class labels embeds those by the same module, after the timesteps. A third call is
        # the next one's timesteps: the one before was broken off.
        if self.embeds_classes and now.timesteps is not None and not now.labels:
            now.labels = True
            return args, kwargs
        timesteps = args[0] if args else next(iter(kwargs.values()))
        now = self.state.begin(timesteps)
        if now.acting:
            windowed = self.plan.options.steps is not None and not torch.compiler.is_compiling()
            self.plan.check_call(now, self.state.steps() if windowed else None)
            if torch.is_grad_enabled() and getattr(self.denoiser, "is_gradient_checkpointing", False):
                raise ValueError(
                    "gradient checkpointing: blocks run again in the backward pass, where no timestep is known; call "
                    f"{type(self.denoiser).__name__}.disable_gradient_checkpointing(), or run without gradients"
                )
        return args, kwargs


class GridHook(_Hook):
    """The hook on the attention block around a hookpoint: keeps the grid of its input [B, d, H, W]."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        x = args[0] if args else kwargs["hidden_states"]
        self.state.now().grid = (x.shape[2], x.shape[3]) if x.dim() == 4 else None
        return args, kwargs


class PatchesHook(_Hook):
    """The hook on the module that cuts latents into patches: keeps the grid of these for all blocks of the call."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        x = args[0] if args else next(iter(kwargs.values()))
        self.state.now().cut = (x.shape[2] // module.patch_size, x.shape[3] // module.patch_size)
        return args, kwargs


class DetectHook(_Hook):
    """The hook on the block of `detect_at`: leaves the mask for the target block."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        now = self.state.now()
        if now.acting and self.plan.options.on_update:
            now.looked_input = args[0] if args else kwargs["hidden_states"]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        now = self.state.now()
        if not self.state.treats(now):
            return output
        x = self._feature_map(output, now)
        given = self._input(now.looked_input, x)
        now.looked_input = None
        self.plan.add_up(x, given, now)
        now.mask = self._within_memory(now, partial(self.plan.detect, x, given, now))
        return output


class _TargetHook(_Hook):
    """A hook on the block whose output changes, which is the last that runs in a UNet call."""

    def __init__(self, plan: DetectionPlan, state: CallState, recorder: Recorder, needs_input: bool) -> None:
        super().__init__(plan, state)
        self.recorder, self.needs_input = recorder, needs_input

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        now = self.state.now()
        if now.acting and self.needs_input:
            now.target_input = args[0] if args else kwargs["hidden_states"]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        now = self.state.now()
        if not self.state.treats(now):
            return output
        raw = feature_maps.tensor_of(output, self.place)
        x = self._feature_map(output, now)
        given = self._input(now.target_input, x)
        around = None if x.dim() == 4 else now.grid or self.state.cut_grid()
        height, width = feature_maps.grid_of(x, around)
        if self.recorder.rows.device != x.device:
            self.recorder.to(x.device)
        out = self._within_memory(now, partial(self._treated, x, given, height, width, now))
        if out is None:
            return output
        # Nothing of the call may be kept alive, nor met by the next one.
        now.clear()
        if out is x:
            return output
        return feature_maps.with_tensor(output, feature_maps.from_patches(out, raw), self.place)

    def _treated(self, x: Tensor, given: Tensor | None, height: int, width: int, now: Now) -> Tensor:
        """The new `x`, of which is recorded what was done; `x` itself where that is known to be nothing."""
        out, mask, changed = self._edited(x, given, height, width, now)
        rows = self.plan.rows(now)
        self.recorder.add(rows.timesteps, mask, changed, now.sums, height, width, rows.halves, now.gated)
        return out

    def _edited(
        self, x: Tensor, given: Tensor | None, height: int, width: int, now: Now
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new `x`, the detected patches and the changed ones, both bool [B, N]."""
        raise NotImplementedError


class EraseHook(_TargetHook):
    """The eraser's hook on the target block: detects (unless another block did), replaces, records."""

    def __init__(self, plan: ErasePlan, state: CallState, recorder: Recorder, detects: bool) -> None:
        on_update = plan.target == "update"
        needs_input = on_update or (detects and plan.options.on_update)
        super().__init__(plan, state, recorder, needs_input)
        self.detects, self.on_update = detects, on_update

    def _treated(self, x: Tensor, given: Tensor | None, height: int, width: int, now: Now) -> Tensor:
        if x.shape[0] == 0:
            return x
        if not (self.detects and self.plan.serves(x)):
            return super()._treated(x, given, height, width, now)
        minus = given if self.plan.options.on_update else None
        out = self.plan.step(x, minus, height, width, now, self.recorder)
        return x if out is None else out

    def _edited(
        self, x: Tensor, given: Tensor | None, height: int, width: int, now: Now
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = now.mask
        if self.detects:
            minus = given if self.plan.options.on_update else None
            self.plan.add_up(x, minus, now)
            mask = self.plan.detect(x, minus, now)
        elif mask is None:
            raise RuntimeError("detect_at: its block did not run before the hookpoint's in this UNet call")
        elif mask.shape[1] != height * width:
            raise ValueError(
                f"detect_at: its block has {mask.shape[1]} patches, the hookpoint's {height * width}; name a block "
                "on the same grid"
            )
        if not self.on_update:
            out, replaced = self.plan.replace(x, mask, height, width, now)
            return out, mask, replaced
        update, replaced = self.plan.replace(x - given, mask, height, width, now)
        # Patches outside the mask keep their bits: input + (output - input) would round.
        where = replaced.view(x.shape[0], 1, *x.shape[2:])
        return (given + update).where(where, x), mask, replaced


class SteerHook(_TargetHook):
    """The hook on the steered block: edits its output by `plan.edit`, records."""

    def __init__(self, plan: EditPlan, state: CallState, recorder: Recorder) -> None:
        super().__init__(plan, state, recorder, needs_input=plan.options.on_update)

    def _edited(
        self, x: Tensor, given: Tensor | None, height: int, width: int, now: Now
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.plan.add_up(x, given, now)
        return self.plan.edit(x, given, now)


class TextHook(ModelHook):
    """The hook on a text encoder's layer: gives its output [B, N, d] to `edit`, which returns the new one."""

    def __init__(self, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.edit = edit

    def __repr__(self) -> str:
        return "lbdt.TextHook"

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return feature_maps.with_tensor(output, self.edit(feature_maps.tensor_of(output)))
