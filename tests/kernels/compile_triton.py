"""Compiles every Triton kernel ahead of time, as its launcher would launch it.

Needs no GPU: the launchers run on CPU tensors of real sizes (`tests.kernels.launches`). Prints one JSON object a line:
resources, instructions, and the case. `python -m tests.kernels.compile_triton ARCH [CASE...]`; "budgets" names those of
`tests.kernels.budgets`.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.nvidia import compiler

from tests.kernels import budgets, sass
from tests.kernels.launches import Launch, compile_launch, record

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
FLAGS = ("-lineinfo", *(("--regAllocOptLevel=2",) if VERSION >= (3, 9) else ()))
"""What `CUDABackend.make_cubin` hands to ptxas: registers and spills depend on it."""


def measured(launch: Launch, arch: int, name: str) -> dict:
    """Resources and instructions of one launch's machine code; more where the case `name` has budgets."""
    # Only of sm_90 the machine code itself is read; for the others ptxas runs once, in `resources`.
    with contextlib.nullcontext() if arch == 90 else without_machine_code():
        compiled, _ = compile_launch(launch, arch)
    ptx, warps = compiled.asm["ptx"], launch.kwargs["num_warps"]
    registers, spilled, serialised = resources(ptx, arch)
    result = {
        "registers": registers,
        "spilled": spilled,
        "serialised": serialised,
        "shared": compiled.metadata.shared,
        "warps": warps,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync|\btcgen05\.mma", ptx)),
        "cp_async": len(re.findall(r"\bcp\.async\b(?!\.(?:wait|commit))", ptx)),
    }
    if arch != 90 or name not in budgets.CASES:
        return result
    code = sass.read(sass.disassembled(compiled.asm["cubin"]))
    return result | code._asdict() | {"blocks": sass.blocks(registers, warps, compiled.metadata.shared)}


@contextlib.contextmanager
def without_machine_code():
    """Triton stops at PTX, and keeps that where no launch will look."""
    with (
        triton.knobs.cache.scope(),
        mock.patch.object(compiler.CUDABackend, "make_cubin", lambda *args, **kwargs: b""),
    ):
        triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "without-machine-code")
        yield


def resources(ptx: str, arch: int) -> tuple[int, int, bool]:
    """Registers a thread, bytes spilled, and whether products wait for each other, in ptxas' own words."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"^\.target (\w+)", ptx, flags=re.MULTILINE)[1]
        command = [compiler.get_ptxas(arch).path, "-v", *FLAGS, f"--gpu-name={target}", file.name]
        told = subprocess.run(
            [*command, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", told))
    return int(re.search(r"Used (\d+) registers", told)[1]), spilled, "are serialized" in told


def detection(batch, channels, side, latents, union, k, dtype, layout, update) -> dict:
    x = torch.empty(batch, channels, side, side, dtype=dtype).to(memory_format=layout)
    return {
        "x": x,
        "weight": torch.empty(latents, channels, dtype=dtype),
        "bias": torch.empty(latents),
        "latents": torch.empty(union, dtype=torch.int64),
        "thresholds": torch.empty(50, union),
        "timestep_bin": torch.empty(batch, dtype=torch.int64),
        "enabled": torch.empty(batch, union, dtype=torch.bool),
        "k": k,
        "minus": torch.empty_like(x) if update else None,
    }


def screened(**about) -> dict:
    given = detection(**about)
    latents, channels = given["weight"].shape
    codes = torch.empty(latents, channels, dtype=torch.int8)
    return given | {
        "codes": codes,
        "bounds": torch.empty(6, latents),
        "centre": torch.empty(channels),
    }


def gated(concepts: int, **about) -> dict:
    given = detection(**about)
    return given | {
        "owners": torch.empty(about["union"], dtype=torch.int64),
        "least": torch.empty(50, concepts, dtype=torch.int64),
        "least_of": given["x"].shape[2:].numel(),
        "deciding": torch.empty(about["batch"], dtype=torch.int64),
        "gated": torch.empty(about["batch"], dtype=torch.int64),
    }


def over_calls(concepts: int, **about) -> dict:
    sums = torch.empty(about["batch"], concepts + 1, dtype=torch.int64)
    return gated(concepts, **about) | {"so_far": sums}


def encoding(batch, channels, side, latents, k, dtype, layout) -> dict:
    return {
        "x": torch.empty(batch, channels, side, side, dtype=dtype).to(memory_format=layout),
        "weight": torch.empty(latents, channels, dtype=dtype),
        "bias": torch.empty(latents),
        "k": k,
    }


def step(given: dict, timesteps: torch.dtype, concepts: int = 0, over_calls: bool = False) -> dict:
    """Arguments of erase_step from those of `detection`."""
    x, union = given["x"], given["enabled"].shape[1]
    batch, channels, height, width = x.shape
    kept = {name: given[name] for name in ("x", "weight", "bias", "latents", "thresholds", "k", "minus")}
    whole = {"dtype": torch.int64}
    return kept | {
        "timesteps": torch.empty(batch, dtype=timesteps),
        "times": torch.empty(50),
        "enabled": torch.empty(1, union, dtype=torch.bool),
        "seeds": torch.empty(1, **whole),
        "images": max(batch // 2, 1),
        "height": height,
        "width": width,
        "sizes": 2**45,
        "rows": torch.empty(1 << 16, 5 + (concepts > 0), **whole),
        "cells": torch.empty(0, dtype=torch.uint8),
        "written": torch.empty(2, **whole),
        **dict.fromkeys(("bank", "known_latents", "known_thresholds")),
        "padding": 1,
        "source": "random",
        "owners": torch.empty(union, **whole) if concepts else None,
        "least": torch.empty(50, concepts, **whole) if concepts else None,
        "least_of": height * width,
        "cond": 1 if concepts else -1,
        "counted": -1,
        "schedule": torch.empty(50, dtype=timesteps) if concepts else None,
        "first": 0,
        "last": 50,
        "run_sums": torch.empty(64, concepts + 1, **whole) if over_calls else None,
        "run_last": torch.empty(64) if over_calls else None,
        "run_count": torch.empty((), **whole) if over_calls else None,
        "whole_calls": True,
        **dict.fromkeys(("codes", "bounds", "centre")),
        "replace": lambda x, mask, *others: (x, mask),
    }


NCHW, NHWC = torch.contiguous_format, torch.channels_last
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
SD15 = {"channels": 1280, "side": 16, "latents": 20480, "k": 32}
SDXL = {"channels": 1280, "side": 32, "latents": 5120, "k": 10}
CASES = {
    "detect_patches sd15-b1 NCHW float16": lambda: detection(
        **SD15, batch=2, union=2, dtype=HALF, layout=NCHW, update=False
    ),
    "detect_patches sd15-b1 channels_last bfloat16": lambda: detection(
        **SD15, batch=2, union=2, dtype=BRAIN, layout=NHWC, update=False
    ),
    "detect_patches sd15-b1 NCHW float32": lambda: detection(
        **SD15, batch=2, union=2, dtype=FLOAT, layout=NCHW, update=False
    ),
    "detect_patches sd15-b8 NCHW float16": lambda: detection(
        **SD15, batch=16, union=64, dtype=HALF, layout=NCHW, update=False
    ),
    "detect_patches sd15-b8 channels_last float32": lambda: detection(
        **SD15, batch=16, union=64, dtype=FLOAT, layout=NHWC, update=False
    ),
    "detect_patches gated sd15-b8 NCHW float16": lambda: gated(
        9, **SD15, batch=16, union=64, dtype=HALF, layout=NCHW, update=False
    ),
    "detect_patches gated over calls bfloat16": lambda: over_calls(
        9, **SD15, batch=16, union=64, dtype=BRAIN, layout=NHWC, update=False
    ),
    "detect_patches gated ones": lambda: gated(
        1, **SD15 | {"side": 1, "k": 1}, batch=1, union=1, dtype=HALF, layout=NCHW, update=False
    ),
    "detect_patches sdxl-1024 update bfloat16": lambda: detection(
        **SDXL, batch=2, union=40, dtype=BRAIN, layout=NCHW, update=True
    ),
    "detect_patches sdxl-1024 update float32": lambda: detection(
        **SDXL, batch=2, union=40, dtype=FLOAT, layout=NCHW, update=True
    ),
    "detect_patches screened sd15-b8 NCHW float16": lambda: screened(
        **SD15, batch=16, union=64, dtype=HALF, layout=NCHW, update=False
    ),
    "detect_patches screened sdxl-1024 update bfloat16": lambda: screened(
        **SDXL, batch=2, union=40, dtype=BRAIN, layout=NCHW, update=True
    ),
    "encode_topk sd15-b8 NCHW float16": lambda: encoding(**SD15, batch=16, dtype=HALF, layout=NCHW),
    "encode_topk sdxl-1024 channels_last bfloat16": lambda: encoding(
        **SDXL, batch=2, dtype=BRAIN, layout=NHWC
    ),
    "encode_topk sd15-b1 NCHW float32": lambda: encoding(**SD15, batch=2, dtype=FLOAT, layout=NCHW),
    "encode_topk k 256": lambda: encoding(**SD15 | {"k": 256}, batch=2, dtype=HALF, layout=NCHW),
    "record_patches": lambda: {
        "mask": torch.empty(2, 256, dtype=torch.bool),
        "replaced": torch.empty(2, 256, dtype=torch.bool),
        "timesteps": torch.empty(2),
        "sizes": 2**45,
        "rows": torch.empty(1 << 16, 6, dtype=torch.int64),
        "cells": torch.empty(1 << 22, dtype=torch.uint8),
        "written": torch.empty(2, dtype=torch.int64),
        "sums": torch.empty(2, 256),
        "gated": torch.empty(2, dtype=torch.int64),
    },
    # Integers that are 1 become constants, which are typed otherwise.
    "detect_patches ones": lambda: detection(
        **SD15 | {"side": 1, "k": 1}, batch=1, union=1, dtype=HALF, layout=NCHW, update=False
    ),
    "encode_topk ones": lambda: encoding(
        **SD15 | {"side": 1, "latents": 1, "k": 1}, batch=1, dtype=HALF, layout=NCHW
    ),
    "record_patches ones": lambda: {
        "mask": torch.empty(1, 1, dtype=torch.bool),
        "replaced": torch.empty(1, 1, dtype=torch.bool),
        "timesteps": torch.empty(1),
        "sizes": 1,
        "rows": torch.empty(1, 4, dtype=torch.int64),
        "cells": torch.empty(1, dtype=torch.uint8),
        "written": torch.empty(2, dtype=torch.int64),
    },
    "patch_uniform ones": lambda: {
        "seeds": torch.empty(1, dtype=torch.int64),
        "timesteps": torch.empty(1, dtype=torch.float64),
        "halves": torch.empty(1, dtype=torch.int64),
        "patches": 1,
    },
    "erase_step sd15-b1 NCHW float16": lambda: step(
        detection(**SD15, batch=2, union=2, dtype=HALF, layout=NCHW, update=False), torch.int64
    ),
    "erase_step sdxl-1024 update channels_last bfloat16": lambda: step(
        detection(**SDXL, batch=2, union=40, dtype=BRAIN, layout=NHWC, update=True), HALF, 9, True
    ),
    "erase_step ones": lambda: step(
        detection(
            **SD15 | {"channels": 1, "side": 1, "k": 1},
            batch=1,
            union=1,
            dtype=FLOAT,
            layout=NCHW,
            update=False,
        ),
        torch.float64,
    ),
    "patch_uniform": lambda: {
        "seeds": torch.empty(8, dtype=torch.int64),
        "timesteps": torch.empty(8),
        "halves": torch.empty(8, dtype=torch.int64),
        "patches": 256,
    },
}


def main(arch: int, names: list[str]) -> None:
    names = list(budgets.CASES) if names == ["budgets"] else names
    for name, arguments in CASES.items():
        if names and name not in names:
            continue
        if name.endswith(" ones") and arch != 90 and not names:
            continue  # constants are typed before anything depends on the architecture
        op = name.split()[0]
        for launch in record(op, arch, **arguments())[0]:
            if not launch.name.startswith(op):
                continue  # of another op, which has cases of its own
            result = {"case": name, "kernel": launch.name, "arch": arch} | measured(launch, arch, name)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
