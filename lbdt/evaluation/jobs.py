"""The pictures that an evaluation generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lbdt.activations.prompts import Prompt
from lbdt.evaluation.evaluated_world import EvaluatedWorld


@dataclass(frozen=True)
class Job:
    """One picture: its prompt, and the concepts that are erased while it is made, in the order of the
    requests."""

    prompt: Prompt
    erased: tuple[str, ...] = ()
    beside: str | None = None
    """The object of a pair's prompt that is to stay; None: the prompt names one object, or none."""

    @property
    def own(self) -> bool:
        """Whether the prompt names the erased concept and nothing else."""
        return self.beside is None and self.prompt.concept in self.erased

    @property
    def other(self) -> bool:
        """Whether it names one object, which is not erased."""
        return self.beside is None and self.prompt.concept not in (None, *self.erased)

    @property
    def empty(self) -> bool:
        """Whether it names no object."""
        return self.prompt.concept is None


def unedited(job: Job) -> Job:
    """The same picture, with nothing erased."""
    return replace(job, erased=())


@dataclass(frozen=True)
class Design:
    """How many pictures; None: all. `own`: prompts of the erased concept, `others`: of other ones, `pairs`: of it and
    another one, `empty`: of none, per erased concept and seed."""

    own: int | None = None
    others: int | None = None
    pairs: int | None = None
    empty: int | None = None
    sweep_own: int = 2
    sweep_others: int = 1
    by_class: bool = True
    """Choose strength and selection for each concept, too."""
    strengths: int | None = None
    """Strengths of the steering sweep, spread over the kind's."""
    ablation_own: int = 2
    ablation_others: int = 2
    """Prompts for paddings and donors, on the first seed."""
    counts: tuple[int, ...] = (1, 3, 9)
    """Concepts erased together."""
    per_object: int = 2
    """Prompts of each object for the concepts erased together."""
    one_after_another: bool = True
    """Erase them also by one attachment each, in their order."""

    def __post_init__(self) -> None:
        for name, least in (("own", 1), ("others", 1), ("strengths", 1), ("pairs", 0), ("empty", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected a number from {least}, or None for all; got {value}")

    def describe(self, world: EvaluatedWorld, concepts: int) -> str:
        """One sentence for the report, of so many erased concepts."""
        own = "every style and none" if self.own is None else f"{self.own} of its styles"
        others = (
            "all prompts of all others"
            if self.others is None
            else f"{self.others} of other objects, in turn, weighted in CRA as if they were all"
        )
        text = (
            f"each of {concepts} concepts erased, per seed, from its own prompts in {own}, and from {others}"
        )
        if world.pairs is not None and self.pairs != 0:
            count = "all" if self.pairs is None else str(self.pairs)
            text += f"; from {count} pairs of it and another object"
        if world.empty is not None and self.empty != 0:
            text += f"; from {'all' if self.empty is None else self.empty} prompts of no object"
        return text


def targets(
    world: EvaluatedWorld, seed: int, place: int, own: int | None, others: int | None, concepts: Sequence[str]
) -> list[Job]:
    """The pictures of one seed, the `place`-th of its list: for every one of `concepts`, `own` of its own
    prompts and `others` of other objects' (None: all, or fewer where the world has no more). Samples rotate
    through styles and objects with the concept and the seed."""
    grid = _grid(world, seed)
    styles: tuple[str | None, ...] = (*world.styles, None)
    jobs = []
    for concept in concepts:
        index = world.objects.index(concept)
        mine = [style for style in styles if (concept, style) in grid]
        jobs += [Job(grid[concept, mine[s]], (concept,)) for s in _spread(len(mine), own, index + place)]
        rest = [name for name in world.objects if name != concept]
        if others is None:
            jobs += [
                Job(grid[name, style], (concept,))
                for name in rest
                for style in styles
                if (name, style) in grid
            ]
            continue
        jobs += [Job(prompt, (concept,)) for prompt in _sample(grid, rest, others, index, place)]
    return list(dict.fromkeys(jobs))


def _sample(
    grid: Mapping[tuple[str | None, str | None], Prompt],
    names: Sequence[str],
    count: int,
    turn: int,
    place: int,
) -> list[Prompt]:
    """`count` prompts of `names`, which take turns with concepts and seeds, as do each one's styles; styled
    prompts where there are any, as they tell of objects and styles both."""
    by_name: dict[str, list[Prompt]] = {name: [] for name in names}
    for (name, style), prompt in grid.items():
        if name in by_name and style is not None:
            by_name[name].append(prompt)
    for name, prompts in by_name.items():
        if not prompts and (name, None) in grid:
            prompts.append(grid[name, None])
    able = [prompts for prompts in by_name.values() if prompts]
    if not able:
        return []
    count = min(count, sum(map(len, able)))
    chosen: dict[Prompt, None] = {}
    number = 0
    while len(chosen) < count:
        prompts = able[(turn + number + count * place) % len(able)]
        # Names count up and styles down, so that pairs do not repeat; the last term moves on where both come round.
        style = turn + place - number + number // (len(able) * len(prompts))
        chosen[prompts[style % len(prompts)]] = None
        number += 1
    return list(chosen)


def pairs(world: EvaluatedWorld, seed: int, count: int | None, concepts: Sequence[str]) -> list[Job]:
    """The pictures, for every one of `concepts`, of the world's first `count` prompts of it and another object (None:
    all), from which it alone is erased."""
    if world.pairs is None or count == 0:
        return []
    found: dict[str, list[Job]] = {name: [] for name in concepts}
    for pair in world.pairs(seed):
        name = pair.prompt.concept
        if name in found:
            found[name].append(Job(pair.prompt, (name,), pair.beside))
    return [job for jobs in found.values() for job in jobs[:count]]


def empties(
    world: EvaluatedWorld, seed: int, place: int, count: int | None, concepts: Sequence[str]
) -> list[Job]:
    """The pictures, for every one of `concepts`, of `count` prompts of no object (None: all), in turn, with it
    erased."""
    prompts = () if world.empty is None or count == 0 else world.empty(seed)
    if not prompts:
        return []
    count = len(prompts) if count is None else min(count, len(prompts))
    return [
        Job(prompts[((world.objects.index(name) + place) * count + n) % len(prompts)], (name,))
        for name in concepts
        for n in range(count)
    ]


def together(world: EvaluatedWorld, seed: int, erased: tuple[str, ...], per_object: int) -> list[Job]:
    """Pictures of every object in `per_object` styles (without one if it has none), with all of `erased`
    erased."""
    grid = _grid(world, seed)
    jobs = []
    for number, name in enumerate(world.objects):
        mine: list[str | None] = [style for style in world.styles if (name, style) in grid]
        if not mine and (name, None) in grid:
            mine = [None]
        jobs += [Job(grid[name, mine[s]], erased) for s in _spread(len(mine), per_object, number)]
    return jobs


def erased_together(concepts: Sequence[str], count: int) -> tuple[str, ...]:
    """The first `count` requests: every other concept, so that related neighbours of the list are not all
    erased."""
    order = [*concepts[1::2], *concepts[::2]]
    return tuple(order[:count])


def _grid(world: EvaluatedWorld, seed: int) -> dict[tuple[str | None, str | None], Prompt]:
    return {(prompt.concept, prompt.style): prompt for prompt in world.prompts(seed)}


def _spread(size: int, count: int | None, offset: int) -> list[int]:
    if count is None or count >= size:
        return list(range(size))
    return [(offset + number * size // count) % size for number in range(count)]
