"""The swap test, which a hookpoint must pass before anything long is trained (lbdt/canvas/README.md).

`python -m lbdt.canvas.design --pipeline DIR --judges DIR` prints base accuracy and the swap table.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from lbdt.canvas.generate import STEPS, judge, object_requests
from lbdt.canvas.models import load_classifiers
from lbdt.hooks.feature_maps import tensor_of, with_tensor
from lbdt.hooks.lookup import find_block, find_unet, hookpoints


@contextlib.contextmanager
def swapped(pipe, hookpoint: str) -> Iterator[None]:
    """Overwrites the block's conditional output by its unconditional one: is the concept decided here?"""

    def swap(module, args, output):
        sample = tensor_of(output)
        uncond = sample[: len(sample) // 2]
        return with_tensor(output, torch.cat([uncond, uncond]))

    handle = find_block(find_unet(pipe), hookpoint).register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def main() -> None:
    """The command line."""
    from diffusers import StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--judges", type=Path, required=True)
    parser.add_argument("--objects", type=int, default=20, help="judge the first N classes only")
    parser.add_argument("--seeds", type=int, default=1, help="pictures per class and style")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--hookpoint", action="append", help="default: every attention block")
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, local_files_only=True)
    nets = load_classifiers(args.judges)
    seeds = range(900, 900 + args.seeds)
    asked = [request for request in object_requests(seeds) if request.concept < args.objects]
    truth = torch.tensor([[request.concept, request.style] for request in asked]).unbind(1)

    def classify(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return nets[0](x).argmax(-1), nets[1](x).argmax(-1)

    def accuracy() -> tuple[float, float]:
        got = judge(pipe, asked, classify, args.steps)
        return tuple(100 * (g == t).float().mean().item() for g, t in zip(got, truth, strict=True))

    obj, style = accuracy()
    print(f"base: object {obj:.1f} %, style {style:.1f} % of {len(asked)} images")
    print("| hookpoint | swap UA | style accuracy |\n| --- | --- | --- |")
    for hookpoint in args.hookpoint or hookpoints(find_unet(pipe)):
        with swapped(pipe, hookpoint):
            obj, style = accuracy()
        print(f"| {hookpoint} | {100 - obj:.1f} | {style:.1f} |", flush=True)


if __name__ == "__main__":
    main()
