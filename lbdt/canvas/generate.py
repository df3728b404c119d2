"""Generate many EmojiCanvas pictures and judge them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from .scenes import OBJECTS, STYLES, prompt

STEPS, GUIDANCE = 20, 3.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One picture to generate: class and style indices (``style`` None for the prompt without one) and its seed."""

    concept: int
    style: int | None
    seed: int

    @property
    def prompt(self) -> str:
        return prompt(OBJECTS[self.concept], None if self.style is None else STYLES[self.style])


def grid(seeds: Sequence[int], plain: bool = False) -> list[Case]:
    """Every class in every style (and, with ``plain``, in none) for every seed; no two cases share a seed."""
    styles: list[int | None] = [*range(len(STYLES)), *([None] if plain else [])]
    return [
        Case(c, s, (seed * len(OBJECTS) + c) * (len(STYLES) + 1) + (len(STYLES) if s is None else s))
        for seed in seeds
        for s in styles
        for c in range(len(OBJECTS))
    ]


def batches(cases: Sequence[Case], size: int, desc: str | None) -> Iterator[list[Case]]:
    with tqdm(total=len(cases), desc=desc, disable=desc is None, mininterval=2) as bar:
        for first in range(0, len(cases), size):
            yield list(cases[first : first + size])
            bar.update(min(size, len(cases) - first))


def images(pipe, batch: Sequence[Case], steps: int = STEPS, guidance: float = GUIDANCE) -> torch.Tensor:
    """Pictures of ``batch``, float32 [B, 3, 128, 128] in [-1, 1]. A picture depends on its case only."""
    generators = [torch.Generator().manual_seed(case.seed) for case in batch]
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        [case.prompt for case in batch],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="pt",
    ).images
    return out.float() * 2 - 1


def judge(
    pipe,
    cases: Sequence[Case],
    classify: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    *,
    size: int = 60,
    desc: str | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted object and style of every case, int64 [len(cases)] each."""
    verdicts = [classify(images(pipe, batch, steps, guidance)) for batch in batches(cases, size, desc)]
    return torch.cat([v[0] for v in verdicts]), torch.cat([v[1] for v in verdicts])
