"""The two tests that a hookpoint must pass before anything long is trained (lbdt/canvas/README.md): swap and selectivity.

``python -m lbdt.canvas.design --pipeline DIR --judges DIR`` prints base accuracy and the swap table.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ..hooks.feature_maps import tensor_of, with_tensor
from ..hooks.lookup import find_block, find_unet, hookpoints
from .generate import STEPS, grid, judge
from .models import load_classifiers


@contextlib.contextmanager
def swapped(pipe, hookpoint: str) -> Iterator[None]:
    """Overwrite the block's conditional output by its unconditional output: is the concept decided here?"""

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
    cases = [case for case in grid(range(900, 900 + args.seeds)) if case.concept < args.objects]
    truth = torch.tensor([case.concept for case in cases]), torch.tensor([case.style for case in cases])

    def classify(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return nets[0](x).argmax(-1), nets[1](x).argmax(-1)

    def accuracy() -> tuple[float, float]:
        got = judge(pipe, cases, classify, steps=args.steps)
        return tuple(100 * (g == t).float().mean().item() for g, t in zip(got, truth, strict=True))

    obj, style = accuracy()
    print(f"base: object {obj:.1f} %, style {style:.1f} % of {len(cases)} images")
    print("| hookpoint | swap UA | style accuracy |\n| --- | --- | --- |")
    for hookpoint in args.hookpoint or hookpoints(find_unet(pipe)):
        with swapped(pipe, hookpoint):
            obj, style = accuracy()
        print(f"| {hookpoint} | {100 - obj:.1f} | {style:.1f} |", flush=True)


if __name__ == "__main__":
    main()
