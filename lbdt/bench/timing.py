"""Clocks: versions of one computation in turn on one device, with cold caches (always on a GPU, on a CPU where asked
for), and CUDA-graph replay."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SLICE = 0.01
"""Seconds of one measurement on the CPU: shorter calls are repeated and averaged."""
_REPLAYED = 20
"""Calls in one graph whose replay is averaged."""
_LEAST_ROUNDS = 3
_ANY_CACHE = 1 << 26
"""Bytes assumed of a last-level cache where Linux names none."""


def in_turn(
    versions: dict[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    budget: float,
    cold: bool = False,
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each version, one after the other in every round; `budget` seconds may end the rounds
    early. `cold`: on a CPU the last-level cache is read full of something else before each call, too.

    The first version comes last in a round, after the others have been through the caches, as the denoiser's
    blocks would have. Every version has run before (a warm-up is not made here).
    """
    clock = CudaClock(device) if device.type == "cuda" else ColdCpuClock() if cold else CpuClock()
    once = {name: clock(function, 1) for name, function in versions.items()}
    repeats = {name: clock.repeats(seconds) for name, seconds in once.items()}
    spent = sum(max(once[name] * repeats[name], 1e-9) for name in versions)
    rounds = max(_LEAST_ROUNDS, min(rounds, int(budget / spent)))
    times: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(rounds):
        for name in reversed(versions):
            times[name].append(clock(versions[name], repeats[name]))
    return {
        name: {"rounds": rounds, "repeats": repeats[name], "ms": milliseconds(values)}
        for name, values in times.items()
    }


class CpuClock:
    """Wall time of a call."""

    def __call__(self, function: Callable[[], Any], repeats: int) -> float:
        """Seconds of one call, the mean of `repeats`."""
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats

    def repeats(self, seconds: float) -> int:
        """Calls that fill one measurement."""
        return max(1, int(_SLICE / max(seconds, 1e-7)))


class ColdCpuClock:
    """Wall time of a call that finds none of its inputs in a cache: a buffer of four times the last level is written
    and read before it, by as many threads as the call has."""

    def __init__(self) -> None:
        self._other = torch.zeros(4 * last_level_cache(), dtype=torch.uint8)

    def __call__(self, function: Callable[[], Any], repeats: int) -> float:
        """Seconds of one call, the mean of `repeats`; the caches are overwritten before each."""
        total = 0.0
        for _ in range(repeats):
            self._other.add_(1)
            start = time.perf_counter()
            function()
            total += time.perf_counter() - start
        return total / repeats

    def repeats(self, seconds: float) -> int:
        """Always one: a round is as long as the overwriting, whatever the call."""
        return 1


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the first core's largest cache; 64 MiB where Linux names none."""
    sizes = []
    for path in folder.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)\s*", path.read_text())
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=_ANY_CACHE)


class CudaClock:
    """Time between two events around a call that finds the L2 cache overwritten.

    It holds the host's part too where the host is slower than the device: many short kernels, or a sync.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 1 << 26
        self._other = torch.empty(4 * size, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any], repeats: int) -> float:
        """Seconds of one call, the mean of `repeats`; the cache is overwritten before each."""
        total = 0.0
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._other.zero_()
            start.record()
            function()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end)
        return total / repeats / 1e3

    def repeats(self, seconds: float) -> int:
        """Always one: a second call would find the caches warm."""
        return 1


def graph(function: Callable[[], Any], device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of a call that is replayed from a CUDA graph.

    "cold": one call, its own launch included, on an overwritten L2 cache. "warm": one of 20 calls in one graph,
    as inside the graph of a denoiser. {"error": text} where it cannot be captured.
    """
    stream = torch.cuda.current_stream(device)
    try:
        cold, warm = _captured(function, device, 1), _captured(function, device, _REPLAYED)
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # torch.cuda.graph leaves its own one behind when a capture fails
        torch.cuda.synchronize(device)
        return {"error": str(error).splitlines()[0]}
    clock = CudaClock(device)
    for replay in (cold.replay, warm.replay):
        replay()
    return {
        "cold": milliseconds([clock(cold.replay, 1) for _ in range(rounds)]),
        "warm": milliseconds([clock(warm.replay, 1) / _REPLAYED for _ in range(rounds)]),
    }


def _captured(function: Callable[[], Any], device: torch.device, calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # allocations and compilations of the first calls are not for the graph
        for _ in range(3):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        for _ in range(calls):
            function()
    return made


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median, fifths and extremes of at least two times."""
    values = sorted(1e3 * s for s in seconds)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {
        "median": statistics.median(values),
        "p20": fifths[0],
        "p80": fifths[3],
        "least": values[0],
        "most": values[-1],
    }
