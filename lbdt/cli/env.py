"""`lbdt env`: versions, devices, and which backend serves each op on this machine."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from lbdt.cli.options import AsJson, UnusedDevice, UnusedSeed, print_result, reported

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "typer",
    "pillow",
    "triton",
)


@reported
def command(seed: UnusedSeed = 0, device: UnusedDevice = "cpu", as_json: AsJson = False) -> None:
    """Versions, devices, and which backend serves each op, with the reasons why the others do not."""
    values = backends_here()
    print_result(values, lines(values), as_json)


def backends_here() -> dict[str, Any]:
    """Plain values: versions (None: not installed), devices, and per op and device the backend and why not others."""
    import torch

    import lbdt
    from lbdt.int8_screen import instructions

    return {
        "lbdt": lbdt.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "int8_screen": instructions() or None,
        "devices": [_device(device) for device in devices()],
        "ops": {device: _ops(device) for device in devices()},
    }


def devices() -> list[str]:
    """The devices that a pipeline can run on here, the CPU last."""
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]


def lines(values: dict[str, Any]) -> list[str]:
    """The values of `backends_here` as text."""
    text = [f"lbdt {values['lbdt']}, Python {values['python']}, {values['platform']}"]
    text += [f"  {name}: {version or 'not installed'}" for name, version in values["packages"].items()]
    text.append(
        f"  CUDA of torch: {values['torch_cuda'] or 'none (CPU build)'}; threads: {values['threads']}"
    )
    text.append(
        f"  int8 screen of detections on the CPU: {values['int8_screen'] or 'none (it needs AVX-512 VNNI or AVX-VNNI)'}"
    )
    for device in values["devices"]:
        text.append(f"{device['name']}: {device['description']}")
        for op, choice in values["ops"][device["name"]].items():
            text.append(f"  {op}: {choice['backend']}")
            text += [f"    not {name}: {reason}" for name, reason in choice["reasons"].items()]
    return text


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(name: str) -> dict[str, str]:
    import torch

    if name == "cpu":
        return {"name": name, "description": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(name)
    size = properties.total_memory / 2**30
    capability = f"{properties.major}.{properties.minor}"
    return {"name": name, "description": f"{properties.name}, {size:.0f} GiB, capability {capability}"}


def _ops(device: str) -> dict[str, Any]:
    import torch

    from lbdt import ops

    x = torch.zeros(1, 8, 2, 2, device=device)
    weight, bias = torch.zeros(16, 8, device=device), torch.zeros(16, device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    mask = torch.zeros(1, 4, dtype=torch.bool, device=device)
    u = torch.zeros(1, 4, device=device)
    arguments = {
        "detect_patches": (x, weight, bias, one, torch.zeros(1, 1, device=device), one, mask[:, :1], 2),
        "replace_patches_": (x, mask, u, 2, 2),
        "encode_topk": (x, weight, bias, 2),
        "patch_uniform": (one, one, one, 4),
        "record_patches": (
            mask,
            mask,
            u[:, 0],
            0,
            torch.zeros(1, 4, dtype=torch.int64, device=device),
            u,
            one,
        ),
        "erase_step": (x,),
    }
    answer = {}
    for op, given in arguments.items():
        choice = ops.explain(op, *given)
        answer[op] = {"backend": choice.backend, "reasons": dict(choice.reasons)}
    return answer
