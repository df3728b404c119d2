"""One case: an op or the hook at a shape, share and dtype, with its baselines, its check and its floor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbdt import ops, reference, testing
from lbdt.bench import baselines, shapes
from lbdt.bench.baselines import compiled
from lbdt.bench.measured_shares import MEASURED
from lbdt.bench.shapes import Place, Shape
from lbdt.donors import MEAN_OF, DonorSource
from lbdt.int8_screen import Screen
from lbdt.ops.record_patches import FIELDS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUTSIDE = "none in the first k"
ALIKE = "all latents alike"
_ALIKE_AT = 0.5
INEXACT = ("bfloat16", "int8")
"""Baselines whose products round, and with them their answers."""
UNIONS = (34, 137)
"""Latents that are watched, beside the shape's own few: of about 5 and 20 concepts."""
PLAIN = "NCHW, random"
_LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# One share for these: they differ in how much a patch costs, not in how that grows with the share.
_OTHERS_AT = 0.1
_FEW = (0.0, 0.1, 1.0)
_OTHERS = (
    f"{PLAIN}, functional",
    "channels_last, random",
    "NCHW, nearest",
    "channels_last, nearest",
    "NCHW, mean",
    "channels_last, mean",
    "NCHW, row",
    "NCHW, nearest, avoid",
)


class Mismatch(RuntimeError):
    """Two versions of a case gave different answers, so none of their times means anything."""


class Spec(NamedTuple):
    """Names a case."""

    op: str
    shape: str
    share: float | None
    """Share of the patches: above the threshold, or in the mask before padding. None: the op has none."""
    variant: str
    dtype: str

    def __str__(self) -> str:
        parts = (
            self.op,
            self.shape,
            None if self.share is None else f"{self.share:.0%}",
            self.variant,
            self.dtype,
        )
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class TimedCase:
    """What is timed."""

    spec: Spec
    versions: dict[str, Callable[[], Any]]
    """"ours", then baselines."""
    check: Callable[[dict[str, Callable[[], Any]]], int | None]
    """Runs the given ones once; returns how many patches were detected or replaced. Raises Mismatch."""
    bytes: int
    """The least that has to be read and written."""
    flops: int
    backend: str
    bare: str | None = None
    """The version whose time is no part of the others' own."""
    attach_bytes: int | None = None
    """What torch allocates at most while an eraser is attached."""


def specs(
    wanted: Iterable[str],
    names: Iterable[str],
    shares: Sequence[float],
    dtypes: Iterable[str],
    shortened: Iterable[str] = (),
    measured: Iterable[str] = (),
) -> list[Spec]:
    """All cases of the named ops, shapes, shares and dtypes; of the `shortened` shapes only three shares, of the
    `measured` ones also what detects with the shares of pictures, and with more latents."""
    found = []
    for dtype, name, op in itertools.product(dtypes, names, wanted):
        if name in shapes.HOST:
            found += [Spec(op, name, 0.0, "", dtype)] * (op == "hook")
            continue
        own = [share for share in shares if share in _FEW] if name in shortened else shares
        if op in ("encode_topk", "patch_uniform", "record_patches"):
            found.append(Spec(op, name, None, "", dtype))
            continue
        found += [Spec(op, name, share, PLAIN if op == "replace_patches_" else "", dtype) for share in own]
        if op == "detect_patches" and name not in shortened:
            found += [Spec(op, name, share, OUTSIDE, dtype) for share in own if share in (0.1, 1.0)]
        if op in ("detect_patches", "hook") and name in measured:
            found += [Spec(op, name, 0.0, f"U {union}", dtype) for union in UNIONS]
            found += [Spec(op, name, MEASURED[case].candidates, case, dtype) for case in MEASURED]
            found.append(Spec(op, name, _ALIKE_AT, ALIKE, dtype))
        if op == "replace_patches_" and _OTHERS_AT in own and name not in shortened:
            found += [Spec(op, name, _OTHERS_AT, variant, dtype) for variant in _OTHERS]
    return found


def build(spec: Spec, device: torch.device | None = None, seed: int = 0) -> TimedCase:
    """The case with its inputs on the device (default: CPU)."""
    shape = (shapes.SHAPES | shapes.QUICK | shapes.HOST)[spec.shape]
    if spec.variant.startswith("U "):
        shape = shape._replace(union=int(spec.variant[2:]))
    return _BUILD[spec.op](spec, shape, Place(device or torch.device("cpu"), DTYPES[spec.dtype], seed))


def _detect(spec: Spec, shape: Shape, place: Place) -> TimedCase:
    inside, measured = spec.variant != OUTSIDE, MEASURED.get(spec.variant)
    arguments = shapes.detection(shape, spec.share, inside, place, measured, spec.variant == ALIKE)
    wanted, refuted = _expected(shape, spec, arguments)
    weight = arguments["weight"]
    screen = Screen.where_useful(weight, arguments["bias"], torch.zeros(shape.width, device=place.device))

    def check(versions: dict[str, Callable]) -> int:
        masks = {name: version() for name, version in versions.items() if name not in INEXACT}
        for name, mask in masks.items():
            _require(torch.equal(mask, masks["ours"]), spec, f"the masks differ: {name} and ours")
        detected = int(masks["ours"].sum())
        _require(detected == wanted, spec, f"{detected} patches detected, {wanted} expected")
        return detected

    versions = {
        "ours": partial(ops.detect_patches, **arguments, **({} if screen is None else screen._asdict())),
        "literal": partial(baselines.literal, **arguments),
        "compiled": partial(compiled(baselines.literal), **arguments),
    }
    if place.device.type == "cpu" and place.dtype == torch.float32:
        versions["bfloat16"] = partial(baselines.LiteralBfloat16(weight), **arguments)
        versions["int8"] = partial(baselines.LiteralInt8(weight), **arguments)
    backend = ops.explain("detect_patches", **arguments).backend
    size = detection_floor(shape, wanted, place.dtype.itemsize, refuted)
    return TimedCase(spec, versions, check, *size, backend)


def _replace(spec: Spec, shape: Shape, place: Place) -> TimedCase:
    layout, source, *more = spec.variant.split(", ")
    functional = "functional" in more
    arguments = shapes.replacement(shape, spec.share, _LAYOUTS[layout], place) | {"source": source}
    if "avoid" in more:
        g = torch.Generator().manual_seed(place.seed)
        arguments["avoid"] = (torch.rand(arguments["mask"].shape, generator=g) < 0.5).to(place.device)
    x = arguments["x"]

    def in_place(function: Callable, **more: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        # A second call writes what the first one wrote, as donors are never overwritten.
        given = arguments | more | {"x": x.clone()}
        return lambda: (given["x"], function(**given))

    def published() -> tuple[Tensor, Tensor]:
        mask = baselines.grow(arguments["mask"], shape.height, shape.grid_width, shapes.PADDING)
        return baselines.replace_in_turn(x, mask), mask

    if functional:
        versions = {
            "ours": partial(ops.replace_patches, **arguments),
            "reference": partial(ops.replace_patches, **arguments, backend="reference"),
        }
    else:
        versions = {
            "ours": in_place(ops.replace_patches_),
            "reference": in_place(ops.replace_patches_, backend="reference"),
        }
    if spec.variant == PLAIN:
        versions["compiled"] = in_place(compiled(reference.replace_patches_))
    if source == DonorSource.random:
        versions["published"] = published
    expected, replaced = reference.replace_patches(**arguments)

    def check(versions: dict[str, Callable]) -> int:
        for name, version in versions.items():
            out, where = version()
            _require(torch.equal(where, replaced), spec, f"other patches were replaced: {name}")
            if name == "published":  # other donors: its draws come from the global generator
                _require(torch.equal(changed(x, out), replaced), spec, f"other patches were written: {name}")
            elif source == DonorSource.mean:
                _close(out, expected, "replace_mean", spec, name)
            else:
                _require(torch.equal(out, expected), spec, f"the embeddings differ: {name}")
        return int(replaced.sum())

    op = spec.op.rstrip("_") if functional else spec.op
    size = replacement_floor(shape, replaced, place.dtype.itemsize, source, functional)
    return TimedCase(spec, versions, check, *size, ops.explain(op, **arguments).backend)


def _topk(spec: Spec, shape: Shape, place: Place) -> TimedCase:
    given = shapes.detection(shape, _OTHERS_AT, place=place)
    arguments = {name: given[name] for name in ("x", "weight", "bias", "k")}
    versions = {
        "ours": partial(ops.encode_topk, **arguments),
        "literal": partial(baselines.literal_topk, **arguments),
        "compiled": partial(compiled(baselines.literal_topk), **arguments),
    }

    def check(versions: dict[str, Callable]) -> None:
        x, weight = arguments["x"].float(), arguments["weight"].float()
        h = torch.nn.functional.linear(x.flatten(2).transpose(1, 2), weight, arguments["bias"])
        best = h.topk(shape.k, dim=-1).values.relu().to(place.dtype)
        for name, version in versions.items():
            values, indices = version()
            # Half-precision baselines round the sums where their libraries like; ours promises float32 ones.
            if name == "ours" or place.dtype == torch.float32:
                _close(values, best, "encode_topk", spec, name)
                # Not the indices themselves: near ties may come in any order.
                there = h.gather(-1, indices).relu().to(place.dtype)
                _close(values, there, "encode_topk", spec, name)

    flops = 2 * shape.patches * shape.latents * shape.width
    size = place.dtype.itemsize
    moved = size * shape.width * (shape.patches + shape.latents) + (size + 8) * shape.patches * shape.k
    return TimedCase(spec, versions, check, moved, flops, ops.explain("encode_topk", **arguments).backend)


def _uniform(spec: Spec, shape: Shape, place: Place) -> TimedCase:
    row = torch.arange(shape.batch, device=place.device)
    arguments = {
        "seeds": place.seed + row % shape.images,
        "timesteps": torch.full_like(row, 481),
        "halves": row // shape.images,
        "patches": shape.patches // shape.batch,
    }
    sizes = (shape.batch, arguments["patches"])
    versions = {
        "ours": partial(ops.patch_uniform, **arguments),
        "literal": partial(reference.patch_uniform, **arguments),
        "compiled": partial(compiled(reference.patch_uniform), **arguments),
        # Not the same numbers: what it would cost not to care about the batch.
        "rand": partial(torch.rand, sizes, device=place.device),
    }

    def check(versions: dict[str, Callable]) -> None:
        drawn = {name: version() for name, version in versions.items()}
        for name in drawn.keys() - {"rand"}:
            _require(torch.equal(drawn[name], drawn["ours"]), spec, f"the numbers differ: {name} and ours")

    moved = 4 * shape.patches + 3 * 8 * shape.batch
    return TimedCase(spec, versions, check, moved, 0, ops.explain("patch_uniform", **arguments).backend)


def _record(spec: Spec, shape: Shape, place: Place) -> TimedCase:
    g = torch.Generator().manual_seed(place.seed)
    mask, replaced = (
        (torch.rand(shape.batch, shape.patches // shape.batch, generator=g) < _OTHERS_AT).to(place.device)
        for _ in range(2)
    )
    times = torch.full((shape.batch,), 481.0, device=place.device)
    bits = int(times[0].cpu().view(torch.int32))

    def into(function: Callable) -> Callable[[], tuple[Tensor, ...]]:
        rows = torch.zeros(1 << 16, FIELDS, dtype=torch.int64, device=place.device)
        cells = torch.zeros(0, dtype=torch.uint8, device=place.device)
        written = torch.zeros(2, dtype=torch.int64, device=place.device)

        def run() -> tuple[Tensor, ...]:
            function(mask, replaced, times, shape.patches, rows, cells, written)
            return rows, written

        return run

    versions = {
        "ours": into(ops.record_patches),
        "literal": into(reference.record_patches),
        "compiled": into(compiled(reference.record_patches)),
    }

    def check(versions: dict[str, Callable]) -> None:
        for name, version in versions.items():
            rows, written = version()
            last = rows[(int(written[0]) - 1) % rows.shape[0]].tolist()
            wanted = [int(mask[-1].sum()), int(replaced[-1].sum()), bits, shape.patches]
            _require(last == wanted, spec, f"the record differs: {name}: {last}, {wanted} expected")

    rows, written = torch.zeros(1, FIELDS, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    given = (mask, replaced, times, 0, rows.to(place.device), mask.new_zeros(0, dtype=torch.uint8), written)
    backend = ops.explain("record_patches", *given).backend
    moved = 2 * shape.patches + (8 * FIELDS + 4) * shape.batch
    return TimedCase(spec, versions, check, moved, 0, backend)


def _hook(spec: Spec, shape: Shape, place: Place) -> TimedCase:
    from lbdt.bench.hook import Stand

    stand = Stand(shape, spec.share, place, MEASURED.get(spec.variant), spec.variant == ALIKE)
    detected, refuted = _expected(shape, spec, stand.arguments)
    mask = baselines.literal(**stand.arguments)
    replaced = baselines.grow(mask, shape.height, shape.grid_width, shapes.PADDING)

    def check(versions: dict[str, Callable]) -> int:
        _require(
            int(mask.sum()) == detected, spec, f"{int(mask.sum())} patches detected, {detected} expected"
        )
        for name, version in versions.items():
            where = changed(stand.x, version())
            wanted = torch.zeros_like(replaced) if name == "bare" else replaced
            _require(torch.equal(where, wanted), spec, f"the masks differ: {name} and the literal one")
        return detected

    read, flops = detection_floor(shape, detected, place.dtype.itemsize, refuted)
    written, more = replacement_floor(shape, replaced, place.dtype.itemsize, "random", False)
    used = {
        "detect_patches": ops.explain("detect_patches", **stand.arguments),
        "replace_patches": ops.explain("replace_patches", **stand.replacement),
    }
    backend = ", ".join(sorted({choice.backend for choice in used.values()}))
    size = read + written, flops + more
    return TimedCase(spec, stand.versions(), check, *size, backend, "bare", stand.attach_bytes)


_BUILD = {
    "detect_patches": _detect,
    "replace_patches_": _replace,
    "encode_topk": _topk,
    "patch_uniform": _uniform,
    "record_patches": _record,
    "hook": _hook,
}
OPS = tuple(_BUILD)


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Patches of [B, d, H, W] in which any value differs; bool [B, N]."""
    return (before != after).flatten(2).any(dim=1)


def _expected(shape: Shape, spec: Spec, arguments: dict[str, Any]) -> tuple[int, int]:
    """How many patches are detected, and how many are candidates and refuted."""
    measured = MEASURED.get(spec.variant)
    above = round(spec.share * shape.patches)
    detected = 0 if spec.variant == OUTSIDE else above
    if spec.variant == ALIKE:  # chance says which of them are largest
        detected = int(baselines.literal(**arguments).sum())
    if measured is not None:
        detected = round(measured.detected * shape.patches)
    return detected, above - detected


def detection_floor(shape: Shape, counted: int, size: int, refuted: int = 0) -> tuple[int, int]:
    """Bytes and flops of reading the feature map and the own rows and multiplying them, for `counted` patches that
    must be ranked among all latents, of the whole dictionary, and for `refuted` ones of k of it; `size` bytes an
    element."""
    maps = 2 if shape.update else 1
    moved = size * shape.width * (maps * shape.patches + shape.union)
    flops = 2 * shape.patches * shape.union * shape.width
    if counted:
        moved += size * shape.latents * shape.width
        flops += 2 * counted * shape.latents * shape.width
    elif refuted:
        moved += size * shape.k * shape.width
    return moved, flops + 2 * refuted * shape.k * shape.width


def replacement_floor(
    shape: Shape, replaced: Tensor, size: int, source: str, functional: bool
) -> tuple[int, int]:
    """Bytes and flops of reading the mask, writing the `replaced` patches [B, N] and their flags, and
    reading each donor once; all patches are read and written where the result is a new tensor."""
    each = MEAN_OF if source == DonorSource.mean else 1
    taken = replaced.sum(dim=1)
    free = replaced.shape[1] - taken
    donors = torch.minimum(each * taken, torch.where(free > 0, free, shapes.BANK))
    rows = 2 * shape.patches if functional else int(taken.sum() + donors.sum())
    return size * shape.width * rows + 2 * shape.patches, (each if each > 1 else 0) * int(
        taken.sum()
    ) * shape.width


def _require(condition: bool, spec: Spec, text: str) -> None:
    if not condition:
        raise Mismatch(f"{spec}: {text}; no time is shown")


def _close(actual: Tensor, expected: Tensor, quantity: str, spec: Spec, name: str) -> None:
    try:
        testing.assert_close(actual, expected, quantity)
    except AssertionError as error:
        raise Mismatch(f"{spec}: {name}: {error}; no time is shown") from error
