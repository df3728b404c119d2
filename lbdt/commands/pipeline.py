"""The pipeline and the prompts behind `lbdt collect`, `lbdt train --stream`, `lbdt score` and `lbdt erase`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lbdt.activations.generated import Generated
from lbdt.activations.prompts import Prompt, read_prompts
from lbdt.activations.sites import Site

CANVAS = "EmojiCanvas"
_MOST = 100_000


@dataclass(frozen=True)
class Sampling:
    """How activations are generated; see `lbdt.activations.generated.Generated`."""

    model: str | None
    """Folder or Hub repository; None: EmojiCanvas."""
    prompts: str
    """A file, or "canvas"."""
    canvas_seeds: range
    steps: int
    guidance: float | None
    """None: EmojiCanvas's, or the pipeline's own."""
    timesteps: int | list[int] | None
    patches: int | None
    prompts_per_shard: int
    threads: int
    """On the CPU only."""
    dtype: str = "float16"

    def labelled(self) -> Labelled:
        """The prompts, and the names of their labels."""
        if self.prompts == "canvas":
            from lbdt.canvas import OBJECTS, STYLES

            return Labelled(canvas_prompts(self.canvas_seeds), tuple(OBJECTS), tuple(STYLES))
        prompts = read_prompts(self.prompts)
        used = ([getattr(prompt, label) for prompt in prompts] for label in ("concept", "style"))
        return Labelled(prompts, *(tuple(n for n in dict.fromkeys(names) if n is not None) for names in used))

    def source(
        self, pipe: Any, labelled: Labelled, sites: Sequence[Site], device: torch.device, seed: int = 0
    ) -> Generated:
        """The activations of `pipe` on `device`; `seed`: of the draw of patches."""
        guidance = self.guidance
        if guidance is None and self.model is None:
            from lbdt.canvas.generate import GUIDANCE as guidance
        return Generated(
            pipe,
            labelled.prompts,
            sites,
            steps=self.steps,
            guidance=guidance,
            prompts_per_shard=self.prompts_per_shard,
            patches=self.patches,
            timesteps=self.timesteps,
            dtype=getattr(torch, self.dtype),
            seed=seed,
            concepts=labelled.concepts,
            styles=labelled.styles,
            threads=self.threads if device.type == "cpu" else None,
            model=self.model or CANVAS,
        )


@dataclass(frozen=True)
class Labelled:
    """Prompts, and the names of their concepts and styles, in the order of their numbers."""

    prompts: Sequence[Prompt]
    concepts: tuple[str, ...]
    styles: tuple[str, ...]

    def part(self, prompts: Sequence[Prompt]) -> Labelled:
        """Some of the prompts, with all names."""
        return replace(self, prompts=prompts)


def load_pipeline(model: str | None, device: torch.device) -> Any:
    """EmojiCanvas, or the diffusers pipeline of a folder or Hub repository, on `device`; half precision on a GPU."""
    if model is None:
        from lbdt import canvas

        pipe = canvas.load_pipeline()
    else:
        from diffusers import DiffusionPipeline

        # On a CPU half precision is slow or absent.
        half = {"torch_dtype": torch.float16} if device.type == "cuda" else {}
        pipe = DiffusionPipeline.from_pretrained(model, **half)
    return pipe.to(device)


def canvas_prompts(seeds: Sequence[int]) -> list[Prompt]:
    """Every object of EmojiCanvas in every style, and in none, for every seed."""
    from lbdt.canvas import OBJECTS, STYLES
    from lbdt.canvas.generate import grid

    return [
        Prompt(
            case.prompt,
            OBJECTS[case.concept],
            None if case.style is None else STYLES[case.style],
            case.seed,
        )
        for case in grid(seeds, plain=True)
    ]


def parse_timesteps(text: str | None) -> int | list[int] | None:
    """A number of timesteps ("10"), or timesteps ("999,749" or "999,"); ValueError for anything else."""
    if text is None:
        return None
    try:
        given = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        given = []
    listed = "," in text
    if not given or min(given) < (0 if listed else 1) or max(given) > _MOST:
        raise ValueError(f"--timesteps: expected a number such as 10, or 999,749; got {text!r}")
    return given if listed else given[0]


def parse_seeds(text: str) -> range:
    """ "100:104", the end not included; ValueError for anything else, or none."""
    first, colon, end = text.partition(":")
    try:
        seeds = range(int(first), int(end))
    except ValueError:
        seeds = range(0)
    if not colon or seeds.start < 0 or seeds.stop >= 2**63 or not 0 < seeds.stop - seeds.start <= _MOST:
        raise ValueError(
            f"--canvas-seeds: expected FIRST:END such as 100:104, at most {_MOST} of them; got {text!r}"
        )
    return seeds
