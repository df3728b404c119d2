"""UnlearnCanvas as the attack's subject: its pairs, its sampling, and one of its classifiers as the judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lbdt.activations.prompts import Prompt
from lbdt.evaluation.worlds import unlearncanvas as world

if TYPE_CHECKING:
    import torch
    from PIL import Image

TASKS = world.TASKS
STEPS, GUIDANCE = world.STEPS, world.GUIDANCE


class ClassifierNames:
    """A judge of the attack: the class that UnlearnCanvas' classifier of objects or of themes sees in each picture."""

    def __init__(self, classifier: world.PathOrRepo, task: str, device: torch.device) -> None:
        """
        Args:
            classifier: the file of task "object" style50_cls.pth, of "style" style50.pth (or .safetensors), or a folder
                or Hub repository that holds it.

        Raises:
            ValueError: no such file, or another classifier.
        """
        from lbdt.evaluation.worlds.vit import load_vit

        stem, self._classes = (world.OBJECT_FILE, world.OBJECTS)
        if task == "style":
            stem, self._classes = world.STYLE_FILE, world.THEMES
        self._vit = load_vit(world.find_classifier(classifier, stem), len(self._classes)).to(device)
        self.name = f"UnlearnCanvas ViT {self._vit.name}"

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """One name a picture."""
        return [self._classes[index] for index in self._vit(pictures)[0].argmax(-1).tolist()]


def pairs(
    task: str,
    concepts: Sequence[str],
    styles: Sequence[str],
    known: Sequence[str],
    seed: int,
    thin: bool = False,
) -> list[Prompt]:
    """A prompt by SAeUron's template for each concept and each of the 50 styles, or of task "style" for each style as
    the concept and each of the 20 objects as its `Prompt.style`; all start from `seed`, as published.

    Args:
        concepts, styles: empty: those of the protocol that the eraser knows, and all.
        known: the concepts that the eraser knows.
        thin: of what is not named, every fifth concept and every third style.

    Raises:
        ValueError: a name that the protocol has not; an eraser that knows none of its concepts.
    """
    erased, beside = (world.OBJECTS, world.STYLES) if task == "object" else (world.STYLES, world.OBJECTS)
    for option, given, there in (("--concept", concepts, erased), ("--style", styles, beside)):
        unknown = [name for name in given if name not in there]
        if unknown:
            raise ValueError(f"{option} {unknown[0]}: UnlearnCanvas, --task {task}, has {', '.join(there)}")
    concepts = tuple(concepts) or tuple(name for name in erased if name in known)[:: 5 if thin else 1]
    if not concepts:
        raise ValueError(
            f"--eraser: knows none of UnlearnCanvas' concepts of --task {task}, only {', '.join(known)}"
        )
    styles = tuple(styles) or beside[:: 3 if thin else 1]
    order = (lambda c, s: (c, s)) if task == "object" else (lambda c, s: (s, c))
    return [Prompt(world.prompt_text(*order(c, s)), c, s, seed) for c in concepts for s in styles]


def prepared(pipe: Any) -> Any:
    """`pipe` itself, with DDIM, as published."""
    pipe.scheduler = world.ddim(pipe)
    return pipe
