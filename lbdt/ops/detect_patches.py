"""`lbdt::detect_patches`: which patches of a feature map carry a concept."""

import functools
import inspect

import torch
from torch import Tensor

from lbdt import reference
from lbdt.ops import _checks, _cpu, _dispatch, _triton

_NAMES = tuple(inspect.signature(reference.detect_patches).parameters)
_WRITTEN = _NAMES.index("gated")  # and, behind it, `so_far`
# For backends other than C++, whose op looks itself, in less time than Python.
_alone = functools.partial(_checks.alone, names=_NAMES, written=("so_far", "gated"))
MOST_PATCHES = 1 << 30
"""The largest number of patches in a map; csrc/checks.h: kMostPatches."""

CODE_LANES = 4
"""How many codes are read at a time: rows of `codes` are padded to a multiple; csrc/cpu/screen_tiles.h: kWord."""
BOUNDS = 6
"""The rows of `bounds`; csrc/cpu/screen_tiles.h: ScreenKind."""

_dispatch.define(
    "detect_patches(Tensor x, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor timestep_bin, Tensor enabled, int k, Tensor? minus=None, Tensor? owners=None, Tensor? least=None, "
    "int least_of=0, Tensor? deciding=None, Tensor(a!)? gated=None, Tensor(b!)? so_far=None, Tensor? codes=None, "
    "Tensor? bounds=None, Tensor? centre=None, Tensor? order=None, *, str backend='') "
    "-> Tensor"
)
# The same without what is written: Inductor does not take an op that might write, but has nothing to write to.
_dispatch.define(
    "detect_patches.functional(Tensor x, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor timestep_bin, Tensor enabled, int k, Tensor? minus=None, Tensor? owners=None, Tensor? least=None, "
    "int least_of=0, Tensor? deciding=None, Tensor? codes=None, Tensor? bounds=None, Tensor? centre=None, "
    "Tensor? order=None, *, str backend='') -> Tensor"
)
# Contiguous but for x, weight and minus; bias and thresholds in float32.
_dispatch.define_internal(
    "detect_patches_cpp(Tensor x, Tensor weight, Tensor bias, Tensor latents, Tensor thresholds, "
    "Tensor timestep_bin, Tensor enabled, int k, Tensor? minus, Tensor? owners, Tensor? least, int least_of, "
    "Tensor? deciding, Tensor(a!)? gated, Tensor(b!)? so_far, Tensor? codes, Tensor? bounds, "
    "Tensor? centre, Tensor? order, Tensor(c!) mask) -> ()"
)


def detect_patches(
    x: Tensor,  # [B, d, H, W] or [B, d, N]
    weight: Tensor,  # [L, d]
    bias: Tensor,  # [L]
    latents: Tensor,  # [U]
    thresholds: Tensor,  # [T, U]
    timestep_bin: Tensor,  # [B]
    enabled: Tensor,  # [B, U]
    k: int,
    minus: Tensor | None = None,  # like x
    owners: Tensor | None = None,  # [U]
    least: Tensor | None = None,  # [T, C]
    least_of: int = 0,
    deciding: Tensor | None = None,  # [B]
    gated: Tensor | None = None,  # [B]
    so_far: Tensor | None = None,  # [B, C + 1]
    codes: Tensor | None = None,  # [L, d or a few more]
    bounds: Tensor | None = None,  # [6, L]
    centre: Tensor | None = None,  # [d]
    order: Tensor | None = None,  # [L]
    *,
    backend: str | None = None,
) -> Tensor:  # [B, N]
    """Mask of the patches in which at least one enabled concept latent is detected.

    Latent u is detected on a patch iff its pre-activation `h_u` is above `thresholds[timestep_bin, u]` and,
    for k > 0, fewer than k other latents of the dictionary have a strictly larger one. Eq.: METHOD.md, 2.2;
    arXiv 2606.31699. Nothing of size N x L is held; without a candidate the dictionary is not read.

    Args:
        x: float32 | float16 | bfloat16 | float64, any strides.
        weight: SAE encoder rows, dtype of x.
        bias: float32, `b_enc - weight @ b_dec`.
        latents: int64, the union of the concepts' latents, each in [0, L). Only on the CPU are these values and
            those of timestep_bin looked at first; on a GPU Triton takes one outside for a latent not selected.
        thresholds: float32, on pre-activations; +inf where a latent is not selected in a bin.
        timestep_bin: int64, each in [0, T).
        enabled: bool, the latents that count for each image.
        k: latents kept per patch; 0 for activation functions without a rank test.
        minus: detect on `x - minus`, for an SAE of a block's update.
        owners: int64, the concept of each latent, in [0, C); needed with least.
        least: int64, the gate (METHOD.md, 2.5): the patches that must be detected for a concept in a row, or those
            that are detected for no other are taken from its mask; 1 or less: no gate. None: none for any concept.
        least_of: the patches of the maps that `least` counts on, which is scaled to N, but for 1; 0: N.
        deciding: int64, in [0, B): the row whose count decides for each row; None: its own. On a GPU its own too
            where it is no position.
        gated: int64, written where given: how many patches the gate took from each row.
        so_far: int64, contiguous, 0 when a run begins; where given, the gate is over the calls of the run (METHOD.md,
            2.6): the patches of evidence so far for each row, by the row that decides for it, and last how many calls
            there were. This call is added. A concept that was found has 2^40. `least` then counts quarters of a patch
            of their mean.
        codes, bounds, centre: int8, float32 and float32, contiguous: the `lbdt.int8_screen.Screen` of weight and bias,
            or none of them. They change no result: C++ on CPUs with VNNI, and Triton in half precision, count in int8
            what that decides. That they are of another dictionary is not noticed.
        order: int64, contiguous, each in [0, L): the row of weight that each latent is, so that a dictionary is used in
            an order without a copy of it; None: its own. All other arguments are by latent. On a CPU only.
        backend: "auto", or one to force (`lbdt.ops.use_backend`).

    Returns:
        bool [B, N]. No gradient. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError, TypeError, IndexError: the argument, what was expected, what was given.
    """
    given = (
        x,
        weight,
        bias,
        latents,
        thresholds,
        timestep_bin,
        enabled,
        k,
        minus,
        owners,
        least,
        least_of,
        deciding,
    )
    screen = codes, bounds, centre, order
    if gated is None and so_far is None:
        return torch.ops.lbdt.detect_patches.functional(*given, *screen, backend=backend or "")
    return torch.ops.lbdt.detect_patches.default(*given, gated, so_far, *screen, backend=backend or "")


@_checks.tensors
def _check(
    x,
    weight,
    bias,
    latents,
    thresholds,
    timestep_bin,
    enabled,
    k,
    minus=None,
    owners=None,
    least=None,
    least_of=0,
    deciding=None,
    gated=None,
    so_far=None,
    codes=None,
    bounds=None,
    centre=None,
    order=None,
) -> tuple[int, int]:
    batch, width, patches = _checks.feature_map(x)
    _checks.encoder(x, width, weight, bias, k, least=0)
    if latents.dim() != 1:
        raise ValueError(f"latents: expected [U], got {list(latents.shape)}")
    union = latents.shape[0]
    if thresholds.dim() != 2 or thresholds.shape[1] != union:
        raise ValueError(f"thresholds: expected [T, U] with U = {union}, got {list(thresholds.shape)}")
    _checks.shape("timestep_bin", timestep_bin, (batch,), "[B]")
    _checks.shape("enabled", enabled, (batch, union), "[B, U]")
    _checks.dtype("latents", latents, torch.int64)
    _checks.dtype("thresholds", thresholds, torch.float32, torch.float64)
    _checks.dtype("timestep_bin", timestep_bin, torch.int64)
    _checks.dtype("enabled", enabled, torch.bool)
    for name, tensor in (
        ("latents", latents),
        ("thresholds", thresholds),
        ("timestep_bin", timestep_bin),
        ("enabled", enabled),
    ):
        _checks.device(name, tensor, x)
    if minus is not None:
        _checks.shape("minus", minus, tuple(x.shape), "the shape of x")
        _checks.dtype("minus", minus, x.dtype)
        _checks.device("minus", minus, x)
    if any(tensor is not None for tensor in (least, owners, deciding, gated, so_far)):
        written = gated, so_far
        _checks.gate(x, union, thresholds.shape[0], owners, least, least_of, deciding, *written, MOST_PATCHES)
    _checks.screen(codes, bounds, centre, order, weight, (BOUNDS, CODE_LANES))
    return batch, patches


def _fake(x, *args, backend="", **kwargs):
    batch, patches = _check(x, *args, **kwargs)
    return x.new_empty((batch, patches), dtype=torch.bool)


def _whole(arguments: tuple) -> tuple:
    """The arguments of the functional op with those that it lacks."""
    return (
        (*arguments[:_WRITTEN], None, None, *arguments[_WRITTEN:]) if len(arguments) > _WRITTEN else arguments
    )


def _run(
    x,
    weight,
    bias,
    latents,
    thresholds,
    timestep_bin,
    enabled,
    k,
    minus=None,
    owners=None,
    least=None,
    least_of=0,
    deciding=None,
    gated=None,
    so_far=None,
    codes=None,
    bounds=None,
    centre=None,
    order=None,
    *,
    backend="",
):
    given = x, weight, bias, latents, thresholds, timestep_bin, enabled, k, minus
    gate, screen = (owners, least, least_of, deciding, gated, so_far), (codes, bounds, centre, order)
    _check(*given, *gate, *screen)
    _checks.within("latents", latents, weight.shape[0], "L, the latents of weight")
    _checks.within("timestep_bin", timestep_bin, thresholds.shape[0], "T, the bins of thresholds")
    if least is not None:
        _checks.within("owners", owners, least.shape[1], "C, the concepts of least")
    if deciding is not None:
        _checks.within("deciding", deciding, x.shape[0], "B, the rows of x")
    if order is not None:
        _checks.within("order", order, weight.shape[0], "L, the latents of weight")
    return _dispatch.call("detect_patches", backend, *given, *gate, *screen)


def _cpp_supports(x, *args, **kwargs) -> str | None:
    return _cpu.supports_product("detect_patches_cpp", x)


def _cpp(
    x,
    weight,
    bias,
    latents,
    thresholds,
    timestep_bin,
    enabled,
    k,
    minus=None,
    owners=None,
    least=None,
    least_of=0,
    deciding=None,
    gated=None,
    so_far=None,
    codes=None,
    bounds=None,
    centre=None,
    order=None,
) -> Tensor:
    mask = torch.empty(x.shape[0], x.shape[2:].numel(), dtype=torch.bool)
    torch.ops.lbdt.detect_patches_cpp(
        x,
        weight,
        bias.float().contiguous(),
        latents.contiguous(),
        thresholds.float().contiguous(),
        timestep_bin.contiguous(),
        enabled.contiguous(),
        k,
        minus,
        None if owners is None else owners.contiguous(),
        None if least is None else least.contiguous(),
        least_of,
        None if deciding is None else deciding.contiguous(),
        gated,
        so_far,
        codes,
        bounds,
        centre,
        order,
        mask,
    )
    return mask


def _triton_supports(x, weight, *args, **kwargs) -> str | None:
    given = dict(zip(_NAMES[2:], args, strict=False)) | kwargs
    product = _triton.supports_product(x, weight, given.get("minus"))
    return product or _triton.supports(x) or _triton.supports_order(given.get("order"))


_dispatch.implement("detect_patches", _run, _fake)
_dispatch.implement(
    "detect_patches.functional",
    lambda *given, backend="": _run(*_whole(given), backend=backend),
    lambda *given, backend="": _fake(*_whole(given), backend=backend),
)
_triton.register("detect_patches", _triton_supports, _alone)
_dispatch.register("detect_patches", "cpp", _cpp_supports, _cpp, _cpu.declines_product)
_dispatch.register("detect_patches", "reference", _dispatch.always, _alone(reference.detect_patches))
