"""The published UnlearnCanvas protocol as an evaluation's world (METHOD.md, 8.1 to 8.3): SD 1.5 fine-tuned on
"style50", 20 objects, 50 styles, two ViT classifiers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt.activations.prompts import Prompt
from lbdt.evaluation.evaluated_world import EvaluatedWorld
from lbdt.evaluation.worlds import PathOrRepo, saved_kinds

if TYPE_CHECKING:
    import torch

    from lbdt.evaluation.worlds.vit import ViTJudge

OBJECTS = (
    *("Architectures", "Bears", "Birds", "Butterfly", "Cats", "Dogs", "Fishes", "Flame", "Flowers", "Frogs"),
    *("Horses", "Human", "Jellyfish", "Rabbits", "Sandwiches", "Sea", "Statues", "Towers", "Trees"),
    "Waterfalls",
)
"""The object classifier's classes, in its order."""
PHOTO = "Seed_Images"
"""The theme of the photographs that the styles were painted from: a class of the classifier, and no style."""
THEMES = (
    *("Abstractionism", "Artist_Sketch", "Blossom_Season", "Bricks", "Byzantine", "Cartoon", "Cold_Warm"),
    *("Color_Fantasy", "Comic_Etch", "Crayon", "Cubism", "Dadaism", "Dapple", "Defoliation", "Early_Autumn"),
    *("Expressionism", "Fauvism", "French", "Glowing_Sunset", "Gorgeous_Love", "Greenfield", "Impressionism"),
    *("Ink_Art", "Joy", "Liquid_Dreams", "Magic_Cube", "Meta_Physics", "Meteor_Shower", "Monet", "Mosaic"),
    *("Neon_Lines", "On_Fire", "Pastel", "Pencil_Drawing", "Picasso", "Pop_Art", "Red_Blue_Ink", "Rust"),
    *(PHOTO, "Sketch", "Sponge_Dabbed", "Structuralism", "Superstring", "Surrealism", "Ukiyoe", "Van_Gogh"),
    *("Vibrant_Flow", "Warm_Love", "Warm_Smear", "Watercolor", "Winter"),
)
"""The style classifier's classes, in its order."""
STYLES = tuple(theme for theme in THEMES if theme != PHOTO)
TEMPLATES = {
    "saeuron": ("An image of {object} in {style} style.", "An image of {object}."),
    "official": ("A {object} image in {style} style.", "A {object} image."),
}
"""Styled and plain: "saeuron" is SAeUron's, SAEmnesia's and PER's; "official" is UnlearnCanvas' own, whose plain form
no source states: it is ours. Figures of the two are not of identical prompts."""
SEEDS = (188, 288, 588, 688, 888)
SWEEP_SEEDS = (42,)
STEPS, GUIDANCE, SIZE = 100, 9.0, 512
TASKS = ("object", "style")
OBJECT_FILE, STYLE_FILE = "style50_cls", "style50"
_SUFFIXES = (".safetensors", ".pth")


def unlearncanvas(
    *,
    base: PathOrRepo,
    erasers: Mapping[str, PathOrRepo],
    steering: Mapping[str, PathOrRepo] | None = None,
    strengths: Mapping[str, Sequence[float]] | None = None,
    object_classifier: PathOrRepo | None = None,
    style_classifier: PathOrRepo | None = None,
    task: str = "object",
    template: str = "saeuron",
    seeds: Sequence[int] = SEEDS,
    sweep_seeds: Sequence[int] = SWEEP_SEEDS,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    size: int | None = SIZE,
    batch: int = 10,
) -> EvaluatedWorld:
    """Object unlearning as SAeUron, SAEmnesia and PER evaluate it, or style unlearning: the same with the roles
    swapped.

    Every prompt of a seed starts from that seed, as published. DDIM whatever the base model's scheduler, eta 0.

    - task "object": `objects` are the 20, `styles` the 51 themes of the classifier. A seed has 1020 prompts: 20 objects
      in 50 styles and in none; `PHOTO` is never asked for.
    - task "style": `objects` are the 50 styles, `styles` the 20 objects. A seed has the 1000 styled prompts, as every
      picture needs a style to be scored. A picture that the classifier calls `PHOTO` is of object -1: none of them.
      Then UA and IRA of the evaluation are style accuracies and its CRA the object accuracy (METHOD.md, 8.3).

    Args:
        base: diffusers folder or Hub repository of the fine-tuned model.
        erasers, steering, strengths: by name of the kind; see `lbdt.evaluation.worlds.saved_kinds`.
        object_classifier, style_classifier: a file, or a folder or Hub repository that holds style50_cls.pth and
            style50.pth (or .safetensors). None, both: pictures are not classified.
        task: "object" | "style".
        template: "saeuron" "An image of {object} in {style} style." | "official" "A {object} image in {style} style."
        size: pixels a side that the base model must generate by itself; None: any.
        batch: pictures that are generated together.

    Raises:
        ValueError: an unknown task or template, one classifier without the other, or one that is not there, what
            `saved_kinds` refuses, a seed in both lists. When it is used: a base model of another size, what
            `load_vit` refuses.
    """
    _check("task", task, TASKS)
    _check("template", template, tuple(TEMPLATES))
    if (object_classifier is None) != (style_classifier is None):
        raise ValueError(
            "object_classifier, style_classifier: expected both, or neither to classify nothing, got one of them"
        )
    both = sorted(set(seeds) & set(sweep_seeds))
    if both or not seeds:
        raise ValueError(
            f"seeds: expected some, none of them in sweep_seeds, got {list(seeds)} and {list(sweep_seeds)}"
        )
    judge = None
    if object_classifier is not None:
        files = find_classifier(object_classifier, OBJECT_FILE), find_classifier(style_classifier, STYLE_FILE)
        judge = partial(_judge, *files, task)
    return EvaluatedWorld(
        name=f"UnlearnCanvas ({task} unlearning, {template} prompts)",
        objects=OBJECTS if task == "object" else STYLES,
        styles=THEMES if task == "object" else OBJECTS,
        prompts=partial(prompts, task=task, template=template),
        pipeline=partial(_pipeline, base, size),
        judge=judge,
        kinds=saved_kinds(erasers, steering or {}, strengths or {}, steps, guidance),
        seeds=tuple(seeds),
        sweep_seeds=tuple(sweep_seeds),
        batch=batch,
        scheduler=ddim,
    )


def prompts(seed: int, task: str = "object", template: str = "saeuron") -> list[Prompt]:
    """The prompts of one seed, object by object, styles in index order and none last; for task "style" the concept is
    the style, and the style the object."""
    _check("task", task, TASKS)
    styles = (*STYLES, None) if task == "object" else STYLES
    return [_prompt(thing, style, seed, task, template) for thing in OBJECTS for style in styles]


def prompt_text(thing: str, style: str | None, template: str = "saeuron") -> str:
    """The prompt of an object in a style or (None) in none. Underscores become spaces; the official template says
    "Photo" for `PHOTO`.

    Raises:
        ValueError: another template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}; got {template!r}")
    styled, plain = TEMPLATES[template]
    if style is None:
        return plain.format(object=thing)
    if style == PHOTO and template == "official":
        style = "Photo"
    return styled.format(object=thing, style=style.replace("_", " "))


def ddim(pipe: Any) -> Any:
    """DDIM with the settings of the pipeline's own scheduler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(pipe.scheduler.config)


def find_classifier(path_or_repo: PathOrRepo, stem: str) -> Path:
    """A file as it is; of a folder or Hub repository, its `stem`.safetensors or `stem`.pth. ValueError: neither."""
    from lbdt.runs.hub import resolve_folder

    if Path(path_or_repo).is_file():
        return Path(path_or_repo)
    names = tuple(stem + suffix for suffix in _SUFFIXES)
    folder = resolve_folder(path_or_repo, None, marker=names, files=names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{os.fspath(path_or_repo)}: expected a file {' or '.join(names)} in it; name the file itself"
    )


def _prompt(thing: str, style: str | None, seed: int, task: str, template: str) -> Prompt:
    text = prompt_text(thing, style, template)
    return Prompt(text, thing, style, seed) if task == "object" else Prompt(text, style, thing, seed)


def _check(argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument}: expected one of {', '.join(allowed)}; got {value!r}")


def _pipeline(base: PathOrRepo, size: int | None, device: torch.device) -> Any:
    from lbdt.activations.pipelines import load_pipeline

    pipe = load_pipeline(base, device)
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    if size is not None and own != size:
        raise ValueError(
            f"base: {os.fspath(base)} generates {own} x {own} pixels; the protocol has {size}. Give SD 1.5 "
            f"fine-tuned on UnlearnCanvas, or size=None"
        )
    return pipe


def _judge(object_classifier: Path, style_classifier: Path, task: str, device: Any) -> ViTJudge:
    from lbdt.evaluation.worlds.vit import ViTJudge, load_vit

    things = load_vit(object_classifier, len(OBJECTS)).to(device)
    themes = load_vit(style_classifier, len(THEMES)).to(device)
    swapped = None if task == "object" else {THEMES.index(style): i for i, style in enumerate(STYLES)}
    return ViTJudge(things, themes, swapped)
