"""Which pictures are made: whole grids, samples that take turns, and worlds that are no whole grid."""

from collections import Counter
from dataclasses import replace

import pytest

from lbdt import canvas
from lbdt.activations.prompts import Prompt
from lbdt.evaluation.jobs import Design, Job, erased_together, targets, together
from lbdt.evaluation.worlds.canvas_world import canvas_world, seed_prompts
from tests.evaluation import small

WORLD = canvas_world()
SPARSE = [
    Prompt("a cat in ink", "Cats", "ink", 1),
    Prompt("a dog in oil", "Dogs", "oil", 2),
    Prompt("a dog in wax", "Dogs", "wax", 3),
    Prompt("trees", "Trees", None, 4),
]


def sparse(styles=("chalk", "ink", "oil", "pen", "wax")):
    return small.world(styles=styles, prompts=lambda seed: [replace(p, seed=p.seed + seed) for p in SPARSE])


def own_of(jobs):
    return [job for job in jobs if job.prompt.concept in job.erased]


def others_of(jobs):
    return [job for job in jobs if job.prompt.concept not in job.erased]


@pytest.mark.parametrize(
    ("own", "others", "counts"),
    [(None, None, (7, 133)), (None, 6, (7, 6)), (2, 1, (2, 1)), (1, 0, (1, 0)), (99, 999, (7, 114))],
    ids=["all", "sampled", "quick", "own-alone", "more-than-there-are"],
)
def test_every_concept_gets_its_own_and_others_pictures_and_none_twice(own, others, counts):
    jobs = targets(WORLD, 500, 0, own, others, WORLD.objects)
    assert len(set(jobs)) == len(jobs) == 20 * sum(counts)
    for part, expected in zip((own_of(jobs), others_of(jobs)), counts, strict=True):
        assert Counter(job.erased for job in part) == {
            (name,): expected for name in WORLD.objects if expected
        }
    assert {job.prompt for job in jobs} <= set(seed_prompts(500))


def test_all_is_the_whole_grid_of_the_protocol():
    jobs = targets(WORLD, 500, 0, None, None, ["Cats"])
    assert {job.prompt for job in jobs} == set(seed_prompts(500)) and {job.erased for job in jobs} == {
        ("Cats",)
    }


def test_a_sample_of_others_has_styles_and_takes_turns_through_objects_and_styles():
    seen = Counter()
    for place, seed in enumerate(WORLD.seeds):
        jobs = others_of(targets(WORLD, seed, place, None, 6, WORLD.objects))
        by_concept = {name: [j.prompt for j in jobs if j.erased == (name,)] for name in WORLD.objects}
        for name, prompts in by_concept.items():
            assert None not in {prompt.style for prompt in prompts}
            assert len({prompt.style for prompt in prompts}) == len({p.concept for p in prompts}) == 6
            seen[name] += len({prompt.concept for prompt in prompts})
        assert max(Counter(j.prompt.concept for j in jobs).values()) <= 8, "no object is seen much more often"
    one = {
        place: {j.prompt.concept for j in others_of(targets(WORLD, 500, place, None, 6, ["Cats"]))}
        for place in range(3)
    }
    assert len(one[0] | one[1] | one[2]) == 18, "seeds go on with other objects"


def test_a_sample_of_own_prompts_takes_turns_with_the_concept_and_the_seed():
    styles = [job.prompt.style for job in own_of(targets(WORLD, 500, 0, 1, 0, WORLD.objects))]
    assert Counter(styles).most_common()[0][1] <= 3 and set(styles) == {*canvas.STYLES, None}
    other = [job.prompt.style for job in own_of(targets(WORLD, 500, 1, 1, 0, WORLD.objects))]
    assert all(a != b for a, b in zip(styles, other, strict=True))


@pytest.mark.parametrize("own", [None, 1, 2, 3])
@pytest.mark.parametrize("place", range(3))
def test_a_grid_with_gaps_still_gives_every_concept_its_own_pictures(own, place):
    """Of five styles an object may have one, or none."""
    jobs = targets(sparse(), 0, place, own, 1, ("Cats", "Dogs", "Trees"))
    counts = Counter(job.erased[0] for job in own_of(jobs))
    assert counts == {"Cats": 1, "Dogs": 1 if own == 1 else 2, "Trees": 1}
    assert Counter(job.erased[0] for job in others_of(jobs)) == {"Cats": 1, "Dogs": 1, "Trees": 1}


def test_all_others_of_a_grid_with_gaps():
    jobs = targets(sparse(), 0, 0, None, 99, ("Cats",))
    assert {job.prompt.text for job in others_of(jobs)} == {"a dog in oil", "a dog in wax", "trees"}


def test_prompts_without_any_style():
    world = small.world(styles=())
    jobs = targets(world, 1, 0, 2, 2, world.objects)
    assert Counter((job.erased[0], job.prompt.concept) for job in jobs) == {
        (a, b): 1 for a in world.objects for b in world.objects
    }
    assert {job.prompt.style for job in jobs} == {None}
    assert [job.prompt.concept for job in together(world, 1, ("Cats", "Dogs"), 2)] == list(world.objects)


def test_together_every_object_is_seen_in_turning_styles_with_all_erased():
    erased = erased_together(WORLD.objects, 9)
    jobs = together(WORLD, 500, erased, 2)
    assert {job.erased for job in jobs} == {erased} and len(set(jobs)) == 40
    assert Counter(job.prompt.concept for job in jobs) == {name: 2 for name in WORLD.objects}
    assert set(Counter(job.prompt.style for job in jobs)) == set(canvas.STYLES)


def test_together_an_object_of_few_styles_is_seen_in_those_it_has():
    jobs = together(sparse(), 0, ("Dogs",), 1)
    assert [job.prompt.concept for job in jobs] == ["Cats", "Dogs", "Trees"]


def test_requests_are_every_other_concept_and_go_on():
    names = erased_together(WORLD.objects, 12)
    assert names[:10] == WORLD.objects[1::2] and names[10:] == WORLD.objects[0:3:2]
    assert erased_together(WORLD.objects, 3) == names[:3]
    assert erased_together(("Cats",), 1) == ("Cats",)


def test_a_world_of_one_object_has_no_others():
    world = small.world(objects=("Cats",), prompts=lambda seed: SPARSE[:1])
    assert targets(world, 0, 0, None, 6, ("Cats",)) == [Job(SPARSE[0], ("Cats",))]


@pytest.mark.parametrize("name", ["own", "others", "strengths"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected a number from 1, or None for all; got 0"):
        Design(**{name: 0})


@pytest.mark.parametrize(
    ("design", "words"),
    [
        (
            Design(),
            "each of 7 concepts erased, per seed, from its own prompts in every style and none, and from all",
        ),
        (Design(own=2, others=6), "2 of its styles, and from 6 of other objects"),
    ],
    ids=["all", "sampled"],
)
def test_the_report_says_which_pictures(design, words):
    assert words in design.describe(7)


def test_a_sample_of_others_covers_every_object_in_every_style_over_the_default_seeds():
    seen = Counter(
        (job.prompt.concept, job.prompt.style)
        for place, seed in enumerate(WORLD.seeds)
        for job in targets(WORLD, seed, place, 1, 6, WORLD.objects)
        if job.prompt.concept not in job.erased
    )
    assert set(seen) == {(name, style) for name in WORLD.objects for style in WORLD.styles}
    assert max(seen.values()) <= 5
