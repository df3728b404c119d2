"""Taking activations out of a running diffusers pipeline, at timesteps of its schedule, by plain PyTorch hooks that
always come off again."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lbdt.activations.sites import Site
from lbdt.hooks.feature_maps import place_of, tensor_of
from lbdt.hooks.lookup import unwrap

DENOISERS = ("unet", "transformer")
_TRAINED = 1000
_SHARE = 0.02


class Stop(Exception):
    """Raised by a receiver's `end`: nothing more is wanted of this pipeline call."""


class Receiver(Protocol):
    """What becomes of the activations of one pipeline call."""

    def begin(self, timestep: float) -> bool:
        """A denoiser (or text encoder) is called at this timestep; returns whether its activations are wanted."""

    def take(self, site: Site, x: Tensor, sample: Tensor) -> None:
        """A site's patches [images, N, d] in this call, and the whole call's input `sample`."""

    def end(self) -> None:
        """The call is over. May raise Stop."""


@dataclass(frozen=True)
class Schedule:
    """What the denoiser is called with, and the timesteps of the scheduler that these calls stand for."""

    values: tuple[int, ...]
    """Strictly descending, rounded."""
    exact: tuple[float, ...] = (0.0,)
    """The same before rounding."""
    scale: float = 1.0
    """The factor from the denoiser's argument to the scheduler's timesteps: 1000 for models called with t / 1000."""

    @classmethod
    def of(cls, schedule: Sequence[float], first: float) -> Schedule:
        """The schedule whose first call is at `first`. Timesteps that come more than once count once.

        Raises ValueError where the timesteps do not descend by whole numbers, or `first` has another scale.
        """
        exact = tuple(dict.fromkeys(float(t) for t in schedule))
        values = tuple(round(t) for t in exact)
        if not exact or any(a <= b for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(
                f"pipe: expected a scheduler with timesteps that descend, and differ when rounded; got {list(exact)}"
            )
        for scale in (1.0, float(_TRAINED)):
            # Pipelines may round their timesteps to half precision.
            if abs(first * scale - exact[0]) <= _SHARE * abs(exact[0]):
                return cls(values, exact, scale)
        raise ValueError(
            f"pipe: its denoiser was called at timestep {first}, but the schedule begins with {exact[0]}"
        )

    def nearest(self, timestep: float) -> int:
        """The timestep of a call with `timestep`."""
        at = min(range(len(self.exact)), key=lambda i: abs(self.exact[i] - timestep * self.scale))
        return self.values[at]


def choose(schedule: Sequence[int], wanted: Sequence[int] | int | None) -> tuple[int, ...]:
    """The wanted timesteps of a schedule, descending: given ones, or so many spread evenly over it (the middles of
    equal parts), or all.

    Raises ValueError naming the schedule.
    """
    if wanted is None:
        return tuple(schedule)
    known = ", ".join(map(str, schedule))
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(schedule):
            raise ValueError(
                f"timesteps: expected a number of them in [1, {len(schedule)}], got {wanted}; or name some of {known}"
            )
        return tuple(schedule[(2 * i + 1) * len(schedule) // (2 * wanted)] for i in range(wanted))
    missing = [t for t in wanted if t not in schedule]
    if missing or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"timesteps: expected some of {known}, each once; got {', '.join(map(str, wanted)) or 'none'}"
        )
    return tuple(sorted(wanted, reverse=True))


def denoiser_of(pipe: Any) -> nn.Module:
    """The pipeline's UNet or transformer, unwrapped.

    Raises:
        TypeError: `pipe` is not a pipeline.
        ValueError: it has neither.
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return unwrap(getattr(pipe, name))
    raise ValueError(
        f"pipe: {type(pipe).__name__} has no {' or '.join(DENOISERS)} (its components: "
        f"{', '.join(sorted(components)) or 'none'}); expected a diffusers text-to-image pipeline"
    )


def of_text(sites: Sequence[Site]) -> bool:
    """Whether the sites lie in text encoders, not in the denoiser; ValueError for a mixture: timesteps differ."""
    roots = {site.hookpoint.partition(".")[0] for site in sites}
    if not roots:
        raise ValueError("sites: expected at least one, such as unet.mid_block.attentions.0")
    if len({root in DENOISERS for root in roots}) > 1:
        raise ValueError(
            f"sites: {', '.join(map(str, sites))} mix the denoiser with other components, which have no timesteps; "
            "collect them in two runs"
        )
    return not roots <= set(DENOISERS)


def find_module(pipe: Any, hookpoint: str) -> nn.Module:
    """The module at `hookpoint`, whose first part names a component of the pipeline, unwrapped.

    Raises ValueError where there is none that is ever called; names the components or the nearest modules.
    """
    denoiser_of(pipe)
    root, *parts = hookpoint.split(".")
    component = getattr(pipe, root, None)
    if not isinstance(component, nn.Module):
        found = [n for n in pipe.components if isinstance(getattr(pipe, n, None), nn.Module)]
        raise ValueError(
            f"site: {type(pipe).__name__} has no component {root!r} to hook; it has {', '.join(sorted(found))}"
        )
    component = unwrap(component)
    module: nn.Module | None = component
    for part in parts:
        module = None if module is None else unwrap(module)._modules.get(part)
    if module is None or isinstance(module, nn.ModuleList) or type(module).forward is nn.Module.forward:
        known = [f"{root}.{name}" for name, _ in component.named_modules() if name]
        near = difflib.get_close_matches(hookpoint, known, n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"site: no module {hookpoint!r} that is called in {type(component).__name__}{hint}")
    return unwrap(module)


@contextlib.contextmanager
def capture(pipe: Any, sites: Sequence[Site], images: int, receiver: Receiver) -> Iterator[None]:
    """Pipeline calls for `images` images inside hand the sites' activations to `receiver`.

    Of guidance's [uncond; cond] batch the second half is taken. Where guidance runs two calls, or a scheduler repeats a
    timestep, the receiver decides; in diffusers the conditional call comes first. Of a text encoder's calls the first
    one counts, that of the prompts. Compiled models run eagerly, as they would not see the hooks.

    Raises (some inside the pipeline call) ValueError: unknown site, an update where input and output differ in shape, a
    batch that is not made of whole images.
    """
    text = of_text(sites)
    blocks = [find_module(pipe, site.hookpoint) for site in sites]
    handles = []
    try:
        roots = dict.fromkeys(site.hookpoint.partition(".")[0] for site in sites)
        calls = {root: _Call(pipe, images, receiver, text) for root in roots}
        for root, call in calls.items():
            module = unwrap(getattr(pipe, root))
            handles.append(module.register_forward_pre_hook(call.before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(call.after))
        for site, block in zip(sites, blocks, strict=True):
            tap = _Tap(site, calls[site.hookpoint.partition(".")[0]])
            handles.append(block.register_forward_pre_hook(tap.before, with_kwargs=True))
            handles.append(block.register_forward_hook(tap.after, with_kwargs=True))
        if text:
            handles.append(denoiser_of(pipe).register_forward_pre_hook(_stop))
        with _eager(is_compiled(pipe)):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Call:
    """A call of the component that runs once a timestep."""

    def __init__(self, pipe: Any, images: int, receiver: Receiver, text: bool) -> None:
        self.pipe, self.images, self.receiver, self.text = pipe, images, receiver, text
        self.wanted = self.over = False
        self.sample: Tensor | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.sample = _input(args, kwargs)
        if self.text:
            self.wanted = not self.over and self.receiver.begin(0.0)
        else:
            self.wanted = self.receiver.begin(_timestep(args, kwargs))

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.sample, self.wanted, self.over = None, False, True
        self.receiver.end()

    def conditional(self, site: Site, x: Tensor) -> Tensor:
        """The rows of `x` that the prompts have, not the negative ones."""
        rows = self.sample.shape[0]
        if x.shape[0] != rows or rows not in (self.images, 2 * self.images):
            raise ValueError(
                f"site {site}: its block ran on {x.shape[0]} rows and {type(self.pipe).__name__} on {rows} for "
                f"{self.images} images; expected one row an image, or [unconditional; conditional]"
            )
        return x[rows - self.images :]


class _Tap:
    """The hooks of one site."""

    def __init__(self, site: Site, call: _Call) -> None:
        self.site, self.call = site, call
        self.input: Tensor | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.call.wanted and self.site.update:
            self.input = _input(args, kwargs)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given, self.input = self.input, None
        if not self.call.wanted:
            return
        x = tensor_of(output, place_of(module) if isinstance(output, tuple) else 0)
        if x.dim() not in (3, 4):
            raise ValueError(
                f"site {self.site}: its block returned a tensor of shape {tuple(x.shape)}; expected [B, d, H, W] or "
                "[B, N, d]"
            )
        if self.site.update:
            if given.shape != x.shape:
                raise ValueError(
                    f"site {self.site}: its block has input {tuple(given.shape)} and output {tuple(x.shape)}, so it "
                    "has no update; take its output, or a block that keeps the shape"
                )
            given = self.call.conditional(self.site, given)
        x = self.call.conditional(self.site, x)
        if self.site.update:
            # Differences of half precision numbers are exact in float32.
            x = x.to(torch.promote_types(x.dtype, torch.float32)) - given
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        self.call.receiver.take(self.site, x, self.call.sample)


def is_compiled(model: Any) -> bool:
    """Whether a module, or one in it, was given to `torch.compile`; of a pipeline, any of its components."""
    models = [model] if isinstance(model, nn.Module) else getattr(model, "components", {}).values()
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for model in models
        if isinstance(model, nn.Module)
        for module in model.modules()
    )


def _eager(needed: bool) -> contextlib.AbstractContextManager:
    return torch.compiler.set_stance("force_eager") if needed else contextlib.nullcontext()


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first positional argument, or the keyword argument that models and blocks of diffusers call it by."""
    named = [kwargs.get(name) for name in ("hidden_states", "sample", "input_ids")]
    for value in (*args[:1], *named, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ValueError("site: a call without a tensor as its input; hook another block")


def _timestep(args: tuple, kwargs: dict[str, Any]) -> float:
    value = kwargs["timestep"] if "timestep" in kwargs else args[1] if len(args) > 1 else None
    if value is None:
        raise ValueError("pipe: its denoiser was called without a timestep; expected a diffusion pipeline")
    # All rows of a call have one timestep.
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


def _stop(module: nn.Module, args: tuple) -> None:
    raise Stop


def quiet(pipe: Any) -> Callable[[], None]:
    """Turns the pipeline's progress bar off; returns the undo."""
    had, before = "_progress_bar_config" in vars(pipe), vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(disable=True)

    def undo() -> None:
        if had:
            pipe._progress_bar_config = before
        else:
            vars(pipe).pop("_progress_bar_config", None)

    return undo
