"""Pictures of EmojiCanvas: requests for them, the pipeline's answers, and what judges see in those."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lbdt.canvas.scenes import OBJECTS, STYLES, prompt

STEPS, GUIDANCE = 20, 3.0
BATCH = 60


@dataclasses.dataclass(frozen=True)
class PictureRequest:
    """A picture to generate: class and style indices (`style` None for the prompt without one) and its seed."""

    concept: int
    style: int | None
    seed: int

    @property
    def prompt(self) -> str:
        """The text that asks for it."""
        return prompt(OBJECTS[self.concept], None if self.style is None else STYLES[self.style])


def object_requests(seeds: Sequence[int], plain: bool = False) -> list[PictureRequest]:
    """Every class in every style (and, with `plain`, in none) for every seed; no two requests share a start seed."""
    styles: list[int | None] = [*range(len(STYLES)), *([None] if plain else [])]
    return [
        PictureRequest(
            c, s, (seed * len(OBJECTS) + c) * (len(STYLES) + 1) + (len(STYLES) if s is None else s)
        )
        for seed in seeds
        for s in styles
        for c in range(len(OBJECTS))
    ]


def images(
    pipe: Any, requests: Sequence[PictureRequest], steps: int = STEPS, guidance: float = GUIDANCE
) -> torch.Tensor:
    """The pictures that are asked for, float32 [B, 3, 128, 128] in [-1, 1]; each depends on its own request only."""
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        [request.prompt for request in requests],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="pt",
    ).images
    return out.float() * 2 - 1


def judge(
    pipe: Any,
    requests: Sequence[PictureRequest],
    classify: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    steps: int = STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objects and styles that `classify` sees in the pictures that are asked for, int64 [len(requests)] each."""
    verdicts = [
        classify(images(pipe, requests[first : first + BATCH], steps))
        for first in range(0, len(requests), BATCH)
    ]
    return torch.cat([objects for objects, _ in verdicts]), torch.cat([styles for _, styles in verdicts])
