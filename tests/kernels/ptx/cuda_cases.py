"""What of the CUDA C++ ops runs in the machine: every kernel that nvcc made of csrc/cuda, and what stresses it.

Every instance of a template in both of its ways, functional and in place, aligned so that whole vectors move and not;
then sizes, masks, donors and layouts that are seldom. Numbers are moved, or added in one order, so bits are compared.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from lbdt import ops
from lbdt.testing import layouts
from tests.kernels.cuda_inputs import numbering, replacement
from tests.layouts import misaligned

HALF, BRAIN, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
_replace = importlib.import_module("lbdt.ops.replace_patches")


class Call(NamedTuple):
    """An internal op and its arguments by position; what it writes, all tensors that it sees, and what is expected of
    those that it writes and of its arguments."""

    op: str
    given: list
    outputs: list[torch.Tensor]
    tensors: list[torch.Tensor]
    expected: list[torch.Tensor]


class CudaCase(NamedTuple):
    op: str
    """Public; a trailing underscore: in place."""
    inputs: Callable[[], dict]
    units: int = 1
    """Multiprocessors of the GPU, by which the host code shares out the work."""

    def call(self) -> Call:
        """Its inputs made anew, and what the reference makes of them."""
        return (_numbering if self.op == "patch_uniform" else _replacement)(self.op, self.inputs())


def _numbering(op: str, given: dict) -> Call:
    arguments = [given[name] for name in ("seeds", "timesteps", "halves")]
    out = torch.full((len(given["seeds"]), given["patches"]), torch.nan)
    expected = ops.patch_uniform(**given, backend="reference")
    tensors = [out, *arguments]
    return Call(f"{op}_cpp", [*arguments, out], tensors, tensors, [expected, *_copies(arguments)])


def _replacement(op: str, given: dict) -> Call:
    arguments = _replace._cpp_arguments(*given.values())
    expected, where = ops.replace_patches(**given, backend="reference")
    x, *others = (a for a in arguments if isinstance(a, torch.Tensor))
    replaced, kept = ~where, _copies(others)
    if op == "replace_patches_":
        tensors = [x, replaced, *others]
        expected = [expected.view(x.shape), where, *kept]
        return Call("replace_patches_cpp_", [*arguments, replaced], tensors, tensors, expected)
    out = torch.empty_like(x).fill_(torch.nan)
    tensors = [out, replaced, x, *others]
    expected = [expected.view(x.shape), where, x.clone(), *kept]
    return Call("replace_patches_cpp", [*arguments, out, replaced], tensors, tensors, expected)


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def _case(of: Callable[[torch.Tensor], torch.Tensor], place: str = "", units: int = 1, **about) -> CudaCase:
    """replace_patches, with `place` "_" in place, of the arguments that `about` says, with `of` x."""

    def inputs() -> dict:
        given = replacement(**about)
        return given | {"x": of(given["x"])}

    return CudaCase(f"replace_patches{place}", inputs, units)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)


def _shifted(x: torch.Tensor) -> torch.Tensor:
    return misaligned(x)["shifted"]


WAYS = {
    # Kernel and vectors or not: sizes of one tile, and of two, and how x lies.
    "planes": ({"H": 6, "W": 8, "d": 5}, {"B": 4, "H": 16, "W": 18, "d": 5}, _as_it_is),
    "planes one by one": ({"H": 5, "W": 7, "d": 5}, {"B": 4, "H": 17, "W": 17, "d": 3}, _as_it_is),
    "rows": ({"H": 5, "W": 7, "d": 16}, {"B": 1, "H": 17, "W": 17, "d": 16}, _channels_last),
    "rows one by one": ({"H": 5, "W": 7, "d": 7}, {"B": 1, "H": 17, "W": 17, "d": 7}, _channels_last),
}
# A kernel that moves bits is the same for all sources but the mean, and for both dtypes of 2 bytes.
KINDS = (
    *((HALF, "random", ""), (BRAIN, "row", "_"), (FLOAT, "nearest", ""), (FLOAT, "random", "_")),
    *((DOUBLE, "row", ""), (DOUBLE, "nearest", "_")),
    *((dtype, "mean", place) for dtype in (HALF, BRAIN, FLOAT, DOUBLE) for place in ("", "_")),
)


def _named(way: str, dtype: torch.dtype, source: str) -> str:
    return f"{way}, {str(dtype).removeprefix('torch.')}, {source}"


CUDA_CASES = {
    f"{_named(way, dtype, source)}{', in place' * bool(place)}": _case(
        of, place, **small, B=3, rate=0.1, bank=2, avoid=0.3 if place else None, dtype=dtype, source=source
    )
    for way, (small, _, of) in WAYS.items()
    for dtype, source, place in KINDS
}
CUDA_CASES |= {
    "one channel": _case(_as_it_is, d=1, B=1, H=3, W=5),
    "padding of 2, in place": _case(_as_it_is, "_", d=7, H=13, W=3, rate=0.05, padding=2),
    "padding beyond the grid": _case(_as_it_is, H=4, W=6, rate=0.1, padding=9),
    "one patch, from the bank, in place": _case(_as_it_is, "_", H=1, W=1, rate=2, bank=2),
    "one row, in place": _case(_channels_last, "_", B=1, H=1, W=9, rate=0.3, padding=0, source="row"),
    "one column": _case(_as_it_is, B=1, d=8, H=9, W=1, rate=0.3, padding=0, source="mean"),
    "empty mask": _case(_as_it_is, rate=0.0),
    "empty mask, in place": _case(_channels_last, "_", rate=0.0),
    "full mask, no bank": _case(_channels_last, rate=2.0),
    "full mask, no bank, in place": _case(_as_it_is, "_", rate=2.0),
    "few donors, in place": _case(_as_it_is, "_", rate=0.95, padding=0, source="mean"),
    "ties": _case(_channels_last, H=9, W=9, rate=0.5, padding=0, source="nearest"),
    "chunks of channels": _case(_as_it_is, units=2, d=24, H=16, W=16, rate=0.1),
    "tiles one after another": _case(_shifted, B=4, d=1, H=17, W=17, rate=0.03),
    "shared tiles, in place": _case(_as_it_is, "_", 2, B=1, d=5, H=20, W=28, rate=0.1, source="row"),
    "avoid all, in place": _case(_channels_last, "_", avoid=2.0, source="nearest"),
    "avoid all of some": _case(_shifted, units=2, avoid=0.8, rate=0.6, B=5, H=3, W=5, padding=0),
    "shifted, in place": _case(_shifted, "_", dtype=HALF, source="mean", bank=2),
    "shifted rows": _case(lambda x: _channels_last(x)[:, 1:], units=2, d=17, dtype=BRAIN),
    "padded channels": _case(lambda x: misaligned(x)["padded_channels"], units=2, dtype=DOUBLE),
    "padded tokens, in place": _case(lambda x: misaligned(x)["padded_tokens"], "_", dtype=BRAIN),
    "sliced": _case(lambda x: layouts(x)["sliced"], source="row"),
    "sliced, in place": _case(lambda x: layouts(x)["sliced"], "_", source="mean"),
    "transposed grid": _case(lambda x: layouts(x)["transposed_grid"], W=9, dtype=HALF),
    "patches, in place": _case(lambda x: layouts(x)["patches"], "_", dtype=HALF),
    "tokens": _case(lambda x: layouts(x)["tokens_view"], source="mean"),
    "one image for all": _case(lambda x: x[:1].expand(2, -1, -1, -1)),
    "several words a thread": _case(_as_it_is, B=1, d=1, H=91, W=92, rate=0.0005),
} | {
    f"uniform, {str(dtype).removeprefix('torch.')}": CudaCase(
        "patch_uniform", lambda dtype=dtype, patches=patches: numbering(dtype, patches)
    )
    for dtype, patches in (
        *((torch.int64, 1), (torch.int32, 35), (FLOAT, 256), (DOUBLE, 61), (HALF, 35), (BRAIN, 1)),
    )
}
# Several warps have words of the mask, and blocks go on to a second tile: every barrier keeps something apart, some of
# them only with patches to avoid, some only without.
MUTATED_CUDA = {
    f"tiles, {_named(way, dtype, source)}{', avoid' * bool(avoid)}": _case(
        of, **large, rate=0.03, avoid=avoid, dtype=dtype, source=source
    )
    for way, (_, large, of) in WAYS.items()
    for dtype, source in (
        *((HALF, "random"), (FLOAT, "random"), (DOUBLE, "random")),
        *((HALF, "mean"), (BRAIN, "mean"), (FLOAT, "mean"), (DOUBLE, "mean")),
    )
    for avoid in (0.1, None)
}
