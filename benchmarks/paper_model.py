"""What detect_patches would take on an H100 by arithmetic: its launches as Triton compiles them for sm_90, nothing run.

`python -m benchmarks.paper_model`: a Markdown table. Needs no GPU. From the machine code come the products, copies and
reads of shared memory a step, and the instructions around the loops; from the launcher grids and tiles; from `GPU` the
machine; from results/early-stop.json how many patches are candidates where a concept is shown and where it is not, and
how many latents it takes to refute one; from results/screen-bounds.json how many of them the int8 screen leaves
undecided, and how many latents between their bounds. A step takes as long as the slowest of products, L2, shared memory
and issue; Triton waits for int8 products before it issues anything else, so of these both are added. Steps do not
overlap with what lies around them, and tiles go in waves. The floor is what one product a survivor and latent in half
precision takes at the peak, or reading the dictionary once. What the launches themselves take, clocks that fall, early
stops and other work on the device are left out.
"""

import argparse
import json
import re
from math import ceil
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from tests.kernels import launches, sass

EARLY_STOP = Path(__file__).parent / "results/early-stop.json"
BOUNDS = Path(__file__).parent / "results/screen-bounds.json"
FIRED = "by firing counts (the shipped dictionary)"
FINITE = 79 / 137
"""Share of a union's columns whose threshold is finite at a timestep: 20 concepts, the embedded eraser 'saeuron'."""


class GPU(NamedTuple):
    """An H100 SXM; rates are bytes or clocks."""

    multiprocessors: int = 132
    clock: float = 1.75e9
    products: int = 4096
    """Half-precision operations a clock and multiprocessor, two a multiplication; of int8 there are twice as many."""
    hbm: float = 3.35e12
    l2: float = 5.5e12
    """What all multiprocessors together read; no data sheet has it, so it is an assumption."""
    shared: int = 128
    """Bytes a clock and multiprocessor."""
    issued: int = 4
    """Instructions of a warp a clock and multiprocessor."""
    trip: int = 700
    """Clocks until a load that others wait for is there."""


class Loop(NamedTuple):
    """A step of the loop over channels, for a tile of BLOCK_P patches or survivors."""

    products: int
    """Clocks of the tensor cores."""
    copied: int
    """Bytes from L2."""
    read: int
    """Bytes that the products read from shared memory."""
    instructions: int
    """Instructions of a warp."""
    bytewise: bool = False
    """Whether it multiplies int8."""


class Case(NamedTuple):
    name: str
    batch: int
    side: int
    latents: int
    k: int
    kind: str
    """The embedded eraser whose shares are taken."""
    layout: str = "NCHW"
    union: int = 2

    @property
    def update(self) -> bool:
        return self.kind == "sdxl"

    @property
    def rows(self) -> int:
        return self.batch * self.side * self.side


CHANNELS, STEP = 1280, 64
_SD15 = Case("SD 1.5, 512 rows", 2, 16, 20480, 32, "saeuron")
_SDXL = Case("SDXL update, 512 rows", 2, 16, 5120, 10, "sdxl")
CASES = (
    _SD15,
    _SD15._replace(layout="channels_last"),
    _SD15._replace(layout="[B, d, N]"),
    _SD15._replace(union=34),
    _SD15._replace(union=137),
    _SD15._replace(name="SD 1.5, 4096 rows", batch=16, union=34),
    _SDXL,
    _SDXL._replace(layout="channels_last", union=34),
    _SDXL._replace(name="SDXL update, 2048 rows", side=32),
)


def record(case: Case, gpu: GPU, screened: bool) -> list[launches.Launch]:
    """The launches of a case as they would be made on `gpu`."""
    from lbdt.kernels import _screen, detect_patches

    x = torch.empty(case.batch, CHANNELS, case.side, case.side, dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last) if case.layout == "channels_last" else x
    x = x.flatten(2) if case.layout == "[B, d, N]" else x
    given = {
        "x": x,
        "weight": torch.empty(case.latents, CHANNELS, dtype=torch.float16),
        "bias": torch.empty(case.latents),
        "latents": torch.empty(case.union, dtype=torch.int64),
        "thresholds": torch.empty(50, case.union),
        "timestep_bin": torch.empty(case.batch, dtype=torch.int64),
        "enabled": torch.empty(case.batch, case.union, dtype=torch.bool),
        "k": case.k,
        "minus": torch.empty_like(x) if case.update else None,
    }
    if screened:
        given["codes"] = torch.empty(case.latents, CHANNELS, dtype=torch.int8)
        given["bounds"], given["centre"] = torch.empty(6, case.latents), torch.empty(CHANNELS)

    def programs(device, each):
        return gpu.multiprocessors * each

    # A screen of however few rows, to see from where on it pays.
    screen = mock.patch.multiple(_screen, programs=programs, LEAST_ROWS=1)
    with screen, mock.patch.object(detect_patches, "programs", programs):
        return launches.record("detect_patches", 90, **given)[0]


def machine_code(launch: launches.Launch) -> tuple[list[Loop], int]:
    """The loops over channels that are loops in the machine code, the largest product first, and how many instructions
    there are around them."""
    code = sass.disassembled(launches.compile_launch(launch, 90)[0].asm["cubin"])
    warps, spans, loops = launch.kwargs["num_warps"], [], []
    for address, text in code:
        if found := re.search(r"\bBRA(?:\.\w+)* (?:\w+, )?0x([0-9a-f]+)", text):
            spans += [(int(found[1], 16), address)] if int(found[1], 16) < address else []
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    around = len(code)
    for begin, end in inner:
        body = [text for at, text in code if begin <= at <= end]
        widths = [int(n) for text in body for n in re.findall(r"[HI]GMMA\.64x(\d+)x(?:16|32)", text)]
        if len(widths) < STEP // 16:
            continue
        around -= len(body)
        copies = sum("LDGSTS" in text and ".128" in text for text in body)
        loops.append(
            Loop(
                products=sum(widths) // 2 * warps // 4,
                copied=copies * 16 * 32 * warps,
                read=sum((64 + width) * 32 for width in widths) * warps // 4,
                instructions=len(body),
                bytewise=any("IGMMA" in text for text in body),
            )
        )
    return sorted(loops, reverse=True), around


def shares(case: Case, prefix: int) -> dict[str, tuple[float, float]]:
    """Candidates, and those that are left after the prefix, as shares of all patches.

    What is read to refute a candidate was counted in the SAE's own order, with a dictionary of another k: it is brought
    to the firing order by the means of both, and to this k in proportion to it.
    """
    (row,) = (r for r in json.loads(EARLY_STOP.read_text())["kinds"] if r["kind"] == case.kind)
    result = {"0 %": (0.0, 0.0), "100 %": (1.0, 1.0)}
    for name in ("absent", "present"):
        part = row[name]
        own, fired = part["mean_read"]["as the SAE numbers them"], part["mean_read"][FIRED]
        depths = [depth * fired / own * case.k / row["k"] for depth in part["read_tenths"]]
        refuted = (part["candidates"] - part["detected"]) / part["patches"]
        left = sum(depth > prefix for depth in depths) / len(depths)
        result[name] = (
            part["candidates"] / part["patches"],
            part["detected"] / part["patches"] + refuted * left,
        )
    return result


def first_launch(case: Case, launch: launches.Launch, around: int, candidates: float, left: float, gpu: GPU):
    """Seconds."""
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    patches, streams = given["BLOCK_P"], 2 if case.update else 1
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    a_multiprocessor = ceil(programs / gpu.multiprocessors)
    delivered = gpu.l2 / gpu.clock / min(programs, gpu.multiprocessors)
    finite = case.union if case.union == 2 else ceil(case.union * FINITE)
    tiles = {given["BLOCK_U"]: ceil(finite / given["BLOCK_U"])}
    trips = 5 + sum(tiles.values())
    if candidates:
        counted = ceil(ceil(given["prefix"] / given["BLOCK_L"]) / launch.grid[2])
        tiles[given["BLOCK_L"]] = tiles.get(given["BLOCK_L"], 0) + counted
        trips += counted + 4
    clocks = 0.0
    for latents, count in tiles.items():
        copied = (latents + patches * streams) * STEP * 2
        products = latents * patches * STEP * 2 * streams / gpu.products
        clocks += count * CHANNELS / STEP * max(products, copied / delivered)
    if left:
        rounds = ceil(CHANNELS * streams / (4 * given["BLOCK_D"]))
        trips += rounds
        clocks += 2 * patches * CHANNELS * 2 * streams / delivered / launch.grid[2]
    clocks += around * launch.kwargs["num_warps"] / gpu.issued
    return (clocks * a_multiprocessor + trips * gpu.trip) / gpu.clock


def walk(loop: Loop, tiles: int, steps: float, around: float, warps: int, gpu: GPU) -> float:
    """Seconds of a launch over so many tiles of so many steps, with `around` instructions of a warp about each."""
    seconds, left = gpu.trip / gpu.clock, tiles
    while left > 0:
        active = min(left, gpu.multiprocessors)
        delivered = gpu.l2 / gpu.clock / active
        issue = loop.instructions * warps / gpu.issued
        step = max(
            loop.products + issue * loop.bytewise,
            loop.copied / delivered,
            (loop.copied + loop.read) / gpu.shared,
            issue,
        )
        seconds += (steps * step + 3 * gpu.trip + around * warps / gpu.issued) / gpu.clock
        left -= active
    return seconds


def second_launch(
    case: Case, launch: launches.Launch, code: tuple[list[Loop], int], survivors: int, gpu: GPU
) -> dict:
    """The count without a screen, or with one of a few survivors: seconds, bytes and waves."""
    loops, around = code
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    wide = survivors > given["FEW_P"]
    loop = loops[0] if wide else loops[-1]
    p, latents = (given["MANY_P"], given["MANY_L"]) if wide else (given["FEW_P"], given["FEW_L"])
    rest, streams = case.latents - given["prefix"], 2 if case.update else 1
    tiles = ceil(survivors / p) * ceil(rest / latents)
    steps = CHANNELS / STEP * streams
    # What lies around the loops belongs to either tile.
    seconds = walk(loop, tiles, steps, around / len(loops), launch.kwargs["num_warps"], gpu)
    hbm = rest * CHANNELS * 2 if survivors else 0
    products = 2.0 * survivors * rest * CHANNELS
    peak = gpu.products * gpu.multiprocessors * gpu.clock
    return {
        "seconds": max(seconds, hbm / gpu.hbm),
        "floor": max(products / peak, hbm / gpu.hbm),
        "waves": tiles / gpu.multiprocessors,
        "l2": tiles * steps * loop.copied / 1e6,
        "hbm": hbm / 1e6,
    }


def open_pairs(case: Case, rest: int) -> tuple[float, float]:
    """The share of candidates that bounds leave undecided, and the latents between the bounds of one, of a dictionary
    behind the prefix as large as `rest`: in proportion to those of the embedded eraser."""
    (row,) = (r for r in json.loads(BOUNDS.read_text())["kinds"] if r["kind"] == case.kind)
    total = next(r["latents"] for r in json.loads(EARLY_STOP.read_text())["kinds"] if r["kind"] == case.kind)
    found = row["centres"]["b_dec"]
    return found["undecided"], found["between"] * rest / total


def code_launch(launch: launches.Launch, length: int, survivors: int, gpu: GPU) -> float:
    """Seconds of coding survivors, in `length` instructions of a warp."""
    given, warps = launch.kwargs, launch.kwargs["num_warps"]
    programs = ceil(survivors / given["BLOCK_P"])
    a_program, a_multiprocessor = ceil(programs / launch.grid[0]), ceil(programs / gpu.multiprocessors)
    issued = length * warps / gpu.issued * a_multiprocessor
    copied = survivors * CHANNELS * 2 * given["PARTS"] / gpu.l2
    return (gpu.trip * (1 + 2 * a_program) + issued) / gpu.clock + copied


def pairs_launch(
    case: Case, launch: launches.Launch, length: int, candidates: float, survivors: int, gpu: GPU
) -> float:
    """Seconds of counting pairs, `length` instructions of a warp for each 64 of them; their survivors' rows stay in
    L1."""
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    rest = case.latents - given["prefix"]
    share, between = open_pairs(case, rest)
    undecided = min(share * candidates, survivors)
    blocks = ceil(survivors / given["BLOCK_P"])
    parts = max(1, launch.grid[0] // blocks)
    a_program = ceil(blocks * parts / launch.grid[0])
    # Of a block's undecided survivors 8 at a time, of a part's words 32, of the pairs in these 64.
    groups = ceil(undecided / blocks / 8) * ceil(ceil(rest / 32) / parts / 32)
    rounds = groups * max(ceil(undecided * between / blocks / parts / max(groups, 1) / 64), 1)
    trips = 2 + a_program * (groups + rounds * (3 + ceil(CHANNELS / given["BLOCK_C"])))
    issued = a_program * rounds * length * launch.kwargs["num_warps"] / gpu.issued
    issued *= launch.grid[0] / gpu.multiprocessors
    copied = undecided * between * CHANNELS * 2 / gpu.l2
    return max((trips * gpu.trip + issued) / gpu.clock, copied)


def screened_launches(
    case: Case,
    made: list[launches.Launch],
    codes: list[tuple[list[Loop], int]],
    candidates: float,
    survivors: int,
    gpu: GPU,
) -> dict:
    """`second_launch` for the four launches with a screen, of which `codes` are the machine code."""
    coding, screen, pairs, count = made
    given = dict(zip(screen.kernel.arg_names, screen.args, strict=False)) | screen.kwargs
    exact = second_launch(case, count, codes[3], survivors, gpu)
    if survivors <= given["unscreened"]:
        return exact | {"seconds": exact["seconds"] + 3 * gpu.trip / gpu.clock}
    ((loop,), around), warps = codes[1], screen.kwargs["num_warps"]
    rest = case.latents - given["prefix"]
    tiles = ceil(survivors / given["BLOCK_P"]) * ceil(rest / given["BLOCK_L"])
    steps = CHANNELS / given["BLOCK_D"]
    seconds = max(walk(loop, tiles, steps, around, warps, gpu), rest * CHANNELS / gpu.hbm)
    seconds += code_launch(coding, codes[0][1], survivors, gpu)
    seconds += pairs_launch(case, pairs, codes[2][1], candidates, survivors, gpu)
    # The last launch looks whether there is anything left for it.
    seconds += 2 * gpu.trip / gpu.clock
    return exact | {
        "seconds": seconds,
        "waves": tiles / gpu.multiprocessors,
        "l2": tiles * steps * loop.copied / 1e6,
        "hbm": rest * CHANNELS / 1e6,
    }


def lines(cases: tuple[Case, ...], gpus: tuple[GPU, ...]) -> list[str]:
    """A Markdown table; times and ratios for each of the machines."""
    table = [
        "| case | layout | U | patches | candidates | left | first, us | count, us | screened, us | waves | L2, MB "
        "| HBM, MB | floor, us | count / floor | screened / floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        first, second = record(case, gpus[0], screened=False)
        _, *made = record(case, gpus[0], screened=True)
        around = machine_code(first)[1]
        code, codes = machine_code(second), [machine_code(launch) for launch in made]
        prefix = dict(zip(first.kernel.arg_names, first.args, strict=False))["prefix"]
        for name, (candidates, left) in shares(case, prefix).items():
            survivors, some = round(left * case.rows), candidates * case.rows
            begin = [first_launch(case, first, around, candidates, left, gpu) for gpu in gpus]
            counts = [second_launch(case, second, code, survivors, gpu) for gpu in gpus]
            screened = [screened_launches(case, made, codes, some, survivors, gpu) for gpu in gpus]
            table.append(
                f"| {case.name} | {case.layout} | {case.union} | {name} | {round(some)} | {survivors} "
                f"| {_times(begin)} | {_times([c['seconds'] for c in counts])} "
                f"| {_times([c['seconds'] for c in screened])} | {screened[0]['waves']:.2f} "
                f"| {screened[0]['l2']:.0f} | {screened[0]['hbm']:.0f} | {counts[0]['floor'] * 1e6:.1f} "
                f"| {_ratios(counts)} | {_ratios(screened)} |"
            )
    return table


def _times(seconds: list[float]) -> str:
    return " / ".join(f"{each * 1e6:.1f}" for each in seconds)


def _ratios(counts: list[dict]) -> str:
    if not counts[0]["floor"]:
        return "-"
    return " / ".join(f"{c['seconds'] / c['floor']:.2f}" for c in counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--l2", type=float, nargs="+", default=[5.5, 7.5], help="TB/s that L2 delivers")
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of them")
    given = parser.parse_args()
    print("\n".join(lines(CASES[: given.cases], tuple(GPU(l2=each * 1e12) for each in given.l2))))


if __name__ == "__main__":
    main()
