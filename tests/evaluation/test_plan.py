"""The series of an evaluation: their settings, folders and pictures."""

import pytest

from lbdt.evaluation.jobs import Design, unedited
from lbdt.evaluation.series_plan import SeriesPlan
from lbdt.evaluation.worlds.canvas_world import canvas_world
from tests.evaluation import small


def plan(world=None, kind=None, concepts=None, sweep_seeds=None, **design):
    world = world or small.world()
    kind = kind or next(iter(world.kinds.values()))
    sweep = world.sweep_seeds if sweep_seeds is None else sweep_seeds
    return SeriesPlan(world, kind, Design(**design), world.seeds, sweep, concepts or world.objects)


def everything(of, strength=-1.0):
    return [
        *of.sweep(),
        *of.scored(strength),
        *of.ablation(),
        *(series for series, _ in of.together(strength)),
    ]


@pytest.mark.parametrize("design", [{}, {"others": 2}, {"own": 1, "others": 1}], ids=["all", "others", "few"])
def test_no_series_has_a_picture_twice_and_a_folder_is_of_one_series(design):
    folders = {}
    for series in everything(plan(**design)):
        assert len(set(series.jobs)) == len(series.jobs) > 0
        assert folders.setdefault(series.name, series) == series
        assert dict(folders[series.name].settings) == dict(series.settings)


def test_kinds_of_one_sampling_share_the_unedited_pictures():
    world = canvas_world()
    plans = {name: plan(world, kind, others=6) for name, kind in world.kinds.items()}
    bases = {
        name: [p.base(), p.sweep()[0], *(s for s in p.scored(None) if s.shared)] for name, p in plans.items()
    }
    for name in ("saemnesia", "gsae", "saeparate"):
        for mine, first in zip(bases[name], bases["saeuron"], strict=True):
            assert (mine.name, mine.jobs) == (first.name, first.jobs)
    assert {series.name for series in bases["sdxl"]}.isdisjoint(s.name for s in bases["saeuron"])
    methods = {name: [series.method for series in found] for name, found in bases.items()}
    assert methods["saeuron"] == ["base", "base", "base", "negative", "uce"]
    assert methods["sdxl"] == ["base", "base", "base", "uce"], "without guidance there is no negative prompt"


def test_pictures_that_are_scored_are_not_those_the_strength_is_chosen_on():
    for world in (small.world(), canvas_world()):
        of = plan(world, others=6)
        scored = {(job.prompt.text, job.prompt.seed) for jobs in of.scored_jobs.values() for job in jobs}
        sweep = {(job.prompt.text, job.prompt.seed) for jobs in of.sweep_jobs.values() for job in jobs}
        starts = [{seed for _, seed in part} for part in (scored, sweep)]
        assert starts[0].isdisjoint(starts[1])


def test_the_sweep_compares_every_strength_and_per_on_the_same_watched_pictures():
    base, *edited = plan().sweep()
    assert [(s.method, dict(s.settings)) for s in edited] == [
        ("steering", {"strength": -1.0}),
        ("steering", {"strength": -4.0}),
        ("per", {"padding": 1, "source": "random"}),
    ]
    assert len({s.jobs for s in edited}) == 1 and all(s.watched for s in (base, *edited))
    assert set(base.jobs) == {unedited(job) for job in edited[0].jobs}


def test_the_base_has_every_prompt_of_the_rows_once_with_nothing_erased():
    of = plan(others=2)
    base, uce, steering, per = of.scored(-4.0)
    wanted = {
        unedited(job) for jobs in (*of.scored_jobs.values(), *of.ablation_jobs.values()) for job in jobs
    }
    assert set(base.jobs) == wanted and not any(job.erased for job in base.jobs)
    assert (
        set(uce.jobs)
        == set(steering.jobs)
        == {job for jobs in of.scored_jobs.values() for job in jobs}
        <= set(per.jobs)
    )
    assert dict(steering.settings) == {"strength": -4.0}


def test_paddings_and_sources_use_the_main_row_where_it_is_the_same():
    of = plan(own=1, others=1)
    paddings, sources, avoided = of.ablation()[:4], of.ablation()[4:8], of.ablation()[8:]
    assert [dict(s.settings) for s in avoided] == [{"padding": 1, "source": "random", "avoid": "known"}]
    assert [s.settings["padding"] for s in paddings] == [0, 1, 2, 3]
    assert {s.settings["source"] for s in paddings} == {"random"}
    assert [s.settings["source"] for s in sources] == ["random", "nearest", "mean", "row"]
    assert {s.settings["padding"] for s in sources} == {1}
    assert paddings[1] == sources[0] == of.scored(None)[-1]
    wanted = {job for jobs in of.ablation_jobs.values() for job in jobs}
    assert all(wanted <= set(s.jobs) for s in (*paddings, *sources, *avoided))
    assert {job.prompt.seed // 1000 for job in wanted} == {of.seeds[0]}, "of the first seed"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(None, (-1, -2, -3, -4, -5)), (1, (-3,)), (2, (-1, -5)), (3, (-1, -3, -5)), (9, (-1, -2, -3, -4, -5))],
)
def test_strengths_of_a_smaller_sweep_are_spread_over_the_range(count, expected):
    kind = small.kind(strengths=(-1.0, -2.0, -3.0, -4.0, -5.0))
    assert plan(kind=kind, strengths=count).strengths == expected


def test_without_a_baseline_there_is_no_steering_anywhere():
    of = plan(kind=small.kind(steering=None, strengths=(-1.0,)))
    assert {series.method for series in everything(of, None)} == {"base", "uce", "per"} and of.strengths == ()


def test_without_sweep_seeds_there_is_no_sweep():
    assert plan(sweep_seeds=()).sweep() == []


def test_a_baseline_without_a_chosen_strength_is_taken_as_it_comes():
    found = {series.method: dict(series.settings) for series in plan().scored(None)}
    assert found == {"base": {}, "uce": {}, "steering": {}, "per": {"padding": 1, "source": "random"}}


@pytest.mark.parametrize(
    ("per", "methods"),
    [
        (small.per, []),
        (lambda **settings: small.per(**{"min_patches": 1, **settings}), []),
        (small.gated, ["ungated"]),
    ],
    ids=["no-gate", "gate-of-one-patch", "gate"],
)
def test_per_without_the_gate_has_a_row_where_there_is_a_gate(per, methods):
    found = plan(kind=small.kind(per=per)).scored(None)
    assert [series.method for series in found] == ["base", "uce", "steering", *methods, "per"]
    for series in found[3:-1]:
        assert dict(series.settings) == {"padding": 1, "source": "random", "min_patches": 1}
        assert series.editors()[0].min_patches == 1 and set(series.jobs) <= set(found[-1].jobs)


@pytest.mark.parametrize(
    ("guidance", "guided"), [(None, True), (0.0, False), (1.0, False), (1.01, True), (7.5, True)]
)
def test_a_negative_prompt_has_a_row_where_there_is_guidance(guidance, guided):
    methods = [series.method for series in plan(kind=small.kind(guidance=guidance)).scored(None)]
    assert ("negative" in methods) == guided


def test_concepts_erased_together_at_once_and_one_after_another():
    rows = plan(canvas_world(), others=1).together(-5.0)
    found = [(s.method, order, len(s.jobs[0].erased), s.stacked) for s, order in rows]
    assert found == [
        *[(m, "at once", n, False) for m in ("steering", "per") for n in (1, 3, 9)],
        *[(m, "one after another", n, True) for m in ("steering", "per") for n in (3, 9)],
    ]
    alone = plan(canvas_world(), others=1, one_after_another=False).together(-5.0)
    assert {order for _, order in alone} == {"at once"} and len(alone) == 6


@pytest.mark.parametrize(
    ("concepts", "counts"),
    [(("Dogs",), {1}), (("Cats", "Trees"), {1, 2}), (("Cats", "Dogs", "Trees"), {1, 2})],
    ids=["one", "two", "all-of-the-world"],
)
def test_only_concepts_that_are_asked_for_are_erased_and_some_object_is_kept(concepts, counts):
    """An eraser need not know every object of the world."""
    of = plan(concepts=concepts, counts=(1, 2, 3))
    assert {name for s in everything(of) for job in s.jobs for name in job.erased} == set(concepts)
    assert {len(s.jobs[0].erased) for s, _ in of.together(None)} == counts
