"""What a result has to say about the machine, and what the machine can do at best."""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lbdt

ROOT = Path(__file__).resolve().parents[1]


def describe() -> dict[str, Any]:
    """Versions, commit, CPU, threads, and how busy the machine is before anything is timed."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": {
            "lbdt": lbdt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "mkl": torch.backends.mkl.is_available(),
        },
        "device": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def cpu() -> dict[str, str]:
    """The kernel's description of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"name": platform.processor() or platform.machine()}
    lines = dict(re.findall(r"^(.+?)\s*: (.*)$", text.partition("\n\n")[0], flags=re.MULTILINE))
    name = lines.get("model name") or platform.machine()
    return {"name": name} | {key: lines[key] for key in ("cpu family", "model", "stepping") if key in lines}


def slug(device: dict[str, str]) -> str:
    """The CPU's name for a file, e.g. "intel-xeon-processor-6-143"."""
    words = re.sub(r"\((r|tm)\)|@.*", "", device["name"].lower())
    parts = [words, *(device[key] for key in ("cpu family", "model") if key in device)]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts)).strip("-")


def read_bandwidth(megabytes: int) -> float:
    """Bytes per second of the quickest pass that reads a buffer of this size once."""
    data = torch.ones(megabytes * 2**18)
    return data.numel() * 4 / _quickest(data.sum, 7)


def gemm_rate(rows: int, width: int, columns: int) -> float:
    """Floating point operations per second of the quickest `[rows, width] @ [width, columns]` in float32."""
    a, b = torch.randn(rows, width), torch.randn(columns, width)
    out = torch.empty(rows, columns)
    return 2 * rows * width * columns / _quickest(lambda: torch.mm(a, b.t(), out=out), 5)


def allocated_peak(function: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator holds at most during a call, above what it held before."""
    with torch.profiler.profile(profile_memory=True) as record:
        function()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def resident_peak(function: Callable[[], Any]) -> int | None:
    """Bytes by which the process' resident memory rises at most during a call; None where Linux cannot say.

    Blocks below malloc's threshold (32 MB at most) that an earlier call left behind do not count.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    except OSError:
        return None
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(found[1]) * 1024


def _quickest(function: Callable[[], Any], rounds: int) -> float:
    function()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
