"""Verdicts looked up by job, and the figures of planted ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lbdt.evaluation.jobs import targets
from lbdt.evaluation.metrics.accuracy import estimate, unlearning
from lbdt.evaluation.metrics.feature_distances import frechet_distance
from lbdt.evaluation.series_plan import unedited
from lbdt.evaluation.verdict_columns import VerdictColumns, figures
from tests import toy
from tests.evaluation import small

WORLD = small.world()
JOBS = {
    seed: targets(WORLD, seed, place, None, None, WORLD.objects) for place, seed in enumerate(WORLD.seeds)
}
FLAT = [job for part in JOBS.values() for job in part]


def verdicts(jobs, objects=None, styles=None, artifacts=None, **changes) -> VerdictColumns:
    """Right ones where no function of a job says otherwise."""

    def right(job):
        return WORLD.objects.index(job.prompt.concept)

    def right_style(job):
        return WORLD.styles.index(job.prompt.style) if job.prompt.style else 0

    drawn = torch.randn(len(jobs), 3, generator=torch.Generator().manual_seed(0))
    settings = {
        "place": {job: number for number, job in enumerate(jobs)},
        "objects": torch.tensor([(objects or right)(job) for job in jobs]),
        "styles": torch.tensor([(styles or right_style)(job) for job in jobs]),
        "features": drawn,
        "artifacts": torch.tensor([float(artifacts(job)) if artifacts else 0.0 for job in jobs]).double(),
        "clip": None,
        "replaced": torch.full((len(jobs),), 0.25, dtype=torch.float64),
    }
    return VerdictColumns(**settings | changes)


def own(job):
    return job.prompt.concept in job.erased


def missed(job):
    """Every erased object's picture is read as the next one."""
    index = WORLD.objects.index(job.prompt.concept)
    return (index + own(job)) % len(WORLD.objects)


def base():
    return verdicts(list(dict.fromkeys(map(unedited, FLAT))))


def test_an_erasure_that_always_works():
    row = figures(WORLD, JOBS, verdicts(FLAT, missed), base(), True).row()
    means = {name: row[name] and row[name]["mean"] for name in row}
    assert [means[name] for name in ("UA", "IRA", "CRA", "AR", "AR others", "GA")] == [
        100,
        100,
        100,
        0,
        0,
        100,
    ]
    assert means["replaced"] == 25 and means["CLIP"] is None and means["FD"] > 0
    assert {row[name]["seeds"] for name in ("UA", "GA", "FD")} == {2}


def test_the_base_is_scored_as_if_the_concepts_had_been_erased():
    result = figures(WORLD, JOBS, base(), base(), False)
    row = {name: value and value["mean"] for name, value in result.row().items()}
    assert (row["UA"], row["IRA"], row["CRA"], row["AR"]) == (0, 100, 100, 0)
    assert (row["GA"], row["FD"], row["replaced"]) == (None, None, 0)
    assert result.pictures == 2 * 9, "each picture stands for every request, and is counted once"


def test_artifacts_of_own_and_of_other_prompts_are_told_apart():
    def planted(job):
        return (job.prompt.style is None) == own(job)

    got = verdicts(FLAT, artifacts=planted)
    row = figures(WORLD, JOBS, got, base(), True).row()
    assert (row["AR"]["mean"], row["AR others"]["mean"]) == pytest.approx((100 / 3, 200 / 3))
    assert row["GA"]["mean"] == pytest.approx((0 + 100 + 100 + 100 - 100 / 3) / 4)
    concepts = figures(WORLD, JOBS, got, base(), True).concepts
    assert {name: value["AR"] for name, value in concepts.items()} == pytest.approx(
        dict.fromkeys(WORLD.objects, 100 / 3)
    )


def test_an_artifact_judge_without_an_answer_is_not_counted():
    artifacts = torch.tensor([[torch.nan, 1.0, 0.0][n % 3] for n in range(len(FLAT))]).double()
    row = figures(WORLD, JOBS, VerdictColumns(**fields(verdicts(FLAT), artifacts=artifacts)), None, True)
    for seed, part in zip(row.by_seed, JOBS.values(), strict=True):
        said = [float(artifacts[FLAT.index(job)]) for job in part if own(job)]
        told = [value for value in said if value == value]
        assert seed["AR"] == pytest.approx(100 * sum(told) / len(told))
    silent = VerdictColumns(**fields(verdicts(FLAT), artifacts=artifacts * torch.nan))
    found = figures(WORLD, JOBS, silent, None, True)
    assert set(found.styles.values()) == {None} and set(found.styles) == {*WORLD.styles, "none"}
    assert found.row()["AR"] is None and found.counts()["unanswered"] == found.pictures


def test_artifacts_by_style_are_of_the_erased_objects_pictures():
    """An artifact in every inked picture, the other objects' too, which do not count."""
    got = verdicts(FLAT, artifacts=lambda job: job.prompt.style == WORLD.styles[0] or not own(job))
    styles = figures(WORLD, JOBS, got, base(), True).styles
    assert styles == {WORLD.styles[0]: 100, **dict.fromkeys((*WORLD.styles[1:], "none"), 0)}


def fields(columns, **changes):
    return {field.name: getattr(columns, field.name) for field in dataclasses.fields(columns)} | changes


def test_seeds_are_averaged_and_concepts_are_over_all_seeds():
    first = WORLD.seeds[0]

    def objects(job):
        return missed(job) if job.prompt.seed // 1000 == first else WORLD.objects.index(job.prompt.concept)

    result = figures(WORLD, JOBS, verdicts(FLAT, objects), base(), True)
    assert [seed["UA"] for seed in result.by_seed] == [100, 0]
    assert result.row()["UA"] == estimate([100, 0])
    assert {name: value["UA"] for name, value in result.concepts.items()} == dict.fromkeys(WORLD.objects, 50)


def test_random_verdicts_are_those_of_the_accuracy_functions():
    generator = torch.Generator().manual_seed(1)
    seen = torch.randint(3, (len(FLAT),), generator=generator)
    looks = torch.randint(2, (len(FLAT),), generator=generator)
    got = verdicts(FLAT, lambda job: int(seen[FLAT.index(job)]), lambda job: int(looks[FLAT.index(job)]))
    result = figures(WORLD, JOBS, got, base(), True)
    erased, things = (
        torch.tensor([WORLD.objects.index(name) for name in names])
        for names in ([job.erased[0] for job in FLAT], [job.prompt.concept for job in FLAT])
    )
    styles = torch.tensor([WORLD.styles.index(j.prompt.style) if j.prompt.style else -1 for j in FLAT])
    expected = unlearning(erased, things, styles, seen, looks, 3)
    for index, name in enumerate(WORLD.objects):
        found = result.concepts[name]
        assert (found["UA"], found["IRA"], found["CRA"]) == pytest.approx(expected[index][:3])


def test_the_frechet_distance_is_of_other_prompts_before_and_after():
    part = {1: JOBS[1]}
    got, bare = verdicts(FLAT), base()
    others = [job for job in JOBS[1] if not own(job)]
    expected = frechet_distance(
        got.features[[got.place[job] for job in others]],
        bare.features[[bare.place[unedited(job)] for job in others]],
    )
    assert figures(WORLD, part, got, bare, True).row()["FD"]["mean"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        (
            dict.fromkeys(("objects", "styles", "features", "artifacts")),
            {"UA", "IRA", "CRA", "AR", "AR others", "GA", "FD"},
        ),
        ({"styles": None}, {"CRA"}),
        ({"artifacts": None}, {"AR", "AR others", "GA"}),
        ({"clip": torch.full((len(FLAT),), 30.0).double()}, set()),
    ],
    ids=["no-judge", "no-style-classifier", "no-artifact-judge", "clip"],
)
def test_what_nobody_judged_is_none(changes, missing):
    got = VerdictColumns(**fields(verdicts(FLAT, missed), **changes))
    result = figures(WORLD, JOBS, got, base(), True)
    row = result.row()
    silent = set() if "clip" in changes else {"CLIP"}
    assert {name for name, value in row.items() if value is None} == missing | silent
    if "CRA" in missing and "UA" not in missing:
        assert row["GA"]["mean"] == 100
    assert set(result.concepts) == set(toy.CONCEPTS)
