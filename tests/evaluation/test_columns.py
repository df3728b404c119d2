"""Verdicts looked up by job, and the figures of planted ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lbdt.evaluation.evaluated_world import one_seen
from lbdt.evaluation.jobs import Job, empties, pairs, targets, unedited
from lbdt.evaluation.metrics.accuracy import estimate, unlearning
from lbdt.evaluation.metrics.feature_distances import frechet_distance
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
        "objects": one_seen(torch.tensor([(objects or right)(job) for job in jobs]), len(WORLD.objects)),
        "styles": torch.tensor([(styles or right_style)(job) for job in jobs]),
        "features": drawn,
        "artifacts": torch.tensor([float(artifacts(job)) if artifacts else 0.0 for job in jobs]).double(),
        "clip": None,
        "replaced": torch.full((len(jobs),), 0.25, dtype=torch.float64),
        "digests": torch.tensor([hash(job.prompt) for job in jobs]),
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
    expected = unlearning(erased, things, styles, one_seen(seen, 3), looks)
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
            {"UA", "IRA", "CRA", "AR", "AR others", "GA", "FD", "clean"},
        ),
        ({"styles": None}, {"CRA"}),
        ({"artifacts": None}, {"AR", "AR others", "GA", "clean"}),
        ({"single_label": True}, {"clean"}),
        ({"clip": torch.full((len(FLAT),), 30.0).double()}, set()),
    ],
    ids=["no-judge", "no-style-classifier", "no-artifact-judge", "single-labels", "clip"],
)
def test_what_nobody_judged_is_none(changes, missing):
    got = VerdictColumns(**fields(verdicts(FLAT, missed), **changes))
    result = figures(WORLD, JOBS, got, base(), True)
    row = result.row()
    silent = {"kept", "pair gone"} | (set() if "clip" in changes else {"CLIP"})
    assert {name for name, value in row.items() if value is None} == missing | silent
    if "CRA" in missing and "UA" not in missing:
        assert row["GA"]["mean"] == 100
    assert set(result.concepts) == set(toy.CONCEPTS)


CATS, DOGS, TREES = toy.CONCEPTS
OF_ALL = [
    *targets(WORLD, 1, 0, 2, 2, WORLD.objects),
    *pairs(WORLD, 1, 2, WORLD.objects),
    *empties(WORLD, 1, 0, 2, WORLD.objects),
]


def seen(jobs, what):
    """bool [n, O]: the objects that `what` of a job names."""
    return torch.tensor([[name in what(job) for name in WORLD.objects] for job in jobs])


def planted(what, jobs=OF_ALL, by_job=None, **changes):
    """Columns in which `what` of a job is seen, in the first style."""
    jobs = list(dict.fromkeys(jobs))
    given = verdicts(jobs, lambda job: 0, lambda job: 0, **(by_job or {}))
    return VerdictColumns(**fields(given, objects=seen(jobs, what), **changes))


def named(job):
    return {job.prompt.concept, job.beside}


def means(result):
    return {name: value and value["mean"] for name, value in result.row().items()}


@pytest.mark.parametrize(
    ("what", "clean", "kept", "gone"),
    [
        (lambda job: named(job) - set(job.erased), 100, 100, 100),
        (named, 0, 100, 0),
        (lambda job: (), 100, 0, 100),
        (lambda job: {TREES}, 0, 100 / 3, 200 / 3),
        (lambda job: named(job) - {CATS}, 100 / 3, 200 / 3, 100 / 3),
    ],
    ids=["as-it-should-be", "nothing-erased", "all-erased", "trees-everywhere", "cats-nowhere"],
)
def test_what_is_clean_what_is_kept_and_what_is_gone_of_a_pair(what, clean, kept, gone):
    """Of every ordered pair of three objects there is one picture."""
    got = planted(what, changed=torch.ones(len(OF_ALL), dtype=torch.int64))
    row = means(figures(WORLD, {1: OF_ALL}, got, None, True))
    assert (row["clean"], row["kept"], row["pair gone"]) == pytest.approx((clean, kept, gone))
    assert row["untouched"] == 0


def test_a_clean_picture_is_no_artifact_and_without_an_answer_it_is_not_counted():
    order = {job: number for number, job in enumerate(job for job in OF_ALL if job.own)}
    answers = [1.0, 0.0, torch.nan]

    def artifacts(job):
        return answers[order[job] % 3] if job in order else 0.0

    got = planted(lambda job: (), by_job={"artifacts": artifacts}, changed=torch.zeros(len(OF_ALL)))
    told = {name: [] for name in WORLD.objects}
    for job, number in order.items():
        told[job.erased[0]] += [number % 3 == 1] if number % 3 < 2 else []
    expected = [100 * sum(part) / len(part) for part in told.values() if part]
    row = means(figures(WORLD, {1: OF_ALL}, got, None, True))
    assert row["clean"] == pytest.approx(sum(expected) / len(expected)) and 0 < row["clean"] < 100


def test_untouched_are_pictures_of_other_prompts_in_which_no_patch_was_changed():
    jobs = list(dict.fromkeys(OF_ALL))
    others = [job for job in jobs if job.other or job.empty]
    assert {job.empty for job in others} == {True, False}
    keep = set(others[::3])
    changed = torch.tensor([0 if job in keep or job.own or job.beside else 7 for job in jobs])
    row = means(figures(WORLD, {1: OF_ALL}, planted(named, changed=changed), None, True))
    assert row["untouched"] == pytest.approx(100 * len(keep) / len(others))


def test_without_hooks_untouched_are_pictures_that_are_the_base_s():
    jobs = list(dict.fromkeys(OF_ALL))
    bare = planted(named, list(map(unedited, jobs)))
    same = planted(named)
    assert means(figures(WORLD, {1: OF_ALL}, same, bare, True))["untouched"] == 100
    others = [job for job in jobs if job.other or job.empty]
    digests = torch.tensor([hash(job.prompt) + (job in others[1:]) for job in jobs])
    other = planted(named, digests=digests)
    assert means(figures(WORLD, {1: OF_ALL}, other, bare, True))["untouched"] == pytest.approx(
        100 / len(others)
    )
    assert means(figures(WORLD, {1: OF_ALL}, other, None, True))["untouched"] is None


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (named, (100, 100, 100)),
        (lambda job: (), (0, 0, 100)),
        (lambda job: WORLD.objects, (100, 100, 0)),
        (lambda job: {job.prompt.concept}, (100, 0, 100)),
        (lambda job: named(job) - {CATS}, (200 / 3, 100 / 3, 100)),
    ],
    ids=["right", "nothing", "everything", "one-of-two", "no-cats"],
)
def test_accuracies_of_the_unedited_model(what, expected):
    jobs = list(dict.fromkeys(map(unedited, OF_ALL)))
    result = figures(WORLD, {1: OF_ALL}, planted(what, jobs), None, False)
    row = means(result)
    found = tuple(row[name] for name in ("object seen", "both seen", "nothing seen"))
    assert found == pytest.approx(expected) and result.pictures == len(jobs)
    styles = [job.prompt.style for job in jobs if job.prompt.style]
    first = styles.count(WORLD.styles[0])
    assert row["style seen"] == pytest.approx(100 * first / len(styles)), "the first style in every picture"
    assert not {"clean", "kept", "pair gone", "untouched"} & set(row)


def test_pairs_and_empty_scenes_are_no_part_of_the_protocol_s_columns():
    protocol = ("UA", "IRA", "CRA", "AR", "AR others", "GA")
    single = [job for job in OF_ALL if job.own or job.other]

    def what(job):
        return named(job) if job.own or job.other else set()

    by_job = {"artifacts": lambda job: not (job.own or job.other)}
    found = [
        means(figures(WORLD, {1: jobs}, planted(what, by_job=by_job), None, True))
        for jobs in (OF_ALL, single)
    ]
    assert [found[0][name] for name in protocol] == [found[1][name] for name in protocol]
    assert found[1]["kept"] is None and found[0]["kept"] is not None


def test_a_picture_is_of_its_own_object_of_another_of_two_or_of_none():
    kinds = [(job.own, job.other, job.beside is not None, job.empty) for job in OF_ALL]
    assert all(sum(kind) == 1 for kind in kinds) and all(any(column) for column in zip(*kinds, strict=True))
    assert unedited(OF_ALL[-1]) == Job(OF_ALL[-1].prompt)
