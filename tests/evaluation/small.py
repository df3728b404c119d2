"""A world evaluated in seconds: the toy pipeline, its eraser and steering, and a judge that counts its calls."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lbdt.activations.prompts import Prompt
from lbdt.editors import Steering
from lbdt.evaluation.evaluated_world import EvaluatedKind, EvaluatedWorld, Pair, Verdicts
from lbdt.evaluation.evaluation import Evaluation
from lbdt.evaluation.jobs import Design
from lbdt.evaluation.verdict_columns import Scorers
from tests import toy

STYLES = ("ink", "oil")
CPU = torch.device("cpu")


class Judge:
    """Sees object i by bit i of the sum of a picture's bytes; its mean colours by quarter are the features."""

    def __init__(self, name: str = "sums", styles: bool = True) -> None:
        self.name, self.features_name, self.styles = name, "mean colours", styles
        self.calls = 0
        self.pictures = 0

    def __call__(self, pictures) -> Verdicts:
        self.calls += 1
        self.pictures += len(pictures)
        arrays = torch.stack([torch.from_numpy(np.array(picture)).long() for picture in pictures])
        sums = arrays.sum(dim=(1, 2, 3))
        quarters = arrays.float().unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean(dim=(2, 4))
        seen = torch.stack([sums >> bit & 1 for bit in range(len(toy.CONCEPTS))], dim=1).bool()
        return Verdicts(seen, sums % 2 if self.styles else None, quarters.flatten(1))


def per(**settings: Any):
    eraser = toy.eraser(padding=1, source="random")
    for name, value in settings.items():
        setattr(eraser, name, value)
    return eraser


def steering(strength: float = -1.0) -> Steering:
    return Steering.from_eraser(toy.eraser(), rule="sdxl", strength=strength)


def kind(name: str = "toy", **changes: Any) -> EvaluatedKind:
    return EvaluatedKind(
        **{"name": name, "steps": 2, "guidance": 1.0, "per": per, "steering": steering} | changes
    )


def prompts(styles, seed: int) -> list[Prompt]:
    return [
        Prompt(f"a {thing} in {style}".lower(), thing, style, 1000 * seed + 10 * i + j)
        for i, thing in enumerate(toy.CONCEPTS)
        for j, style in enumerate((*styles, None))
    ]


def pairs(seed: int) -> list[Pair]:
    """Two for every object: with each of the others, which stands first in turn."""
    found = []
    for i, thing in enumerate(toy.CONCEPTS):
        for n in (1, 2):
            beside = toy.CONCEPTS[(i + n) % len(toy.CONCEPTS)]
            text = f"{thing} {beside}" if n == 1 else f"{beside} {thing}"
            found.append(
                Pair(Prompt(text.lower(), thing, STYLES[n % 2], 1000 * seed + 100 + 10 * i + n), beside)
            )
    return found


def empty(seed: int) -> list[Prompt]:
    """One a style."""
    return [Prompt(style, None, style, 1000 * seed + 200 + n) for n, style in enumerate(STYLES)]


def gated(**settings: Any):
    """An eraser with a gate that no picture of 16 patches passes, unless it is told otherwise."""
    return per(**{"min_patches": 17, **settings})


def world(folder: Path | None = None, judge: Judge | None = None, **changes: Any) -> EvaluatedWorld:
    """Of the toy pipeline, whose tokenizer is written to `folder`; None: it cannot be run."""
    styles = changes.pop("styles", STYLES)
    settings = {
        "name": "small",
        "objects": toy.CONCEPTS,
        "styles": styles,
        "prompts": partial(prompts, styles),
        "pipeline": lambda device: toy.pipeline(folder),
        "judge": None if judge is None else lambda device: judge,
        "kinds": {"toy": kind(strengths=(-1.0, -4.0))},
        "seeds": (1, 2),
        "sweep_seeds": (9,),
        "batch": 5,
        "pairs": pairs,
        "empty": empty,
    }
    return EvaluatedWorld(**settings | changes)


def evaluation(where: Path, given: EvaluatedWorld, **changes: Any) -> Evaluation:
    settings = {
        "world": given,
        "kinds": tuple(given.kinds),
        "design": Design(),
        "out": where,
        "device": CPU,
        "seeds": given.seeds,
        "sweep_seeds": given.sweep_seeds,
        "concepts": given.objects,
        "scorers": Scorers(judge=given.judge(CPU) if given.judge else None),
        "progress": False,
    }
    return Evaluation(**settings | changes)
