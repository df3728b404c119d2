"""The published UnlearnCanvas protocol as an evaluation's world (METHOD.md, 8.1 to 8.3): SD 1.5 fine-tuned on
"style50", 20 objects, 50 styles, two ViT classifiers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbdt.activations.prompts import Prompt
from lbdt.evaluation.evaluated_world import EvaluatedWorld, Judge
from lbdt.evaluation.start_noise import NOISES, RunNoise
from lbdt.evaluation.worlds import PathOrRepo, saved_kinds
from lbdt.evaluation.worlds.jpeg import QUALITY, JpegJudge

if TYPE_CHECKING:
    import torch

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
"""Styled and plain: "saeuron" is SAeUron's, SAEmnesia's and PER's, "official" UnlearnCanvas' own, which asks for
photographs instead of a plain form: that is ours. Figures of the two are not of identical prompts."""
SEEDS = (188, 288, 588, 688, 888)
SWEEP_SEEDS = (42,)
STEPS, GUIDANCE, SIZE = 100, 9.0, 512
TASKS = ("object", "style")
JUDGED = ("jpeg", "png")
CRA = ("named", "unnamed", "all")
COMPARED = ("styled", "others")
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
    noise: str = "run",
    judged: str = "jpeg",
    cra: str | None = None,
    compared: str = "styled",
    seeds: Sequence[int] = SEEDS,
    sweep_seeds: Sequence[int] = SWEEP_SEEDS,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    size: int | None = SIZE,
    batch: int = 10,
) -> EvaluatedWorld:
    """Object unlearning as SAeUron, SAEmnesia and PER evaluate it, or style unlearning: the same with the roles
    swapped. DDIM whatever the base model's scheduler, eta 0.

    - task "object": `objects` are the 20, `styles` the 51 themes of the classifier. A seed has 1020 prompts: 20 objects
      in 50 styles and in none; of the official template in 50 styles and as `PHOTO`, which the other never asks for.
    - task "style": `objects` are the 50 styles, `styles` the 20 objects. A seed has the 1000 styled prompts, and 20 of
      no style (of the official template: photographs), which are the world's `empty`. A picture that the classifier
      calls `PHOTO` is of object -1: none of them. UA and IRA of the evaluation are style accuracies and its CRA the
      object accuracy (METHOD.md, 8.3).

    Args:
        base: diffusers folder or Hub repository of the fine-tuned model.
        erasers, steering, strengths: by name of the kind; see `lbdt.evaluation.worlds.saved_kinds`.
        object_classifier, style_classifier: a file, or a folder or Hub repository that holds style50_cls.pth and
            style50.pth (or .safetensors). None, both: pictures are not classified.
        task: "object" | "style".
        template: "saeuron" "An image of {object} in {style} style." | "official" "A {object} image in {style} style."
        noise: "run", as published: a seed's pictures draw their start noise in turn from one generator
            (`run_noise`) | "prompt": each starts from a generator of its own, of that seed.
        judged: "jpeg", as published: the classifiers see pictures as JPEG files of them | "png": as they are.
        cra: of task "style", whose pictures CRA is of (METHOD.md, 8.3): "named", those of the styled prompts |
            "unnamed", of the others alone, as SAeUron's script | "all", as UnlearnCanvas'. None: the published one of
            the template. Of task "object" there is "named" alone.
        compared: what the Frechet distance is of: "styled", as published, neither the erased concept's pictures nor
            photographs nor those of no style | "others": all but the erased concept's.
        size: pixels a side that the base model must generate by itself; None: any.
        batch: pictures that are generated together.

    Raises:
        ValueError: an unknown task, template or rule, one classifier without the other, or one that is not there,
            what `saved_kinds` refuses, a seed in both lists. When it is used: a base model of another size, what
            `load_vit` refuses.
    """
    _check("task", task, TASKS)
    _check("template", template, tuple(TEMPLATES))
    _check("noise", noise, NOISES)
    _check("judged", judged, JUDGED)
    _check("compared", compared, COMPARED)
    cra = _published_cra(task, template) if cra is None else cra
    _check("cra", cra, CRA if task == "style" else CRA[:1])
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
        judge = partial(_judge, *files, task, judged)
    styled = compared == "styled"
    return EvaluatedWorld(
        name=f"UnlearnCanvas ({task} unlearning, {template} prompts)",
        objects=OBJECTS if task == "object" else STYLES,
        styles=THEMES if task == "object" else OBJECTS,
        prompts=partial(prompts, task=task, template=template),
        empty=partial(unstyled, template=template) if task == "style" else None,
        noise=run_noise(template) if noise == "run" else None,
        cra=cra,
        compared=STYLES if styled and task == "object" else None,
        rules=_rules(task, judged, cra, compared),
        pipeline=partial(_pipeline, base, size),
        judge=judge,
        kinds=saved_kinds(erasers, steering or {}, strengths or {}, steps, guidance),
        seeds=tuple(seeds),
        sweep_seeds=tuple(sweep_seeds),
        batch=batch,
        scheduler=ddim,
    )


def prompts(seed: int, task: str = "object", template: str = "saeuron") -> list[Prompt]:
    """The prompts of one seed, object by object, styles in index order and none last (official: every theme in index
    order); for task "style" the concept is the style, and the style the object."""
    _check("task", task, TASKS)
    styles: tuple[str | None, ...] = STYLES
    if task == "object":
        styles = THEMES if template == "official" else (*STYLES, None)
    return [_prompt(thing, style, seed, task, template) for thing in OBJECTS for style in styles]


def unstyled(seed: int, template: str = "saeuron") -> list[Prompt]:
    """Task "style": the prompts of one seed that name no style, one an object; official: of photographs."""
    style = PHOTO if template == "official" else None
    return [Prompt(prompt_text(thing, style, template), None, thing, seed) for thing in OBJECTS]


def run_noise(template: str = "saeuron") -> RunNoise:
    """The order in which the published scripts draw start noise while one concept is erased (METHOD.md, 8.1).

    "saeuron", as its scripts with one process: a call of the pipeline for each style, of the 20 objects in it and then
    the 20 in none, whose pictures the next call replaces. "official": a call for each theme and object.
    """
    if template == "official":
        return RunNoise([[prompt_text(thing, theme, template)] for theme in THEMES for thing in OBJECTS])
    return RunNoise(
        [[prompt_text(thing, s, template) for s in (style, None) for thing in OBJECTS] for style in STYLES]
    )


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


def _published_cra(task: str, template: str) -> str:
    if task == "object":
        return "named"
    return "all" if template == "official" else "unnamed"


def _rules(task: str, judged: str, cra: str, compared: str) -> str:
    seen = f"JPEG files of quality {QUALITY}" if judged == "jpeg" else "the pictures as they are"
    named, unnamed = ("object", "style") if task == "object" else ("style", "object")
    of = {"named": f"that name a {named}", "unnamed": f"that name no {named}", "all": "of every kind"}[cra]
    styled = "in a style" if compared == "styled" else "of every kind"
    return f"judged: {seen}; CRA: {unnamed} accuracy over prompts {of}; FD: of other concepts' pictures, {styled}"


def _judge(object_classifier: Path, style_classifier: Path, task: str, judged: str, device: Any) -> Judge:
    from lbdt.evaluation.worlds.vit import ViTJudge, load_vit

    things = load_vit(object_classifier, len(OBJECTS)).to(device)
    themes = load_vit(style_classifier, len(THEMES)).to(device)
    swapped = None if task == "object" else {THEMES.index(style): i for i, style in enumerate(STYLES)}
    judge = ViTJudge(things, themes, swapped)
    return JpegJudge(judge) if judged == "jpeg" else judge
