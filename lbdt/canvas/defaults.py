"""What a command works on where nothing is named: EmojiCanvas's pipeline, erasers and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lbdt import canvas
from lbdt.activations.prompts import LabelledPrompts, Prompt
from lbdt.canvas.generate import PictureRequest, empty_requests, object_requests, pair_requests
from lbdt.canvas.scenes import OBJECTS, STYLES

if TYPE_CHECKING:
    import torch

    from lbdt.editors import ConceptEraser, Steering

NAME = "EmojiCanvas"
STEPS = 20
"""The denoising steps of another pipeline, where none are given."""


def pipeline_of(model: str | None, device: torch.device) -> Any:
    """The diffusers pipeline of a folder or Hub repository, or EmojiCanvas's, on `device`."""
    if model is None:
        return canvas.load_pipeline().to(device)
    from lbdt.activations.pipelines import load_pipeline

    return load_pipeline(model, device)


def eraser_of(path_or_repo: str | None, kind: str = "saeuron") -> ConceptEraser:
    """The eraser of a folder or repository, or EmojiCanvas's of a kind; ValueError or OSError where there is none."""
    if path_or_repo is None:
        return canvas.load_eraser(kind)
    from lbdt.editors import ConceptEraser

    return ConceptEraser.from_pretrained(path_or_repo)


def steering_of(path_or_repo: str | None, kind: str = "saeuron", strength: float | None = None) -> Steering:
    """The steering baseline of the same folder, or EmojiCanvas's of a kind; `strength` None: the one it was saved with.

    Raises:
        ValueError, OSError: none there, or a bad strength.
    """
    settings = {} if strength is None else {"strength": strength}
    if path_or_repo is None:
        return canvas.load_steering(kind, **settings)
    from lbdt.editors import Steering

    return Steering.from_pretrained(path_or_repo, **settings)


def steps_and_guidance(
    model: str | None, kind: str, steps: int | None, guidance: float | None
) -> tuple[int, float | None]:
    """Steps and guidance scale: those given; else on EmojiCanvas those that its kind is made for, on another model 20
    steps and None, the pipeline's own scale."""
    if model is not None:
        return steps or STEPS, guidance
    return steps or canvas.KINDS[kind].steps, canvas.KINDS[kind].guidance if guidance is None else guidance


def canvas_prompts(seeds: Sequence[int]) -> list[Prompt]:
    """Every object of EmojiCanvas in every style, and in none, for every seed."""
    return [labelled(request) for request in object_requests(seeds, plain=True)]


def empty_prompts(seeds: Sequence[int], each: int = 1) -> list[Prompt]:
    """`each` scenes without an object in every style, and in none, for every seed."""
    return [labelled(request) for request in empty_requests(seeds, plain=True, each=each)]


def pair_prompts(seeds: Sequence[int]) -> list[Prompt]:
    """Every object beside another one in every style, and in none, for every seed; both are named."""
    requests = pair_requests(seeds, plain=True)
    return [replace(labelled(request), beside=(OBJECTS[request.objects[1]],)) for request in requests]


def labelled(request: PictureRequest) -> Prompt:
    """A request as a prompt, whose concept is its first object."""
    concept = OBJECTS[request.objects[0]] if request.objects else None
    return Prompt(
        request.prompt, concept, None if request.style is None else STYLES[request.style], request.seed
    )


def labelled_canvas_prompts(seeds: Sequence[int], pairs: bool = False) -> LabelledPrompts:
    """The prompts of `canvas_prompts`, and three empty scenes in every style and in none, with the names of all objects
    and styles. Without empty scenes an SAE of few latents has none for the ground that objects hide. With `pairs`, as
    many of two objects, which the gate counts."""
    prompts = [*canvas_prompts(seeds), *empty_prompts(seeds, each=3), *(pair_prompts(seeds) if pairs else ())]
    return LabelledPrompts(prompts, tuple(OBJECTS), tuple(STYLES))
