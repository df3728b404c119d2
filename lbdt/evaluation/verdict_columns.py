"""The judge's columns of a series, looked up by job, and the figures of a set of jobs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbdt.evaluation.evaluated_world import EvaluatedWorld, Judge
from lbdt.evaluation.jobs import Job, unedited
from lbdt.evaluation.metrics.accuracy import (
    Unlearning,
    average,
    estimate,
    global_average,
    mean_by,
    named_seen,
    unlearning,
)
from lbdt.evaluation.metrics.clip import clip_scores
from lbdt.evaluation.metrics.feature_distances import frechet_distance
from lbdt.evaluation.metrics.vlm import parse_answer
from lbdt.evaluation.series import SeriesFiles

BASE_ACCURACIES = ("object seen", "both seen", "nothing seen", "style seen")
"""What is measured of the unedited pictures alone."""


@dataclass(frozen=True)
class VerdictColumns:
    """What is known of every picture of a series; None: not measured."""

    place: Mapping[Job, int]
    objects: Tensor | None
    """bool [n, O]."""
    styles: Tensor | None
    features: Tensor | None
    artifacts: Tensor | None
    """float64 [n]: 1 an artifact, 0 none, NaN where the artifact judge gave no answer."""
    clip: Tensor | None
    """float64 [n]: CLIP scores of picture and prompt."""
    replaced: Tensor
    """float64 [n]: share of the patches changed in the picture's batch."""
    digests: Tensor
    """int64 [n], of the pictures' bits."""
    changed: Tensor | None = None
    """int64 [n]: patches that were changed in the picture; None: not by hooks."""
    single_label: bool = False
    """Whether the judge sees one object in every picture, so never nothing."""

    def rows(self, jobs: Sequence[Job]) -> Tensor:
        """int64 [n]: where the pictures of `jobs` are."""
        return torch.tensor([self.place[job] for job in jobs], dtype=torch.int64)


@dataclass(frozen=True)
class Scorers:
    """What looks at pictures."""

    judge: Judge | None = None
    artifacts: Any = None
    """`lbdt.evaluation.metrics.feature_distances.FeatureJudge`, or None."""
    vlm: Any = None
    """`lbdt.evaluation.metrics.vlm.ArtifactJudge`, instead of `artifacts`, or None."""
    clip: Any = None
    """`lbdt.evaluation.metrics.clip.Clip`, or None."""


def columns(files: SeriesFiles, scorers: Scorers) -> VerdictColumns:
    """The columns of a complete series, from the verdicts in its folder."""
    batches = files.series.batches(files.size)
    verdicts = [files.judge(index, scorers.judge) for index in range(len(batches))] if scorers.judge else None
    objects = styles = features = artifacts = clip = None
    if verdicts:
        objects = torch.cat([verdict.objects for verdict in verdicts])
        features = torch.cat([verdict.features for verdict in verdicts])
        if verdicts[0].styles is not None:
            styles = torch.cat([verdict.styles for verdict in verdicts])
    if scorers.vlm is not None:
        artifacts = torch.cat([scored_vlm(files, index, scorers.vlm) for index in range(len(batches))])
    elif scorers.artifacts is not None and features is not None:
        artifacts = scorers.artifacts.artifacts(features).double()
    if scorers.clip is not None:
        clip = torch.cat([scored_clip(files, index, scorers.clip) for index in range(len(batches))])
    replaced = [
        torch.full((len(batch),), sum(files.record(index)["replaced"]), dtype=torch.float64)
        for index, batch in enumerate(batches)
    ]
    kept = ("digests",) if files.series.shared else ("digests", "changed")
    tensors = [files.tensors(index, kept) for index in range(len(batches))]
    digests, *changed = (torch.cat([each[name] for each in tensors]) for name in kept)
    jobs = itertools.chain.from_iterable(batches)
    return VerdictColumns(
        {job: number for number, job in enumerate(jobs)},
        objects,
        styles,
        features,
        artifacts,
        clip,
        torch.cat(replaced),
        digests,
        changed[0] if changed else None,
        bool(getattr(scorers.judge, "single_label", False)),
    )


def scored_vlm(files: SeriesFiles, index: int, vlm: Any) -> Tensor:
    """A vision language model's answers on batch `index`: 1 artifact, 0 clean, NaN no answer; kept, so asked
    once."""

    def answers() -> dict[str, Tensor]:
        said = [parse_answer(vlm.answer(picture)) for picture in files.pictures(index)]
        return {"artifacts": torch.tensor([-1.0 if yes is None else float(yes) for yes in said])}

    got = files.scored(index, f"artifacts, {vlm.name}, {vlm.question}", answers)["artifacts"].double()
    return torch.where(got < 0, torch.nan, got)


def scored_clip(files: SeriesFiles, index: int, clip: Any) -> Tensor:
    """CLIP scores of batch `index`; kept."""

    def scores() -> dict[str, Tensor]:
        texts = [job.prompt.text for job in files.series.batches(files.size)[index]]
        return {"clip": clip_scores(clip, files.pictures(index), texts)}

    return files.scored(index, f"clip, {clip.name}", scores)["clip"].double()


@dataclass(frozen=True)
class Figures:
    """What the jobs of one row came to, by seed."""

    by_seed: list[dict[str, float | None]]
    concepts: dict[str, dict[str, float | None]]
    """The rates over all seeds together."""
    styles: dict[str, float | None]
    """AR by the style of the prompt, "none" without one; over all seeds together."""
    pictures: int
    unanswered: int
    """Pictures on which the artifact judge gave no answer; they are not in AR."""

    def row(self) -> dict[str, Any]:
        """The metrics with their intervals over the seeds."""
        return {name: estimate([seed[name] for seed in self.by_seed]) for name in self.by_seed[0]}

    def counts(self) -> dict[str, int]:
        """Pictures, and where there are some, those without an answer."""
        return {"pictures": self.pictures} | ({"unanswered": self.unanswered} if self.unanswered else {})


def figures(
    world: EvaluatedWorld,
    jobs: Mapping[int, Sequence[Job]],
    got: VerdictColumns,
    base: VerdictColumns | None,
    edited: bool,
) -> Figures:
    """The metrics of `jobs` (by seed) on a series' columns.

    `base`: of the unedited pictures of the same prompts, for the Frechet distance and for which are the same.
    `edited` False: `got` are the unedited pictures themselves, scored as if the jobs' concepts had been erased,
    and by `BASE_ACCURACIES`.
    """
    by_seed = [_one(world, part, got, base, edited) for part in jobs.values()]
    whole = [job for part in jobs.values() for job in part]
    scores = _unlearning(world, whole, got, edited)
    concepts: dict[str, dict[str, float | None]] = {}
    for index, score in scores.items():
        name = world.objects[index]
        own = [job for job in whole if job.erased == (name,) and job.own]
        concepts[name] = {
            "UA": score.ua,
            "IRA": score.ira,
            "CRA": score.cra,
            "AR": _artifacts(own, got, edited),
        }
    styles = {
        style or "none": _artifacts(
            [job for job in whole if job.own and job.prompt.style == style],
            got,
            edited,
        )
        for style in (*world.styles, None)
    }
    looked_up = list(dict.fromkeys(_key(job, edited) for job in whole))
    unanswered = 0 if got.artifacts is None else int(got.artifacts[got.rows(looked_up)].isnan().sum())
    return Figures(by_seed, concepts, styles, len(looked_up), unanswered)


def _one(
    world: EvaluatedWorld, jobs: Sequence[Job], got: VerdictColumns, base: VerdictColumns | None, edited: bool
) -> dict[str, float | None]:
    scores = list(_unlearning(world, jobs, got, edited).values())
    ua, ira, cra = (average([score[n] for score in scores]) for n in range(3))
    own = [job for job in jobs if job.own]
    others = [job for job in jobs if job.other]
    rate, collateral = _artifacts(own, got, edited), _artifacts(others, got, edited)
    distance = None
    if base is not None and edited and got.features is not None:
        distance = _frechet(world, others, got, base)
    return {
        "UA": ua,
        "IRA": ira,
        "CRA": cra,
        "AR": rate,
        "AR others": collateral,
        "GA": global_average(ua, ira, cra, rate) if edited else None,
        "FD": distance,
        **_beside_the_protocol(world, jobs, got, base, edited),
        "CLIP": None
        if got.clip is None or not others
        else float(got.clip[_rows(others, got, edited)].mean()),
        "replaced": 100 * float(got.replaced[_rows(jobs, got, edited)].mean()) if edited else 0.0,
    }


def _frechet(
    world: EvaluatedWorld, others: Sequence[Job], got: VerdictColumns, base: VerdictColumns
) -> float | None:
    """The distance from the unedited pictures of the same prompts; None: too few that are compared."""
    if world.compared is not None:
        others = [job for job in others if job.prompt.style in world.compared]
    if len(others) < 2:
        return None
    same = base.rows([unedited(job) for job in others])
    return frechet_distance(got.features[got.rows(others)], base.features[same])


def _beside_the_protocol(
    world: EvaluatedWorld, jobs: Sequence[Job], got: VerdictColumns, base: VerdictColumns | None, edited: bool
) -> dict[str, float | None]:
    """The columns of METHOD.md, 8.8, of an edited series, or the accuracies of the unedited one."""
    if not edited:
        return dict(zip(BASE_ACCURACIES, _accuracies(world, jobs, got), strict=True))
    own = [job for job in jobs if job.own]
    pairs = [job for job in jobs if job.beside is not None]
    nothing, clean = _nothing(own, got), None
    if nothing is not None and got.artifacts is not None:
        artifact = got.artifacts[got.rows(own)]
        answered = ~artifact.isnan()
        clean = (nothing * (artifact == 0))[answered]
        own = [job for job, there in zip(own, answered.tolist(), strict=True) if there]
    gone = _seen(world, pairs, got, _named)
    untouched = [job for job in jobs if job.other or job.empty]
    return {
        "clean": _by_object(world, own, clean),
        "kept": _by_object(world, pairs, _seen(world, pairs, got, _beside)),
        "pair gone": _by_object(world, pairs, None if gone is None else 1 - gone),
        "untouched": _mean(_same(untouched, got, base)),
    }


def _accuracies(world: EvaluatedWorld, jobs: Sequence[Job], got: VerdictColumns) -> tuple[float | None, ...]:
    """Those of `BASE_ACCURACIES`; every unedited picture counts once, however many jobs it stands for."""
    jobs = list(dict.fromkeys(map(unedited, jobs)))
    single = [job for job in jobs if job.other]
    pairs = [job for job in jobs if job.beside is not None]
    styled = [job for job in jobs if job.prompt.style in world.styles]
    if world.cra == "unnamed":
        styled = [job for job in styled if job.empty]
    both = [_seen(world, pairs, got, name) for name in (_named, _beside)]
    return (
        _by_object(world, single, _seen(world, single, got, _named)),
        _by_object(world, pairs, None if both[0] is None else both[0] * both[1]),
        _mean(_nothing([job for job in jobs if job.empty], got)),
        _mean(_style_seen(world, styled, got)),
    )


def _named(job: Job) -> str:
    """The object of a prompt; of a pair's the one that is erased."""
    return job.prompt.concept


def _beside(job: Job) -> str:
    return job.beside


def _seen(
    world: EvaluatedWorld, jobs: Sequence[Job], got: VerdictColumns, name: Callable[[Job], str]
) -> Tensor | None:
    """float64 [n]: whether an object of each job is seen; None: not judged, or no job."""
    if got.objects is None or not jobs:
        return None
    objects = torch.tensor([world.objects.index(name(job)) for job in jobs])
    return named_seen(got.objects[got.rows(jobs)], objects)


def _nothing(jobs: Sequence[Job], got: VerdictColumns) -> Tensor | None:
    """float64 [n]: whether no object is seen; None: not judged, by a judge that always sees one, or no job."""
    if got.objects is None or got.single_label or not jobs:
        return None
    return (~got.objects[got.rows(jobs)].any(1)).double()


def _style_seen(world: EvaluatedWorld, jobs: Sequence[Job], got: VerdictColumns) -> Tensor | None:
    if got.styles is None or not jobs:
        return None
    styles = torch.tensor([world.styles.index(job.prompt.style) for job in jobs])
    return (got.styles[got.rows(jobs)] == styles).double()


def _same(jobs: Sequence[Job], got: VerdictColumns, base: VerdictColumns | None) -> Tensor | None:
    """float64 [n]: whether a picture keeps every bit. With hooks, where no patch was changed (a picture's last bits
    may depend on its batch, which the base's is not); else by comparing with the base's picture."""
    if not jobs or (got.changed is None and base is None):
        return None
    rows = got.rows(jobs)
    if got.changed is not None:
        return (got.changed[rows] == 0).double()
    return (got.digests[rows] == base.digests[base.rows([unedited(job) for job in jobs])]).double()


def _by_object(world: EvaluatedWorld, jobs: Sequence[Job], values: Tensor | None) -> float | None:
    """The mean in per cent, averaged by the object that the jobs' prompts carry."""
    if values is None or not len(values):
        return None
    return 100 * mean_by(values, torch.tensor([world.objects.index(job.prompt.concept) for job in jobs]))


def _mean(values: Tensor | None) -> float | None:
    return None if values is None or not len(values) else 100 * float(values.mean())


def _unlearning(
    world: EvaluatedWorld, jobs: Sequence[Job], got: VerdictColumns, edited: bool
) -> dict[int, Unlearning]:
    unnamed = [job for job in jobs if job.empty]
    jobs = [job for job in jobs if job.own or job.other]
    if not jobs:
        return {}
    if got.objects is None:
        return {world.objects.index(name): Unlearning(None, None, None) for name in _targets(jobs)}
    rows = _rows(jobs, got, edited)
    objects, styles = labels(world, jobs)
    erased = torch.tensor([world.objects.index(job.erased[0]) for job in jobs])
    seen = None if got.styles is None else got.styles[rows]
    scores = unlearning(erased, objects, styles, got.objects[rows], seen)
    if world.cra == "named" or seen is None:
        return scores
    return {
        index: score._replace(
            cra=_cra(
                world, [job for job in unnamed if world.objects[index] in job.erased], score.cra, got, edited
            )
        )
        for index, score in scores.items()
    }


def _cra(
    world: EvaluatedWorld, unnamed: Sequence[Job], named: float | None, got: VerdictColumns, edited: bool
) -> float | None:
    """CRA that is not of the prompts of an object alone, `named`: those of none are as one object more."""
    if not unnamed:
        return None
    right = (got.styles[_rows(unnamed, got, edited)] == labels(world, unnamed)[1]).double()
    score = 100 * mean_by(right, labels(world, unnamed)[1])
    if world.cra == "unnamed":
        return score
    count = len(world.objects)
    return None if named is None else (count * named + score) / (count + 1)


def labels(world: EvaluatedWorld, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
    """Objects and styles of the prompts, int64 [n]; -1: none."""
    index = [{name: i for i, name in enumerate(names)} for names in (world.objects, world.styles)]
    return (
        torch.tensor([index[0].get(job.prompt.concept, -1) for job in jobs], dtype=torch.int64),
        torch.tensor([index[1].get(job.prompt.style, -1) for job in jobs], dtype=torch.int64),
    )


def _targets(jobs: Sequence[Job]) -> list[str]:
    return list(dict.fromkeys(job.erased[0] for job in jobs))


def _artifacts(jobs: Sequence[Job], got: VerdictColumns, edited: bool) -> float | None:
    if got.artifacts is None or not jobs:
        return None
    said = got.artifacts[_rows(jobs, got, edited)]
    said = said[~said.isnan()]
    return 100 * float(said.mean()) if len(said) else None


def _rows(jobs: Sequence[Job], got: VerdictColumns, edited: bool) -> Tensor:
    return got.rows([_key(job, edited) for job in jobs])


def _key(job: Job, edited: bool) -> Job:
    return job if edited else unedited(job)
