"""What an evaluation runs on: prompts with labels, a pipeline, the methods that erase, and a judge of the pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from lbdt.activations.prompts import Prompt
    from lbdt.editors import ConceptEraser, Steering
    from lbdt.evaluation.start_noise import RunNoise


class Verdicts(NamedTuple):
    """What a judge says of n pictures."""

    objects: Tensor
    """bool [n, O]: which of the world's O objects are seen; no True: none of them."""
    styles: Tensor | None
    """int64 [n], indices into the world's styles; None: the judge knows none."""
    features: Tensor
    """float32 [n, F], of the judge's feature space."""


class Pair(NamedTuple):
    """A prompt of two objects."""

    prompt: Prompt
    """Its `concept` is the object that may be erased."""
    beside: str
    """The other object, which is to stay."""


class Judge(Protocol):
    """Classifies pictures and describes them by features.

    One that always sees exactly one object, as a classifier of single labels does, says so by `single_label = True`:
    whether nothing is seen is then not measured.
    """

    name: str
    """The classifiers' name, for the report."""
    features_name: str
    """The feature space's name, for the report: a Frechet distance means nothing without it."""

    def __call__(self, pictures: Sequence[Image.Image]) -> Verdicts: ...


@dataclass(frozen=True)
class EvaluatedKind:
    """One pipeline of the comparison: an SAE's eraser, its steering baseline, and how pictures are sampled."""

    name: str
    steps: int
    guidance: float | None
    """None: the pipeline's own."""
    per: Callable[..., ConceptEraser]
    """Makes the eraser, by the keywords `padding`, `source`, `avoid` and `min_patches`; all may be left out."""
    steering: Callable[..., Steering] | None = None
    """Makes the baseline, by the keywords `strength` and `selection`; without these, the shipped one's. None: no
    baseline."""
    strengths: tuple[float, ...] = ()
    """The strengths of the steering sweep."""
    selections: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Keywords of `ConceptDictionary.select` that each class may be steered by, beside the baseline's own."""


@dataclass(frozen=True)
class EvaluatedWorld:
    """Everything that an evaluation needs to know of its subject."""

    name: str
    objects: tuple[str, ...]
    """The concepts that may be erased, in the order of the judge's classes."""
    styles: tuple[str, ...]
    """The styles of its prompts; there may be none."""
    prompts: Callable[[int], Sequence[Prompt]]
    """Seed -> one prompt per object and style, and per object without a style, with labels and start seeds. No two
    seeds share a start seed of the same text; nor do those of `pairs` and `empty`."""
    pipeline: Callable[[torch.device], Any]
    """The diffusers pipeline on a device."""
    judge: Callable[[torch.device], Judge] | None
    """None: nothing can be classified, and UA, IRA and CRA are absent."""
    kinds: Mapping[str, EvaluatedKind]
    seeds: tuple[int, ...]
    """The seeds that are scored, if none are given."""
    sweep_seeds: tuple[int, ...]
    """The seeds that the steering strength is chosen on; none of `seeds`."""
    batch: int = 20
    """Pictures that are generated together."""
    noise: RunNoise | None = None
    """What the pictures start from; None: each from its prompt's seed."""
    scheduler: Callable[[Any], Any] | None = None
    """Pipeline -> the scheduler that the protocol demands; None: the pipeline's own."""
    cra: str = "named"
    """What CRA is of: "named", pictures of prompts that name an object, "unnamed", of those of `empty`, or "all"."""
    compared: tuple[str, ...] | None = None
    """The styles whose pictures the Frechet distance is of; None: every picture of another object."""
    rules: str | None = None
    """How pictures are scored where that is a choice, for the report."""
    reference: Callable[[str], Any] | None = field(default=None)
    """Kind -> fitted `FeatureJudge` of the unedited generations; None: fitted on the base run's pictures."""
    pairs: Callable[[int], Sequence[Pair]] | None = None
    """Seed -> prompts of two objects, some for every object as the one that is erased, of which an evaluation may take
    the first ones only; None: the world has none."""
    empty: Callable[[int], Sequence[Prompt]] | None = None
    """Seed -> prompts of no object; None: the world has none."""
    texts: Callable[[str | None], Sequence[str]] | None = None
    """Concept -> how its users would name it to a method that works by text, one text or more; None -> as many texts
    that name none, in the same order. None: a concept's name, and the empty text."""


def one_seen(classes: Tensor, count: int) -> Tensor:
    """`Verdicts.objects` of a judge that sees one object in every picture.

    Args:
        classes: int64 [n], indices into the world's objects; -1: a class that is none of them.
        count: O, the world's objects.

    Returns:
        bool [n, O].
    """
    import torch

    return classes.unsqueeze(1) == torch.arange(count, device=classes.device)
