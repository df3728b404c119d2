"""The published UnlearnCanvas protocol as an evaluation's world (METHOD.md, 8.1 to 8.3): SD 1.5 fine-tuned on
"style50", 20 objects, 50 styles, two ViT classifiers."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lbdt.activations.prompts import Prompt
from lbdt.evaluation.evaluated_world import EvaluatedWorld, Verdicts
from lbdt.evaluation.worlds import PathOrRepo, saved_kinds

if TYPE_CHECKING:
    import torch

    from lbdt.evaluation.evaluated_world import Judge
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
_PICTURES = (".jpg", ".jpeg", ".png")
_NAME = re.compile(rf"(?:({'|'.join(THEMES)})_)?({'|'.join(OBJECTS)})_seed(0|[1-9][0-9]*)")


class Picture(NamedTuple):
    """A picture that another project generated."""

    prompt: Prompt
    """The prompt of its file name."""
    path: Path


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


def picture_name(prompt: Prompt) -> str:
    """The published file name, `{theme}_{object}_seed{s}.jpg` or `{object}_seed{s}.jpg`; of either task's prompts.

    Raises:
        ValueError: other labels than UnlearnCanvas'.
    """
    labels = (prompt.concept, prompt.style)
    thing, theme = labels if labels[0] in OBJECTS else labels[::-1]
    if thing not in OBJECTS or theme not in (*THEMES, None):
        raise ValueError(
            f"prompt: expected an object and a theme of UnlearnCanvas as its labels, got {labels[0]!r} and "
            f"{labels[1]!r}"
        )
    return f"{thing}_seed{prompt.seed}.jpg" if theme is None else f"{theme}_{thing}_seed{prompt.seed}.jpg"


def read_pictures(
    folder: str | os.PathLike[str], task: str = "object", template: str = "saeuron", photos: bool = False
) -> list[Picture]:
    """The .jpg, .jpeg and .png pictures of a folder with published names, by seed, object and theme.

    What is there is what will be scored: nothing is said of pictures that are missing. `photos`: for task "object",
    also those of `PHOTO`, which the protocol does not score. Task "style" leaves out the pictures without a style.

    Raises:
        ValueError: no such folder, no picture in it, a picture of another name, two of one name.
    """
    _check("task", task, TASKS)
    _check("template", template, tuple(TEMPLATES))
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; expected pictures such as {STYLES[0]}_{OBJECTS[0]}_seed188.jpg"
        )
    found: dict[tuple[int, int, int], Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _PICTURES:
            continue
        match = _NAME.fullmatch(path.stem)
        if match is None:
            raise ValueError(
                f"{path}: expected a name such as {STYLES[0]}_{OBJECTS[0]}_seed188.jpg or {OBJECTS[0]}_seed188.jpg, of "
                f"UnlearnCanvas' objects and themes; move other pictures away"
            )
        theme, thing, seed = match.groups()
        key = (int(seed), OBJECTS.index(thing), len(THEMES) if theme is None else THEMES.index(theme))
        if key in found:
            raise ValueError(f"{path}: the same picture as {found[key].name}; keep one of them")
        found[key] = path
    rows = []
    for seed, thing, theme in sorted(found):
        style = THEMES[theme] if theme < len(THEMES) else None
        if style == PHOTO and not (photos and task == "object") or (style is None and task == "style"):
            continue
        prompt = _prompt(OBJECTS[thing], style, seed, task, template)
        rows.append(Picture(prompt, found[seed, thing, theme]))
    if not rows:
        raise ValueError(
            f"{folder}: holds no picture of the {task} task; expected {STYLES[0]}_{OBJECTS[0]}_seed188.jpg"
        )
    return rows


def judge_pictures(
    judge: Judge, pictures: Sequence[Picture], batch: int = 32, progress: bool = True
) -> Verdicts:
    """The judge's verdicts on pictures in files, in their order, opened `batch` at a time.

    Raises:
        ValueError: no pictures, or a file that is no picture or a damaged one.
    """
    import torch
    from tqdm import tqdm

    from lbdt.evaluation.pictures import read_picture

    if not pictures:
        raise ValueError("pictures: expected one or more, got none")
    parts = []
    with tqdm(
        total=len(pictures), desc="judge", unit="picture", file=sys.stderr, disable=not progress
    ) as bar:
        for first in range(0, len(pictures), batch):
            opened = [read_picture(picture.path) for picture in pictures[first : first + batch]]
            parts.append(judge(opened))
            bar.update(len(opened))
    objects, styles, features = zip(*parts, strict=True)
    return Verdicts(torch.cat(objects), None if styles[0] is None else torch.cat(styles), torch.cat(features))


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
