"""What a result has to say about the machine, and what the machine can do at best."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lbdt
from lbdt.bench.shapes import Shape

ROOT = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, commit, device, threads, and how busy the machine is before anything is timed."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "versions": {
            "lbdt": lbdt.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "diffusers": _version("diffusers"),
            "python": platform.python_version(),
            "mkl": torch.backends.mkl.is_available(),
            "cuda": torch.version.cuda,
            "driver": _driver() if device.type == "cuda" else None,
        },
        "device": cuda(device) if device.type == "cuda" else cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def cpu() -> dict[str, str]:
    """The kernel's description of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {"type": "cpu", "name": platform.processor() or platform.machine()}
    lines = dict(re.findall(r"^(.+?)\s*: (.*)$", text.partition("\n\n")[0], flags=re.MULTILINE))
    known = {key: lines[key] for key in ("cpu family", "model", "stepping") if key in lines}
    return {"type": "cpu", "name": lines.get("model name") or platform.machine()} | known


def has_vnni() -> bool:
    """Whether the CPU multiplies int8 numbers four at a time, which the targets of large shares count on."""
    try:
        return bool(
            re.search(r"^flags.*\bavx(512)?_vnni\b", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        )
    except OSError:
        return False


def cuda(device: torch.device) -> dict[str, Any]:
    """The driver's description of the GPU; `memory` in bytes."""
    found = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory": found.total_memory,
        "multiprocessors": found.multi_processor_count,
    }


def slug(device: dict[str, Any]) -> str:
    """The device's name for a file, e.g. "cpu-intel-xeon-processor-6-143", "nvidia-h100-80gb-hbm3"."""
    words = re.sub(r"\((r|tm)\)|@.*", "", device["name"].lower())
    parts = ["cpu"] * (device["type"] == "cpu") + [words]
    parts += [device[key] for key in ("cpu family", "model") if key in device]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts)).strip("-")


def limits(device: torch.device, dtype: torch.dtype, shape: Shape, quick: bool) -> dict[str, Any]:
    """Bytes and operations per second that a plain pass over memory and a plain product reach, each at its
    best."""
    if device.type == "cuda":
        megabytes, sizes = (64, (1024,) * 3) if quick else (1024, (8192,) * 3)
    else:
        megabytes, sizes = 32 if quick else 512, (shape.patches, shape.width, shape.latents)
    return {
        "bytes_per_second": bandwidth(device, megabytes),
        "bandwidth_buffer_mb": megabytes,
        "flops_per_second": gemm_rate(*sizes, device, dtype),
        "product": list(sizes),
    }


def bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes per second of the quickest pass over a buffer of this size: a read on the CPU, a copy on a
    GPU."""
    data = torch.ones(megabytes * 2**18, device=device)
    if device.type == "cuda":
        target = torch.empty_like(data)
        return 2 * data.numel() * 4 / _quickest(lambda: target.copy_(data), 20, device)
    return data.numel() * 4 / _quickest(data.sum, 7, device)


def gemm_rate(rows: int, width: int, columns: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of the quickest `[rows, width] @ [width, columns]`."""
    a = torch.randn(rows, width, device=device, dtype=dtype)
    b = torch.randn(columns, width, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    rounds = 20 if device.type == "cuda" else 5
    return 2 * rows * width * columns / _quickest(lambda: torch.mm(a, b.t(), out=out), rounds, device)


def peaks(function: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Bytes that torch allocates at most during a call, and that the process becomes larger by (CPU only)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(device) - before,
            "resident_bytes": None,
        }
    allocated: list[int] = []
    resident = resident_peak(lambda: allocated.append(allocated_peak(function)))
    return {
        "allocated_bytes": allocated[0] if allocated else allocated_peak(function),
        "resident_bytes": resident,
    }


def allocated_peak(function: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator holds at most during a call, above what it held before."""
    # Read at the first profile of the process, which otherwise writes two lines of its own to stderr at
    # every one.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
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


def _quickest(function: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """Seconds of the quickest of `rounds` calls."""
    best = float("inf")
    for _ in range(rounds + 1):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.split() or [None])[0] if done.returncode == 0 else None


def _git(*arguments: str) -> str:
    """git's answer in the checkout; empty in an installed package, which may lie inside another checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
