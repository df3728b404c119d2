"""What an attachment computes in a UNet call: the rows' settings, detection; no diffusers here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lbdt import call_rows, ops
from lbdt.hooks.call_state import Branches, Now
from lbdt.hooks.pre_encoder import PreEncoder
from lbdt.int8_screen import Screen, useful

MOST_PADDING = 65_535
"""The largest padding in patches: no map that a recorder takes has a longer side."""
_CHUNK = 2048  # rows of a dictionary that are brought into its order at a time
SCREENED_BY = (*Screen._fields, "order")
"""The arguments of the ops that do not change what is detected, in their place."""
_WRITTEN = (
    "the SAE's encoder was written to since the editor was attached, whose latents and thresholds are those of before; "
    "remove the handle, and attach again"
)
ROWS = ("all", "cond")
TARGETS = ("output", "update")


@dataclass(frozen=True)
class DetectionOptions:
    """The validated settings that every attachment to a UNet has."""

    rows: str
    steps: tuple[int, int] | None
    """The steps [first, last) of the schedule that are treated; None: all."""
    k: int
    """How many latents pass the rank test; 0: there is none."""
    on_update: bool
    """Whether the SAE looks at the block's output minus its input."""
    width: int
    """The d of the SAE."""
    set_list: bool
    """Whether concepts were given as one set per prompt or image, not one for all."""
    seed_list: bool


class CallRows(NamedTuple):
    """The rows of a UNet call: images, branch by branch."""

    timesteps: Tensor
    """[B] float32."""
    bins: Tensor
    """[B] int64, bins of the dictionary."""
    half: Tensor
    """[B] int64: the guidance branch, in the order of the rows."""
    halves: int
    """How many guidance branches there are."""
    seeds: Tensor
    """[B] int64."""
    enabled: Tensor
    """[B, U] bool."""
    deciding: Tensor | None
    """[B] int64: the row whose patches the gate counts for each row; None without a gate, or for itself."""
    treated: Tensor | None
    """[B] bool: the rows of the prompt; None: not asked for, or all."""


class Gate(NamedTuple):
    """How many patches of a row must be detected for a concept (METHOD.md, 2.5)."""

    owners: Tensor
    """[U] int64: the place in `least` of each column's concept."""
    least: Tensor
    """[T, C] int64."""
    least_of: int
    """The patches of the maps that `least` counts on; 0: of whatever map."""
    over_run: bool = False
    """Whether `least` counts quarters of the mean over the calls of a run (METHOD.md, 2.6), not patches of one call."""
    early: int = 0
    """The first bins, in which it relies on calls to come: what it leaves there is erased later."""

    def padded(self, room: int) -> Gate:
        """The same for `room` columns, of as many concepts at the most; where there are so many columns, as it is:
        every concept is counted in every patch."""
        more = room - self.owners.shape[0]
        if more <= 0:
            return self
        least = F.pad(self.least, (0, max(0, room - self.least.shape[1])), value=1)
        return self._replace(owners=F.pad(self.owners, (0, more)), least=least)

    def to(self, device: torch.device) -> Gate:
        """The same on a device."""
        return self._replace(owners=self.owners.to(device), least=self.least.to(device))


class DetectionPlan:
    """The tensors of one attachment that looks. They are no parameters of any module, so no state_dict or offload
    sees them."""

    EXCHANGED: ClassVar[tuple[str, ...]] = ("latents", "thresholds", "enabled", "seeds", "gate")
    """What depends on the concepts and seeds that are attached."""

    def __init__(
        self,
        options: DetectionOptions,
        weight: Tensor,  # [L, d], the SAE's own
        order: Tensor | None,  # [L] int64, the row of `weight` that each latent is; None: its own
        bias: Tensor,  # [L] float32, pre-bias folded in; by latent, as all that follows
        latents: Tensor,  # [U] int64; a latent may come twice, with the thresholds of two concepts
        thresholds: Tensor,  # [T, U] float32, on pre-activations
        timesteps: Tensor,  # [T] float32, the bins
        enabled: Tensor,  # [S, U] bool, one row a set
        seeds: Tensor,  # [R] int64
        gate: Gate | None = None,
        pre: PreEncoder | None = None,
        centre: Tensor | None = None,  # [d] float32
    ) -> None:
        """`centre`: what activations lie around, by which products are screened where that spares time; None: they are
        not."""
        self.options, self.gate, self.pre = options, gate, pre
        self._centre, self._order = centre, order
        self.screen: tuple[Tensor | None, ...] = (None,) * len(SCREENED_BY)
        """The arguments SCREENED_BY of the ops. None: products are not screened. The last one is there only where
        `weight` is the SAE's own rows."""
        self.captured = False
        """Whether a CUDA graph reads these tensors."""
        if weight.is_inference():  # of which torch does not count the writes
            with torch.inference_mode(False):
                weight = weight.clone()
        # As given, since a cast to the dtype of one call's activations would be rounded for the next one's.
        self._exact_weight, self._version = weight, weight._version
        self._sum: int | None = None
        self.weight, self.bias, self.latents = weight, bias, latents
        self.thresholds, self.timesteps = thresholds, timesteps
        self.enabled, self.seeds = enabled, seeds

    def follow(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the tensors within a denoiser call, as tensors that may be written outside of inference mode too."""
        with torch.inference_mode(False), torch.no_grad():
            self.to(device, dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the tensors; `dtype` is that of the activations, which the encoder rows take."""
        if self.was_written():
            raise RuntimeError(_WRITTEN)
        for name in ("bias", "latents", "thresholds", "timesteps", "enabled", "seeds"):
            setattr(self, name, getattr(self, name).to(device))
        exact, order = self._exact_weight, self._order
        as_they_are = (exact.device, exact.dtype) == (device, dtype) and device.type == "cpu"
        as_they_are = as_they_are and exact.stride(1) == 1 and self._centre is not None and useful(exact)
        if order is not None and not as_they_are:
            exact, order = _in_order(exact, order.to(exact.device), device, dtype), None
        self.weight = exact.to(device, dtype)
        self._sum = None if order is None else _sum_of_bits(exact)
        screen = None
        if self._centre is not None:
            screen = Screen.where_useful(self.weight, self.bias, self._centre.to(device), order)
        self.screen = *((None,) * len(Screen._fields) if screen is None else screen), order
        if self.pre is not None:
            self.pre.to(device, dtype)
        if self.gate is not None:
            self.gate = self.gate.to(device)

    def take(self, other: DetectionPlan) -> None:
        """The concepts and seeds of another plan of the same editor; written in place where the shapes agree."""
        for name in self.EXCHANGED:
            mine, value = getattr(self, name), getattr(other, name)
            if isinstance(mine, Gate) and isinstance(value, Gate):
                owners, least = map(_written, mine[:2], value[:2])
                value = value._replace(owners=owners, least=least)
            elif isinstance(value, Tensor):
                value = _written(mine, value) if isinstance(mine, Tensor) else value.to(self.weight.device)
            elif isinstance(value, Gate):
                value = value.to(self.weight.device)
            setattr(self, name, value)

    def fits(self, other: DetectionPlan) -> bool:
        """Whether the concepts of another plan of the same editor can be written in place."""
        gates = [None if plan.gate is None else plan.gate.least.shape for plan in (self, other)]
        return self.latents.shape == other.latents.shape and gates[0] == gates[1]

    def check_encoder(self, bits: bool = False) -> None:
        """RuntimeError where the SAE's rows are used where they lie, and `was_written`."""
        if self._sum is not None and self.was_written(bits):
            raise RuntimeError(_WRITTEN)

    def was_written(self, bits: bool = False) -> bool:
        """Whether the SAE's rows were written to since they were given. `bits`: where they are used where they lie,
        they are looked at, too, for writes that torch does not count, as those to `.data`."""
        written = self._exact_weight._version != self._version
        return written or (bits and self._sum is not None and _sum_of_bits(self._exact_weight) != self._sum)

    def check_call(self, now: Now, ran: tuple[int, int] | None) -> None:
        """ValueError where the lists of sets and seeds, `rows` or the steps do not fit this call or cannot be told in
        it; reads sizes only. `ran`: the steps of the schedule that the pipeline's call goes through, where known."""
        branches = now.branches
        if not torch.compiler.is_compiling():
            self.check_encoder()
        if branches.names is None:
            self._refuse_unknown(branches)
        check_lengths(self, branches.images, branches.prompts)
        if self.options.steps is not None:
            schedule = now.schedule
            if self.options.steps[0] >= schedule.shape[0]:
                raise ValueError(
                    f"steps={self.options.steps}: begins after this call's {schedule.shape[0]} steps; attach with an "
                    "earlier window, or call the pipeline with more steps"
                )
            if ran is not None and not (self.options.steps[0] < ran[1] and ran[0] < self.options.steps[1]):
                raise ValueError(
                    f"steps={self.options.steps}: this call goes through the steps {ran[0]} to {ran[1] - 1} of its "
                    "schedule only, so nothing would be treated; attach with a window among them"
                )

    def _refuse_unknown(self, branches: Branches) -> None:
        options = self.options
        asked = [
            f"{name} with {count} entries"
            for name, given, count in (
                ("concepts", options.set_list, self.enabled.shape[0]),
                ("seed", options.seed_list, self.seeds.shape[0]),
            )
            if given
        ]
        if options.rows != "all":
            asked.append(f"rows={options.rows!r}")
        if options.steps is not None and not branches.announced:
            asked.append(f"steps={options.steps}")
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: {branches.why}, so which of its rows belong to which image and step is not "
                "known; call the pipeline that the editor is attached to, state the guidance branches by "
                "attach(layout=...), "
                "e.g. layout=('uncond', 'cond'), or attach with one set and one seed for all, rows='all' and no steps"
            )

    def detect(self, x: Tensor, minus: Tensor | None, now: Now) -> Tensor:
        """Mask [B, N] of `x` [B, d, H, W] or [B, d, N], by the concept sets, window and half of each row, and where
        there is a gate by that; keeps how many patches it took."""
        enabled = self.enabled_in(now)
        looked, minus = self.looked(x, minus, now)
        rows, gate, so_far = self.rows(now), {}, None
        # Without a deciding row each branch is counted for itself.
        images = len(rows.bins) // (rows.halves if rows.deciding is not None else 1)
        if self.gate is not None:
            now.gated = torch.empty_like(rows.bins)
            if self.gate.over_run:
                so_far = now.memory.rows(rows.timesteps, self._inside(now), images)
            gate = {"owners": self.gate.owners, "least": self.gate.least, "least_of": self.gate.least_of}
            gate |= {"deciding": rows.deciding, "gated": now.gated, "so_far": so_far}
        mask = ops.detect_patches(
            looked,
            self.weight,
            self.bias,
            self.latents,
            self.thresholds,
            rows.bins,
            enabled,
            self.options.k,
            minus,
            **gate,
            **self.screened_by(),
        )
        if so_far is not None:
            now.memory.keep(so_far, images)
        return mask

    def screened_by(self) -> dict[str, Tensor | None]:
        """The arguments of `detect_patches` by which products are screened."""
        return dict(zip(SCREENED_BY, self.screen, strict=True))

    def looked(self, x: Tensor, minus: Tensor | None, now: Now) -> tuple[Tensor, Tensor | None]:
        """What the encoder rows are multiplied with, as `x` and `minus` of the ops: these, or with a pre-encoder its
        output [B, d, N] and None, which is computed once a call."""
        if self.pre is None:
            return x, minus
        if now.looked is None:
            now.looked = self.pre(x, minus)
            if now.sums is not None:
                # Finite activations may overflow in it, and no patch would be detected where they do.
                now.sums = now.sums + _sums(now.looked)
        return now.looked, None

    def add_up(self, x: Tensor, minus: Tensor | None, now: Now) -> None:
        """Keeps the sums [B, N] float32 over the channels of what is looked at: in a patch with NaN or infinity they
        are not finite, where every comparison of the detection just says no."""
        sums = _sums(x)
        now.sums = sums if minus is None else sums - _sums(minus)

    def enabled_in(self, now: Now) -> Tensor:
        """The latents that count for each row of this call, [B, U] bool: by its set, the window and its half."""
        rows = self.rows(now)
        enabled = rows.enabled
        inside = self._inside(now)
        if inside is not None:
            enabled = enabled & inside.unsqueeze(1)
        if self.options.rows == "cond" and rows.treated is not None:
            enabled = enabled & rows.treated.unsqueeze(1)
        return enabled

    def _inside(self, now: Now) -> Tensor | None:
        """The rows whose timestep lies in the window of steps, [B] bool; None: there is none."""
        if self.options.steps is None:
            return None
        timesteps = self.rows(now).timesteps
        return call_rows.in_window(timesteps, now.schedule.to(timesteps.device), self.options.steps)

    def rows(self, now: Now) -> CallRows:
        """What the plan says of each row of this UNet call, worked out once a call: every small operation counts."""
        if now.rows is None:
            branches = now.branches
            images, prompted = branches.images, branches.of_the_prompt
            image, half = call_rows.images_of(now.timesteps.shape[0], images, now.timesteps.device)
            timesteps = now.timesteps.to(torch.float32)
            gated = self.gate is not None and branches.cond >= 0
            now.rows = CallRows(
                timesteps,
                self.bins(timesteps),
                half,
                branches.count,
                call_rows.seeds_of(self.seeds, image, images),
                call_rows.sets_of(self.enabled, image, images),
                image + branches.cond * images if gated else None,
                call_rows.in_branches(half, prompted) if prompted and self.options.rows == "cond" else None,
            )
        return now.rows

    def bins(self, timesteps: Tensor) -> Tensor:
        """The dictionary bin nearest to each timestep [B] float32 -> int64 [B], without a host sync."""
        return call_rows.nearest(timesteps, self.timesteps)


class EditPlan(DetectionPlan):
    """A plan that changes what it looks at."""

    def edit(self, x: Tensor, given: Tensor | None, now: Now) -> tuple[Tensor, Tensor, Tensor]:
        """The edited `x` [B, d, H, W] or [B, d, N], the detected patches and the changed ones, both bool [B, N].

        `given` like x: the block's input, for an SAE of its update.
        """
        raise NotImplementedError


def _sum_of_bits(rows: Tensor) -> int:
    """A number of [L, d] on a CPU, with d side by side; the same in whatever order the bits are added up."""
    size = rows.element_size()
    apart = size * rows.shape[1], size * rows.stride(0), size * rows.storage_offset()
    # Many times as fast as narrower numbers, which are copied to be widened.
    fits = all(step % 8 == 0 for step in apart)
    kind = torch.int64 if fits else {2: torch.int16, 4: torch.int32}[size]
    return int(rows.view(kind).sum())


def _in_order(rows: Tensor, order: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`rows[order]` there; without a second copy of all on the way."""
    out = torch.empty(rows.shape, dtype=dtype, device=device)
    for first in range(0, len(order), _CHUNK):
        part = slice(first, first + _CHUNK)
        out[part] = rows[order[part]].to(device, dtype)
    return out


def _sums(x: Tensor) -> Tensor:
    """[B, N] float32 of `x` [B, d, ...]: over the channels, but for a large float64, which must not become infinite."""
    if x.dtype == torch.float64:
        return (x.flatten(2).sum(1) * 0).float()
    return x.flatten(2).sum(1, dtype=torch.float32)


def _written(mine: Tensor, value: Tensor) -> Tensor:
    """`mine` with the values of `value`, or where shapes differ `value` on its device."""
    if mine.shape != value.shape or mine.dtype != value.dtype:
        return value.to(mine.device)
    if mine.is_cuda and not value.is_cuda:
        value = value.pin_memory()
    return mine.copy_(value, non_blocking=True)


def check_lengths(plan: DetectionPlan, images: int, prompts: int | None) -> None:
    """ValueError unless the lists of sets and seeds have one entry per prompt or per image.

    `prompts` None: unknown, then any divisor of `images` passes.
    """
    for name, given, count in (
        ("concepts", plan.options.set_list, plan.enabled.shape[0]),
        ("seed", plan.options.seed_list, plan.seeds.shape[0]),
    ):
        fits = count in (images, prompts) if prompts is not None else images % count == 0
        if given and not (fits and images % count == 0):
            known = (
                f"{images} images" if prompts in (None, images) else f"{prompts} prompts and {images} images"
            )
            raise ValueError(
                f"{name}: got a list of {count} entries for {known}; attach with one entry per prompt or per image, "
                "or with one for all"
            )
