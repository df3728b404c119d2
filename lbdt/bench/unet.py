"""What share of a UNet step the hook takes: a random-weight UNet of SD 1.5's size, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lbdt.bench import hardware, hook, shapes, timing
from lbdt.bench.measured_shares import MEASURED
from lbdt.bench.shapes import Place, Shape

HOOKPOINT = "unet.up_blocks.1.attentions.1"
_KIND = "saeuron"  # whose shares of candidates and detections the hook is timed with
_SCALE = 50.0
"""The concept's latents over the others, so that a patch above the threshold is among the k largest too."""

SD15 = dict(sample_size=64, cross_attention_dim=768)
TINY = dict(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=8,
)
_TINY_SHAPE = Shape("small UNet", 1, 2, 32, 8, 8, latents=256, k=8, union=2)


@torch.no_grad()
def measure(
    device: torch.device, quick: bool, rounds: int, seed: int, budget: float = 10.0
) -> dict[str, Any]:
    """Milliseconds of a step, of the hook on a feature map of its sizes with the shares of candidates and detections
    that pictures have (`measured_shares`), and of a step with the hook, on whose own map as many patches are detected.

    "percent_of_step" is the hook's own time over the step's: on a GPU inside a CUDA graph where it can be captured, as
    the host runs ahead of a whole step, but not of one hook. "growth_percent" is what a step with the hook
    became longer by, a difference of two large numbers.
    """
    from diffusers import UNet2DConditionModel

    config, shape = (TINY, _TINY_SHAPE) if quick else (SD15, shapes.SHAPES["sd15-b1"])
    place = Place(device, torch.float16 if device.type == "cuda" else torch.float32, seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
        side, width = config["sample_size"], config["cross_attention_dim"]
        inputs = {
            "sample": torch.randn(shape.batch, 4, side, side, dtype=place.dtype),
            "timestep": torch.full((shape.batch,), hook.TIMESTEP),
            "encoder_hidden_states": torch.randn(shape.batch, 77, width, dtype=place.dtype),
        }
    unet.to(device, place.dtype, memory_format=torch.channels_last)
    x = _feature_map(unet, inputs)
    is_compiled = device.type == "cuda"
    runner = torch.compile(unet) if is_compiled else unet

    def time(function: Callable[[], Any]) -> dict[str, Any]:
        for _ in range(3):
            function()
        hardware.synchronize(device)
        return timing.in_turn({"it": function}, device, rounds, budget)["it"]["ms"]

    def step() -> Any:
        return runner(**inputs, return_dict=False)

    result: dict[str, Any] = {
        "sizes": f"{'small' if quick else 'SD 1.5'}, random weights, batch {shape.batch}, {str(place.dtype)[6:]}"
        f"{', compiled' if is_compiled else ''}",
        "step_ms": time(step),
    }
    pipe = SimpleNamespace(
        unet=runner,
        components={"unet": runner},
        scheduler=SimpleNamespace(timesteps=torch.tensor(hook.TIMESTEPS)),
    )
    for name in ("present", "absent"):
        measured = MEASURED[f"{_KIND}, {name}"]
        stand = hook.Stand(shape, 0.0, place, measured)
        versions = {key: stand.versions()[key] for key in ("ours", "bare")}
        for version in versions.values():
            version()
        alone = timing.in_turn(versions, device, rounds, budget)
        detected = stand.attachment.report().detected
        graph = timing.graph(versions["ours"], device, rounds) if is_compiled else None
        own = alone["ours"]["ms"]["median"] - alone["bare"]["ms"]["median"]
        if graph and "warm" in graph:
            own = graph["warm"]["median"]
        result[name] = {
            "share": detected,
            "candidates": measured.candidates,
            "hook_ms": own,
            "graph": graph,
            "percent_of_step": 100 * own / result["step_ms"]["median"],
            "step_ms": None,
            "growth_percent": None,
        }
        # An attachment makes the UNet compile anew, which takes a minute: once, where the hook does the most.
        if name == "present" or not is_compiled:
            eraser = hook.eraser(shape, _encoder(shape, x, measured.detected, place), seed)
            eraser.hookpoint = HOOKPOINT
            with eraser.attach(pipe, [hook.CONCEPT], layout=("uncond", "cond")):
                longer = time(step)
            growth = 100 * (longer["median"] / result["step_ms"]["median"] - 1)
            result[name] |= {"step_ms": longer, "growth_percent": growth}
    # The same once more: how far the clock itself drifted meanwhile.
    result["step_again_ms"] = time(step)
    return result


def _feature_map(unet: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the hookpoint's block returns in a step, [B, d, H, W]."""
    kept: list[Tensor] = []
    block = unet.get_submodule(HOOKPOINT.removeprefix("unet."))
    handle = block.register_forward_hook(lambda module, args, output: kept.append(output[0].clone()))
    unet(**inputs)
    handle.remove()
    return kept[0]


def _encoder(shape: Shape, x: Tensor, share: float, place: Place) -> dict[str, Tensor]:
    """A random encoder whose own latents are above the threshold on about `share` of the patches of `x`."""
    g = torch.Generator().manual_seed(place.seed)
    weight = torch.randn(shape.latents, shape.width, generator=g) / shape.width**0.5
    own = torch.arange(shape.union)
    weight[own] *= _SCALE
    h = x.flatten(2).transpose(1, 2).flatten(0, 1).float().cpu() @ weight[0]
    bias = torch.full((shape.latents,), 0.0)
    bias[own] = -torch.finfo(torch.float16).max
    if share:
        bias[0] = -h.quantile(1 - share)
    return {
        "weight": place.put(weight),
        "bias": bias.to(place.device),
        "latents": own.to(place.device),
    }
