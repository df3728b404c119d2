"""Start noise that the prompts of a seed draw in turn from one generator, as published scripts do (METHOD.md, 8.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lbdt.activations.prompts import Prompt

NOISES = ("run", "prompt")
""""run": `RunNoise`. "prompt": every prompt of a seed starts from a generator of its own, of that seed."""


class RunNoise:
    """The start noise of a script that seeds one CPU generator with the seed, and calls its pipeline in a fixed order.

    A picture's noise follows from the seed and its place in that order alone: it is drawn again for every batch,
    calls before it included (2000 pictures of SD 1.5's size take 0.2 s), so it does not depend on batches, processes,
    or which pictures are asked for. On a GPU it is the same noise; a script whose generator is on the GPU draws other
    bits.
    """

    name = "run"

    def __init__(self, calls: Sequence[Sequence[str]]) -> None:
        """
        Args:
            calls: the prompts of each call of the pipeline, in order; a call draws the noise of all its pictures at
                once. Of a prompt that comes again the last picture stays, as of a file that is written again.

        Raises:
            ValueError: no prompt.
        """
        self._sizes = tuple(len(texts) for texts in calls)
        self._places = {
            text: (call, place) for call, texts in enumerate(calls) for place, text in enumerate(texts)
        }
        if not self._places:
            raise ValueError("calls: expected one prompt or more, got none")

    def latents(self, pipe: Any, prompts: Sequence[Prompt]) -> Tensor:
        """The start noise of `prompts` for one call of `pipe`, [P, C, H, W] on the CPU, in the UNet's dtype.

        Raises:
            ValueError: a prompt that the run does not have.
        """
        unet = pipe.unet
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (unet.config.in_channels, height, width)
        noise = torch.empty(len(prompts), *shape, dtype=unet.dtype)
        wanted: dict[int, dict[int, list[tuple[int, int]]]] = {}
        for row, prompt in enumerate(prompts):
            call, place = self._place(prompt)
            wanted.setdefault(prompt.seed, {}).setdefault(call, []).append((row, place))
        for seed, by_call in wanted.items():
            generator = torch.Generator().manual_seed(seed)
            for call in range(max(by_call) + 1):
                drawn = torch.randn(self._sizes[call], *shape, generator=generator, dtype=unet.dtype)
                for row, place in by_call.get(call, ()):
                    noise[row] = drawn[place]
        return noise

    def donor_seed(self, prompt: Prompt) -> int:
        """A seed of the eraser's own draws: another one for every picture of a seed. ValueError as `latents`."""
        call, place = self._place(prompt)
        return (prompt.seed * sum(self._sizes) + sum(self._sizes[:call]) + place) % 2**63

    def _place(self, prompt: Prompt) -> tuple[int, int]:
        if prompt.text not in self._places:
            raise ValueError(f"prompt: {prompt.text!r} is not in the run whose noise it should draw")
        return self._places[prompt.text]
