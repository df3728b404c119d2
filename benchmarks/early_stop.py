"""How much of the dictionary a refuted candidate costs, by the order in which latents are read: `python -m
benchmarks.early_stop`.

Feature maps come from EmojiCanvas without an eraser; candidates are the patches above a threshold of the shipped
eraser's concepts. A candidate is refuted once k other latents exceed its value, and the count stops there. The
dictionary's counts are of other pictures than it is judged on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt import canvas
from lbdt.bench import hardware
from lbdt.editors import ConceptEraser
from lbdt.runs.files import write_file

STYLES = ("Photo", "Sketch", "Neon")


def pre_activations(
    pipe: Any, eraser: ConceptEraser, objects: list[str], steps: int, seed: int
) -> Iterator[tuple]:
    """(timestep, h [B * N, L]) of every UNet call on the prompts of these objects in three styles."""
    block = pipe.unet.get_submodule(eraser.hookpoint.removeprefix("unet."))
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, given, output: seen.append(output[0] - given[0]))
    try:
        for name in objects:
            seen.clear()
            prompts = [canvas.prompt(name, style) for style in STYLES]
            generator = torch.Generator().manual_seed(seed)
            pipe(
                prompts,
                num_inference_steps=steps,
                guidance_scale=3.0,
                generator=generator,
                output_type="latent",
            )
            for timestep, x in zip(pipe.scheduler.timesteps, seen, strict=True):
                yield timestep, eraser.sae.pre_activations(x.flatten(2).transpose(1, 2)).flatten(0, 1)
    finally:
        handle.remove()


def candidates(eraser: ConceptEraser, timestep: Tensor, h: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(h [C, L], value [C], owner [C]) of the candidates of each concept."""
    place = int(eraser.dictionary.nearest_bin(timestep.view(1)))
    for concept in eraser.concepts:
        selection = eraser.select(concept)
        limits = eraser.sae.to_pre_activation(selection.thresholds, selection.latents)[place]
        own = h[:, selection.latents]
        value, owner = torch.where(own > limits, own, -torch.inf).max(dim=1)
        found = value > -torch.inf
        yield h[found], value[found], selection.latents[owner[found]]


@torch.inference_mode()
def measure(objects: list[str], steps: int) -> dict[str, Any]:
    """Mean latents read until a refuted candidate is known to be one, by order."""
    pipe, eraser = canvas.load_pipeline(), canvas.load_eraser()
    pipe.set_progress_bar_config(disable=True)
    k, total = eraser.sae.rank_k, eraser.sae.config.num_latents
    orders = {
        "as the SAE numbers them": torch.arange(total),
        "by mean activation": eraser.dictionary.replaced(fired=None).firing_order(),
        "by firing counts (the shipped dictionary)": eraser.dictionary.firing_order(),
    }
    read = dict.fromkeys(orders, 0.0)
    found = refuted = 0
    for timestep, h in pre_activations(pipe, eraser, objects, steps, seed=2):
        for rows, value, owner in candidates(eraser, timestep, h):
            above = (rows > value.unsqueeze(1)).scatter(1, owner.unsqueeze(1), False)
            full = above.sum(dim=1) >= k
            found, refuted = found + len(rows), refuted + int(full.sum())
            for name, order in orders.items():
                # The k-th latent above the value ends the count.
                at = (above[full][:, order].cumsum(dim=1) >= k).int().argmax(dim=1) + 1
                read[name] += float(at.sum())
    return {
        "benchmark": "early_stop",
        "objects": objects,
        "steps": steps,
        "k": k,
        "latents": total,
        "candidates": found,
        "refuted": refuted,
        "mean_read": {name: value / max(refuted, 1) for name, value in read.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; writes it with --out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--object", action="append", metavar="NAME", help="default: five objects")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    objects = options.object or ["Cats", "Dogs", "Trees", "Sea", "Human"]
    result = measure(objects, options.steps) | hardware.describe(torch.device("cpu"))
    print(
        f"{result['candidates']} candidates, {result['refuted']} refuted (not among the {result['k']} largest "
        f"of {result['latents']} latents)\n\n| latents in order | read per refuted candidate | share |\n|---|---|---|"
    )
    for name, mean in result["mean_read"].items():
        print(f"| {name} | {mean:.1f} | {mean / result['latents']:.1%} |")
    if options.out:
        write_file(options.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
