"""EmojiCanvas, the embedded world, with its five pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt import canvas
from lbdt.activations.prompts import Prompt
from lbdt.canvas.defaults import NAME, canvas_prompts, labelled
from lbdt.canvas.generate import PictureRequest, start_seed
from lbdt.canvas.scenes import prompt as prompt_text
from lbdt.evaluation.evaluated_world import EvaluatedKind, EvaluatedWorld, Pair, Verdicts

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from lbdt.evaluation.metrics.feature_distances import DirectionJudge

SEEDS = (500, 501, 502)
SWEEP_SEEDS = (700_000,)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "saeuron": (-1.0, -3.0, -5.0, -10.0, -20.0),
    "saemnesia": (-1.0, -2.0, -3.0, -5.0, -10.0),
    "gsae": (-0.5, -1.0, -1.5, -2.0, -3.0),
    "sdxl": (-1.0, -2.0, -3.0, -5.0, -10.0),
    "saeparate": (-0.1, -0.5, -1.0, -5.0, -10.0),
}
"""The strengths of the steering sweep, weakest first: from nearly no effect to the loss of most pictures."""

_PUBLISHED = ({"percentile": 99.9, "thresholds": "published"},)
SELECTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "saeuron": _PUBLISHED,
    "sdxl": _PUBLISHED,
    "saeparate": _PUBLISHED,
}
"""What each class may be steered by beside the eraser's selection: of 1,536 latents the two that score best, with the
published thresholds. One latent of a concept is chosen by training in the others."""


class CanvasJudge:
    """EmojiCanvas's object, style and fault classifiers.

    Features are the fault classifier's, [n, 192]: they know patches that do not fit rather than objects, so a clean
    landscape without one is near to unedited generations (lbdt/canvas/README.md, "The artifact judge").
    """

    name = "EmojiCanvas's object and style classifiers"

    def __init__(self, features: str = "fault") -> None:
        """`features`: of the "fault", "style" or "object" classifier."""
        self._features = features
        self.features_name = f"EmojiCanvas's {features} classifier (192)"

    def __call__(self, pictures: Sequence[Image.Image]) -> Verdicts:
        """`pictures`: RGB; ValueError for another size than 128 x 128."""
        import torch

        images = canvas.as_tensor(pictures)
        if tuple(images.shape[2:]) != (128, 128):
            raise ValueError(
                f"pictures: EmojiCanvas's judge expects 128 x 128, got {images.shape[3]} x {images.shape[2]}; evaluate "
                "another pipeline on prompts of your own (--world FILE)"
            )
        seen, styles = canvas.classify(images)
        with torch.inference_mode():
            features = canvas.classifiers()[self._features].features(images)
        return Verdicts(seen, styles, features)


def canvas_world(
    kinds: Mapping[str, EvaluatedKind] | None = None, pipeline: Any = None, batch: int = 20
) -> EvaluatedWorld:
    """EmojiCanvas: 20 objects in six styles and in none, its five erasers and their steering.

    Args:
        kinds: other erasers for its pipeline; None: those that come with the package.
        pipeline: device -> pipeline; None: the embedded one.
        batch: pictures that are generated together.
    """
    return EvaluatedWorld(
        name=NAME,
        objects=canvas.OBJECTS,
        styles=canvas.STYLES,
        prompts=seed_prompts,
        pipeline=pipeline or _pipeline,
        judge=lambda device: CanvasJudge(),
        kinds=kinds or {name: _kind(name) for name in canvas.KINDS},
        seeds=SEEDS,
        sweep_seeds=SWEEP_SEEDS,
        batch=batch,
        reference=_reference if kinds is None and pipeline is None else None,
        pairs=seed_pairs,
        empty=seed_empty,
        texts=texts_of,
    )


def seed_prompts(seed: int) -> list[Prompt]:
    """Every object in every style, and in none; no two prompts of any seeds share a start seed."""
    return canvas_prompts([seed])


def seed_pairs(seed: int) -> list[Pair]:
    """Six pairs for every object as the one that is erased: one a style, which of the two stands left in turn, with
    partners that rotate with object and seed."""
    count, styles = len(canvas.OBJECTS), len(canvas.STYLES)
    pairs = []
    for i, name in enumerate(canvas.OBJECTS):
        for n in range(styles):
            beside = (i + 1 + (7 * n + 5 * seed) % (count - 1)) % count
            style = (i + n + seed) % styles
            objects = (i, beside) if (n + seed) % 2 else (beside, i)
            request = PictureRequest(objects, style, start_seed(2, seed * count + i, style))
            prompt = dataclasses.replace(labelled(request), concept=name)
            pairs.append(Pair(prompt, canvas.OBJECTS[beside]))
    return pairs


def seed_empty(seed: int) -> list[Prompt]:
    """Prompts of no object, as many as there are objects, in styles in turn."""
    count = len(canvas.OBJECTS)
    styles = [(n + seed) % len(canvas.STYLES) for n in range(count)]
    return [
        labelled(PictureRequest((), style, start_seed(1, seed * count + n, style)))
        for n, style in enumerate(styles)
    ]


def texts_of(concept: str | None) -> list[str]:
    """The prompt of an object, or of none, without a style: EmojiCanvas knows no other texts than its prompts."""
    return [prompt_text(() if concept is None else concept)]


def _kind(name: str) -> EvaluatedKind:
    sampling = canvas.KINDS[name]
    return EvaluatedKind(
        name,
        sampling.steps,
        sampling.guidance,
        partial(canvas.load_eraser, name),
        partial(canvas.load_steering, name),
        STRENGTHS[name],
        SELECTIONS.get(name, ()),
    )


def _pipeline(device: torch.device) -> Any:
    return canvas.load_pipeline().to(device)


def judge_path(sampling: canvas.Sampling) -> Path:
    """The file of the judge of this sampling."""
    return canvas.WEIGHTS / "judges" / f"artifacts-{sampling.steps}-{sampling.guidance:g}.safetensors"


@lru_cache
def _judge_file(path: Path) -> DirectionJudge:
    from lbdt.evaluation.metrics.feature_distances import DirectionJudge

    return DirectionJudge.load(path)


def _reference(kind: str) -> DirectionJudge:
    return _judge_file(judge_path(canvas.KINDS[kind]))
