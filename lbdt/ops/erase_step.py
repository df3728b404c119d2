"""`lbdt::erase_step`: all that an eraser does in one denoiser call, so that a step costs one call on the host."""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from lbdt import reference
from lbdt.donors import SOURCES
from lbdt.ops import _checks, _cpu, _dispatch, _triton
from lbdt.ops.detect_patches import BOUNDS, CODE_LANES, MOST_PATCHES
from lbdt.ops.record_patches import FIELDS
from lbdt.ops.replace_patches import replacement

_NAMES = tuple(inspect.signature(reference.erase_step).parameters)
_DEFAULTS = reference.erase_step.__defaults__  # of those at the end
_MINUS, _SOURCE, _KNOWN = map(_NAMES.index, ("minus", "source", "known_latents"))
_WRITTEN = ("rows", "cells", "written", "run_sums", "run_last", "run_count")
# For backends other than C++, whose op looks itself.
_alone = functools.partial(_checks.alone, names=_NAMES, written=_WRITTEN)
_STRIDED = ("x", "timesteps", "weight", "minus", "schedule")
_TIMES = (torch.int64, torch.int32, *_checks.FLOATS)
_dispatch.define(
    "erase_step(Tensor x, Tensor timesteps, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor times, Tensor enabled, Tensor seeds, int k, int images, int height, int width, int sizes, "
    "Tensor(a!) rows, Tensor(b!) cells, Tensor(c!) written, Tensor? minus=None, Tensor? bank=None, "
    "Tensor? known_latents=None, Tensor? known_thresholds=None, int padding=0, str source='random', "
    "Tensor? owners=None, Tensor? least=None, int least_of=0, int cond=-1, int counted=-1, Tensor? schedule=None, "
    "int first=0, int last=0, Tensor(d!)? run_sums=None, Tensor(e!)? run_last=None, Tensor(f!)? run_count=None, "
    "bool whole_calls=False, Tensor? codes=None, Tensor? bounds=None, "
    "Tensor? centre=None, Tensor? order=None, *, str backend='') -> Tensor"
)
# Contiguous but for x, weight, minus, timesteps and schedule; bias and thresholds in float32; source is an index into
# SOURCES. The result is like x, or where nothing was replaced has no image.
_dispatch.define_internal(
    "erase_step_cpp(Tensor x, Tensor timesteps, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor times, Tensor enabled, Tensor seeds, int k, int images, int height, int width, int sizes, "
    "Tensor(a!) rows, Tensor(b!) cells, Tensor(c!) written, Tensor? minus, Tensor? bank, Tensor? known_latents, "
    "Tensor? known_thresholds, int padding, int source, Tensor? owners, Tensor? least, int least_of, int cond, "
    "int counted, Tensor? schedule, int first, int last, Tensor(d!)? run_sums, Tensor(e!)? run_last, "
    "Tensor(f!)? run_count, bool whole_calls, Tensor? codes=None, Tensor? bounds=None, Tensor? centre=None, "
    "Tensor? order=None) -> Tensor",
    lambda x, *args: x.new_empty((torch.library.get_ctx().new_dynamic_size(), *x.shape[1:])),
)


def erase_step(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    timesteps: Tensor,  # [B]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    latents: Tensor,  # [U]
    thresholds: Tensor,  # [T, U]
    times: Tensor,  # [T]
    enabled: Tensor,  # [S, U]
    seeds: Tensor,  # [R]
    k: int,
    images: int,
    height: int,
    width: int,
    sizes: int,
    rows: Tensor,  # [*, 5], one more with least
    cells: Tensor,  # [*]
    written: Tensor,  # [2]
    minus: Tensor | None = None,  # like x
    bank: Tensor | None = None,  # [T, M, d]
    known_latents: Tensor | None = None,  # [V]
    known_thresholds: Tensor | None = None,  # [T, V]
    padding: int = 0,
    source: str = "random",
    owners: Tensor | None = None,  # [U]
    least: Tensor | None = None,  # [T, C]
    least_of: int = 0,
    cond: int = -1,
    counted: int = -1,
    schedule: Tensor | None = None,  # [*]
    first: int = 0,
    last: int = 0,
    run_sums: Tensor | None = None,  # [*, C + 1]
    run_last: Tensor | None = None,  # [*]
    run_count: Tensor | None = None,  # []
    whole_calls: bool = False,
    codes: Tensor | None = None,  # [L, d or a few more]
    bounds: Tensor | None = None,  # [6, L]
    centre: Tensor | None = None,  # [d]
    order: Tensor | None = None,  # [L]
    *,
    backend: str | None = None,
) -> Tensor:  # like x
    """Detects, replaces and records: `detect_patches`, `patch_uniform`, `replace_patches` and `record_patches` of one
    denoiser call, with what the rows' settings and the run's memory make of their arguments.

    Eq.: METHOD.md, 2.2, 2.5, 2.6 and 4.1 to 4.4; arXiv 2606.31699. Rows are images, branch by branch.

    Args:
        x, weight, bias, latents, thresholds, k, minus, owners, least, least_of: as in `detect_patches`.
        timesteps: float32 | float16 | bfloat16 | float64 | int64 | int32, the value the denoiser was called with.
        times: float32, the bins: a row is of the nearest one, of two the first.
        enabled: bool, the latents of each set: one for all images, or for as many images each.
        seeds: int64, of which s stands for s, s + 1, ... for as many images each.
        images: of which there are B / images branches.
        height, width, padding, source: as in `replace_patches`; height * width = N.
        sizes, rows, cells, written: as in `record_patches`, with one column for patches that hold a NaN or infinity in
            x or minus, and with `least` one for those that the gate took.
        bank: like x; the embeddings of each bin, for rows without a free patch.
        known_latents, known_thresholds: int64 and float32, as latents and thresholds: where one of these is detected
            there is no donor (`avoid` of `replace_patches`).
        cond: the branch whose rows decide in the gate for all of an image; -1: each row for itself.
        counted: bit i says whether branch i is treated, that of 63 of all from there on.
        schedule: of the dtypes of timesteps; where given, rows are treated whose nearest entry is one of [first, last).
        run_sums, run_last, run_count: int64, float32 and int64, contiguous, written: the gate is over the calls of a
            run (METHOD.md, 2.6). What each image has, its last timestep and how many images there were.
        whole_calls: whether an image goes on with its run where its timestep is that of the call before.
        codes, bounds, centre, order: as in `detect_patches`.
        backend: "auto", or one to force (`lbdt.ops.use_backend`).

    Returns:
        A new tensor. No gradient. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, IndexError: the argument, what was expected, what was given. RuntimeError where what is
            written shares memory with another argument, or x requires grad.
    """
    _checks.no_gradient("erase_step", x, bank)
    return torch.ops.lbdt.erase_step(
        x,
        timesteps,
        weight,
        bias,
        latents,
        thresholds,
        times,
        enabled,
        seeds,
        k,
        images,
        height,
        width,
        sizes,
        rows,
        cells,
        written,
        minus,
        bank,
        known_latents,
        known_thresholds,
        padding,
        source,
        owners,
        least,
        least_of,
        cond,
        counted,
        schedule,
        first,
        last,
        run_sums,
        run_last,
        run_count,
        whole_calls,
        codes,
        bounds,
        centre,
        order,
        backend=backend or "",
    )


def serves(x: Tensor, bank: Tensor | None) -> bool:
    """Whether `erase_step_or_none` may stand for the op: a plain call without a gradient, which a fused backend would
    serve."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        # What records ops would keep which way this call has gone.
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.jit.is_tracing()
        and not _checks.wants_gradient(x, bank)
        and _dispatch.chosen("erase_step", x) in ("cpp", "triton")
    )


def erase_step_or_none(*arguments) -> Tensor | None:
    """`erase_step` where `serves` said so, with all arguments by position and the source as its place in SOURCES; None
    where it is known that nothing was replaced, so that the result is x.

    What the C++ op refuses the checks of `erase_step` name; before a launch they look at all but shared memory.
    """
    x = arguments[0]
    launches = x.is_cuda or (_triton.interpreted() and _dispatch.chosen("erase_step", x) == "triton")
    try:
        if not launches:
            out = torch.ops.lbdt.erase_step_cpp.default(*arguments)
            return out if out.shape[0] else None
    except RuntimeError:
        pass  # Nothing was written. What only lies otherwise in memory is copied below.
    named = (*arguments[:_SOURCE], SOURCES[arguments[_SOURCE]], *arguments[_SOURCE + 1 :])
    if not launches or _triton_supports(*named) is not None:
        return torch.ops.lbdt.erase_step(*named)
    _check(*_complete(named))
    return _launched(_triton.kernels("erase_step").erase_step)(*_complete(named))


@_checks.tensors
def _check(
    x,
    timesteps,
    weight,
    bias,
    latents,
    thresholds,
    times,
    enabled,
    seeds,
    k,
    images,
    height,
    width,
    sizes,
    rows,
    cells,
    written,
    minus,
    bank,
    known_latents,
    known_thresholds,
    padding,
    source,
    owners,
    least,
    least_of,
    cond,
    counted,
    schedule,
    first,
    last,
    run_sums,
    run_last,
    run_count,
    whole_calls,
    codes,
    bounds,
    centre,
    order,
) -> None:
    batch, channels, patches = _checks.feature_map(x)
    _checks.encoder(x, channels, weight, bias, k, least=0)
    _checks.grid(x, height, width)
    if max(height, width) > MOST_PATCHES or (height**2 + 2 * width**2) * patches >= 1 << 63:
        raise ValueError(
            f"height, width: expected a grid whose squared distances fit, got {height} x {width}"
        )
    if not 1 <= images <= max(batch, 1) or batch % images:
        raise ValueError(f"images: expected a divisor of the {batch} rows of x, got {images}")
    _checks.donors(padding, source)
    if not -1 <= cond < max(batch // images, 1):
        raise ValueError(f"cond: expected -1 or one of the {batch // images} branches, got {cond}")
    _checks.shape("timesteps", timesteps, (batch,), "[B]")
    _checks.dtype("timesteps", timesteps, *_TIMES)
    bins, union = thresholds.shape if thresholds.dim() == 2 else (0, -1)
    if bins == 0 or latents.dim() != 1 or latents.shape[0] != union:
        raise ValueError(
            f"latents, thresholds: expected [U] and [T >= 1, U], got {list(latents.shape)}, {list(thresholds.shape)}"
        )
    _checks.shape("times", times, (bins,), "[T]")
    for name, tensor, axes in (("enabled", enabled, (union,)), ("seeds", seeds, ())):
        if (
            tuple(tensor.shape[1:]) != axes
            or not tensor.dim()
            or not tensor.shape[0]
            or images % tensor.shape[0]
        ):
            wanted = f"[a divisor of {images} images{', U = ' + str(union) if axes else ''}]"
            raise ValueError(f"{name}: expected {wanted}, got {list(tensor.shape)}")
    given = [
        ("timesteps", timesteps, timesteps.dtype),
        ("latents", latents, torch.int64),
        ("thresholds", thresholds, torch.float32),
        ("times", times, torch.float32),
        ("enabled", enabled, torch.bool),
        ("seeds", seeds, torch.int64),
    ]
    if minus is not None:
        _checks.shape("minus", minus, tuple(x.shape), "the shape of x")
        given.append(("minus", minus, x.dtype))
    if bank is not None:
        if bank.dim() != 3 or (bank.shape[0], bank.shape[2]) != (bins, channels) or bank.shape[1] == 0:
            raise ValueError(
                f"bank: expected [T, M, d] = [{bins}, M >= 1, {channels}], got {list(bank.shape)}"
            )
        given.append(("bank", bank, x.dtype))
    if (known_latents is None) != (known_thresholds is None):
        raise ValueError("known_latents, known_thresholds: expected both or none")
    if known_latents is not None:
        known = known_latents.shape[0] if known_latents.dim() == 1 else -1
        if known < 0 or tuple(known_thresholds.shape) != (bins, known):
            shapes = f"{list(known_latents.shape)}, {list(known_thresholds.shape)}"
            raise ValueError(f"known_latents, known_thresholds: expected [V] and [{bins}, V], got {shapes}")
        given.append(("known_latents", known_latents, torch.int64))
        given.append(("known_thresholds", known_thresholds, torch.float32))
    if least is not None or owners is not None:
        _checks.gate(x, union, bins, owners, least, least_of, None, None, None, MOST_PATCHES)
    if schedule is not None:
        if schedule.dim() != 1 or schedule.shape[0] == 0:
            raise ValueError(f"schedule: expected [1 or more], got {list(schedule.shape)}")
        _checks.dtype("schedule", schedule, *_TIMES)
        given.append(("schedule", schedule, schedule.dtype))
    runs = run_sums, run_last, run_count
    if len({tensor is None for tensor in runs}) > 1 or (run_sums is not None and least is None):
        raise ValueError("run_sums, run_last, run_count: expected all, and least with them, or none")
    _checks.buffers(x, "x", sizes, rows, cells, written, FIELDS + 1 + (least is not None))
    if run_sums is not None:
        room, counting = run_last.shape[0] if run_last.dim() == 1 else 0, batch if cond < 0 else images
        _checks.shape("run_sums", run_sums, (room, least.shape[1] + 1), "[*, C + 1]")
        _checks.shape("run_count", run_count, (), "[]")
        if room < counting:
            raise ValueError(f"run_last: expected [{counting} or more], got {list(run_last.shape)}")
        kinds = torch.int64, torch.float32, torch.int64
        for name, tensor, kind in zip(("run_sums", "run_last", "run_count"), runs, kinds, strict=True):
            _checks.target(name, tensor, kind, x)
    for name, tensor, kind in given:
        _checks.dtype(name, tensor, kind)
        _checks.device(name, tensor, x)
    _checks.screen(codes, bounds, centre, order, weight, (BOUNDS, CODE_LANES))


def _fake(x, *given, backend=""):
    _check(x, *_complete((x, *given))[1:])
    return torch.empty_like(x)


def _complete(given: tuple) -> tuple:
    """All arguments: torch leaves those at the end out that are as by default."""
    return given + _DEFAULTS[len(_DEFAULTS) - len(_NAMES) + len(given) :]


def _run(*given, backend=""):
    arguments = _complete(given)
    _check(*arguments)
    named = dict(zip(_NAMES, arguments, strict=True))
    for name in ("latents", "known_latents", "order"):
        if named[name] is not None:
            _checks.within(name, named[name], named["weight"].shape[0], "L, the latents of weight")
    if named["least"] is not None:
        _checks.within("owners", named["owners"], named["least"].shape[1], "C, the concepts of least")
    return _dispatch.call("erase_step", backend, *arguments)


def _cpp_supports(x, *args, **kwargs) -> str | None:
    return _cpu.supports_product("erase_step_cpp", x)


def _cpp(*arguments) -> Tensor:
    laid_out = []
    for name, value in zip(_NAMES, arguments, strict=True):
        if name == "source":
            value = SOURCES.index(value)
        elif name == "bias":
            value = value.float().contiguous()
        elif isinstance(value, Tensor) and name not in (*_WRITTEN, *_STRIDED):
            value = value.contiguous()
        laid_out.append(value)
    out = torch.ops.lbdt.erase_step_cpp(*laid_out)
    return out if out.shape[0] else arguments[0].clone()


def _triton_supports(x, *args, **kwargs) -> str | None:
    if reason := _triton.supports(x):
        return reason
    given = dict(zip(_NAMES[1:], args, strict=False)) | kwargs
    product = _triton.supports_product(x, given.get("weight"), given.get("minus"))
    return product or _triton.supports_order(given.get("order"))


def _launched(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The launcher `run`, handed what it replaces by; it takes no order, the last argument."""

    def launched(x, *others) -> Tensor:
        replace = replacement(x, x.shape[2:].numel(), others[_KNOWN - 1] is not None)
        return run(x, *others[:-1], replace)

    return launched


_dispatch.implement("erase_step", _run, _fake)
_triton.register("erase_step", _triton_supports, lambda run: _alone(_launched(run)))
_dispatch.register("erase_step", "cpp", _cpp_supports, _cpp, _cpu.declines_product)
_dispatch.register("erase_step", "reference", _dispatch.always, _alone(reference.erase_step))
