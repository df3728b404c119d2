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
    """A picture to generate: class indices from left to right (none, one or two) and style index (None for the prompt
    without one), and its seed."""

    objects: tuple[int, ...]
    style: int | None
    seed: int

    @property
    def prompt(self) -> str:
        """The text that asks for it."""
        names = [OBJECTS[index] for index in self.objects]
        return prompt(names, None if self.style is None else STYLES[self.style])


def object_requests(seeds: Sequence[int], plain: bool = False) -> list[PictureRequest]:
    """Every class in every style (and, with `plain`, in none) for every seed; no two requests share a start seed."""
    return [
        PictureRequest((c,), s, start_seed(0, seed * len(OBJECTS) + c, s))
        for seed in seeds
        for s in _styles(plain)
        for c in range(len(OBJECTS))
    ]


def empty_requests(seeds: Sequence[int], plain: bool = False, each: int = 1) -> list[PictureRequest]:
    """`each` scenes without an object in every style (and, with `plain`, in none) for every seed; start seeds of their
    own."""
    return [
        PictureRequest((), s, start_seed(1, seed * len(OBJECTS) + number, s))
        for seed in seeds
        for s in _styles(plain)
        for number in range(each)
    ]


def pair_requests(seeds: Sequence[int], plain: bool = False) -> list[PictureRequest]:
    """Every class on the left in every style (and, with `plain`, in none) beside another one, which rotates with class,
    style and seed; start seeds of their own."""
    count = len(OBJECTS)
    return [
        PictureRequest(
            (c, (c + 1 + (c + 3 * (len(STYLES) if s is None else s) + 7 * seed) % (count - 1)) % count),
            s,
            start_seed(2, seed * count + c, s),
        )
        for seed in seeds
        for s in _styles(plain)
        for c in range(count)
    ]


def _styles(plain: bool) -> list[int | None]:
    return [*range(len(STYLES)), *([None] if plain else [])]


def start_seed(kind: int, number: int, style: int | None) -> int:
    """The start seed of a picture; `kind`: 0 for one object, 1 for none, 2 for pairs; `number`: `seed * 20` and up to
    19, which tells pictures of one seed and style apart; `style`: None for none."""
    return (kind << 40) + number * (len(STYLES) + 1) + (len(STYLES) if style is None else style)


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
    guidance: float = GUIDANCE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `classify` sees in the pictures that are asked for: objects bool [len(requests), 20], styles int64
    [len(requests)]."""
    verdicts = [
        classify(images(pipe, requests[first : first + BATCH], steps, guidance))
        for first in range(0, len(requests), BATCH)
    ]
    return torch.cat([objects for objects, _ in verdicts]), torch.cat([styles for _, styles in verdicts])


def shown(requests: Sequence[PictureRequest]) -> torch.Tensor:
    """bool [len(requests), 20]: the objects that are asked for."""
    return one_hot(torch.tensor([[*r.objects, -1, -1][:2] for r in requests]).view(-1, 2))


def one_hot(objects: torch.Tensor) -> torch.Tensor:
    """Class indices int64 [n, 2], -1 for none, as bool [n, 20]."""
    return (objects.unsqueeze(2) == torch.arange(len(OBJECTS))).any(1)
