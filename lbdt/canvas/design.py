"""What a pipeline paints, and the swap test, which a hookpoint must pass before anything long is trained
(lbdt/canvas/README.md).

`python -m lbdt.canvas.design --pipeline DIR --judges DIR` prints base accuracy and the swap table.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lbdt.canvas.generate import (
    GUIDANCE,
    STEPS,
    PictureRequest,
    empty_requests,
    judge,
    object_requests,
    pair_requests,
    shown,
)
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
    parser.add_argument("--seeds", type=int, default=1, help="pictures per class and style")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--hookpoint", action="append", help="default: every attention block")
    parser.add_argument("--no-swap", action="store_true", help="base accuracy only")
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, local_files_only=True)
    nets = load_classifiers(args.judges)
    seeds = range(900, 900 + args.seeds)

    def classify(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return nets["object"](x) > 0, nets["style"](x).argmax(-1)

    def accuracy(asked: Sequence[PictureRequest]) -> tuple[float, float, float]:
        """Shares of pictures in which what is asked for is seen, that alone, and the style: per cent."""
        objects, styles = judge(pipe, asked, classify, args.steps, args.guidance)
        wanted, style = shown(asked), torch.tensor([request.style for request in asked])
        right = (objects | ~wanted).all(1), (objects == wanted).all(1), styles == style
        return tuple(100 * part.float().mean().item() for part in right)

    single = object_requests(seeds)
    print("| scenes | pictures | asked for is seen | that alone | style |\n| --- | --- | --- | --- | --- |")
    scenes = (
        ("one object", single),
        ("pairs", pair_requests(seeds)),
        ("empty", empty_requests(seeds, each=5)),
    )
    for name, asked in scenes:
        seen, alone, style = accuracy(asked)
        print(f"| {name} | {len(asked)} | {seen:.1f} | {alone:.1f} | {style:.1f} |", flush=True)
    if args.no_swap:
        return
    print("| hookpoint | swap UA | style accuracy |\n| --- | --- | --- |")
    for hookpoint in args.hookpoint or hookpoints(find_unet(pipe)):
        with swapped(pipe, hookpoint):
            seen, _, style = accuracy(single)
        print(f"| {hookpoint} | {100 - seen:.1f} | {style:.1f} |", flush=True)


if __name__ == "__main__":
    main()
