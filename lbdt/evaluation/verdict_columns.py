"""The judge's columns of a series, looked up by job, and the figures of a set of jobs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbdt.evaluation.evaluated_world import EvaluatedWorld, Judge
from lbdt.evaluation.jobs import Job
from lbdt.evaluation.metrics.accuracy import Unlearning, average, estimate, global_average, unlearning
from lbdt.evaluation.metrics.clip import clip_scores
from lbdt.evaluation.metrics.feature_distances import frechet_distance
from lbdt.evaluation.metrics.vlm import parse_answer
from lbdt.evaluation.series import SeriesFiles
from lbdt.evaluation.series_plan import unedited


@dataclass(frozen=True)
class VerdictColumns:
    """What is known of every picture of a series; None: not measured."""

    place: Mapping[Job, int]
    objects: Tensor | None
    styles: Tensor | None
    features: Tensor | None
    artifacts: Tensor | None
    """float64 [n]: 1 an artifact, 0 none, NaN where the artifact judge gave no answer."""
    clip: Tensor | None
    """float64 [n]: CLIP scores of picture and prompt."""
    replaced: Tensor
    """float64 [n]: share of the patches changed in the picture's batch."""

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
    jobs = itertools.chain.from_iterable(batches)
    place = {job: number for number, job in enumerate(jobs)}
    return VerdictColumns(place, objects, styles, features, artifacts, clip, torch.cat(replaced))


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

    `base`: of the unedited pictures of the same prompts, for the Frechet distance. `edited` False: `got` are
    the unedited pictures themselves, scored as if the jobs' concepts had been erased.
    """
    by_seed = [_one(world, part, got, base, edited) for part in jobs.values()]
    whole = [job for part in jobs.values() for job in part]
    scores = _unlearning(world, whole, got, edited)
    concepts: dict[str, dict[str, float | None]] = {}
    for index, score in scores.items():
        name = world.objects[index]
        own = [job for job in whole if job.erased == (name,) and job.prompt.concept == name]
        concepts[name] = {
            "UA": score.ua,
            "IRA": score.ira,
            "CRA": score.cra,
            "AR": _artifacts(own, got, edited),
        }
    styles = {
        style or "none": _artifacts(
            [job for job in whole if job.prompt.concept in job.erased and job.prompt.style == style],
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
    own = [job for job in jobs if job.prompt.concept in job.erased]
    others = [job for job in jobs if job.prompt.concept not in job.erased]
    rate, collateral = _artifacts(own, got, edited), _artifacts(others, got, edited)
    distance = None
    if base is not None and edited and got.features is not None and len(others) > 1:
        same = base.rows([unedited(job) for job in others])
        distance = frechet_distance(got.features[got.rows(others)], base.features[same])
    return {
        "UA": ua,
        "IRA": ira,
        "CRA": cra,
        "AR": rate,
        "AR others": collateral,
        "GA": global_average(ua, ira, cra, rate) if edited else None,
        "FD": distance,
        "CLIP": None
        if got.clip is None or not others
        else float(got.clip[_rows(others, got, edited)].mean()),
        "replaced": 100 * float(got.replaced[_rows(jobs, got, edited)].mean()) if edited else 0.0,
    }


def _unlearning(
    world: EvaluatedWorld, jobs: Sequence[Job], got: VerdictColumns, edited: bool
) -> dict[int, Unlearning]:
    if got.objects is None:
        return {world.objects.index(name): Unlearning(None, None, None) for name in _targets(jobs)}
    rows = _rows(jobs, got, edited)
    objects, styles = labels(world, jobs)
    erased = torch.tensor([world.objects.index(job.erased[0]) for job in jobs])
    seen = None if got.styles is None else got.styles[rows]
    return unlearning(erased, objects, styles, got.objects[rows], seen, len(world.objects))


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
