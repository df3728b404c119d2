"""Which pictures are made: whole grids, samples that take turns, and worlds that are no whole grid."""

from collections import Counter
from dataclasses import replace

import pytest

from lbdt import canvas
from lbdt.activations.prompts import Prompt
from lbdt.evaluation.jobs import Design, Job, empties, erased_together, pairs, targets, together
from lbdt.evaluation.worlds.canvas_world import canvas_world, seed_empty, seed_pairs, seed_prompts, texts_of
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


@pytest.mark.parametrize(
    ("name", "least"), [("own", 1), ("others", 1), ("strengths", 1), ("pairs", 0), ("empty", 0)]
)
def test_numbers_that_are_too_small_are_refused(name, least):
    with pytest.raises(ValueError, match=f"{name}: expected a number from {least}, or None for all; got -1"):
        Design(**{name: -1})
    Design(**{name: least})


@pytest.mark.parametrize(
    ("design", "words"),
    [
        (
            Design(),
            "each of 7 concepts erased, per seed, from its own prompts in every style and none, and from all",
        ),
        (Design(own=2, others=6), "2 of its styles, and from 6 of other objects"),
        (Design(pairs=2, empty=1), "; from 2 pairs of it and another object; from 1 prompts of no object"),
    ],
    ids=["all", "sampled", "pairs"],
)
def test_the_report_says_which_pictures(design, words):
    assert words in design.describe(WORLD, 7)


def test_the_report_names_no_pairs_where_there_are_none():
    text = Design().describe(small.world(pairs=None, empty=None), 3)
    assert (
        "pairs" not in text and "no object" not in text and "pairs" not in Design(pairs=0).describe(WORLD, 3)
    )


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (2, 2), (None, 6), (9, 6)])
def test_every_concept_is_erased_from_its_own_pairs_each_once(count, expected):
    jobs = pairs(WORLD, 500, count, WORLD.objects)
    assert len(set(jobs)) == len(jobs) == 20 * expected
    for job in jobs:
        assert job.erased == (job.prompt.concept,) and job.beside not in (None, job.prompt.concept)
        assert not job.own and not job.other and not job.empty
        assert job.beside in job.prompt.text and job.prompt.concept in job.prompt.text


def test_partners_sides_and_styles_of_pairs_take_turns():
    jobs = [job for seed in WORLD.seeds for job in pairs(WORLD, seed, 2, WORLD.objects)]
    assert len({(job.prompt.text, job.prompt.seed) for job in jobs}) == len(jobs) == 120
    left = Counter(job.prompt.text.startswith(f"An image of {job.erased[0]}") for job in jobs)
    assert left[True] == left[False] == 60
    for name in WORLD.objects:
        mine = [job for job in jobs if job.erased == (name,)]
        assert len({job.beside for job in mine}) >= 5 and len({job.prompt.style for job in mine}) >= 3
    assert set(Counter(job.beside for job in jobs).values()) == {6}
    styles = Counter(
        (job.prompt.style, job.prompt.text.startswith(f"An image of {job.erased[0]}")) for job in jobs
    )
    assert len(styles) == 12 and max(styles.values()) <= 2 * min(styles.values())


def test_prompts_of_no_object_are_of_every_style_and_shared_out_among_the_concepts():
    jobs = empties(WORLD, 500, 0, 1, WORLD.objects)
    assert len({job.prompt for job in jobs}) == len(jobs) == 20 and all(job.empty for job in jobs)
    assert not any(job.own or job.other for job in jobs)
    assert {job.prompt.style for job in jobs} == set(canvas.STYLES)
    assert jobs[0].prompt.text == f"An image in {jobs[0].prompt.style} style."
    assert len(empties(WORLD, 500, 0, None, ("Cats", "Dogs"))) == 40
    assert empties(WORLD, 500, 0, 0, ("Cats",)) == empties(small.world(empty=None), 1, 0, 1, ("Cats",)) == []
    assert pairs(small.world(pairs=None), 1, 1, ("Cats",)) == []


def test_no_two_pictures_of_one_text_start_alike():
    starts = [
        (prompt.text, prompt.seed)
        for seed in (*WORLD.seeds, *WORLD.sweep_seeds)
        for prompt in (*seed_prompts(seed), *seed_empty(seed), *(pair.prompt for pair in seed_pairs(seed)))
    ]
    assert len(set(starts)) == len(starts)


def test_emojicanvas_names_a_concept_by_its_prompts():
    assert (texts_of("Cats"), texts_of(None)) == (["An image of Cats."], ["An image."])


def test_a_sample_of_others_covers_every_object_in_every_style_over_the_default_seeds():
    seen = Counter(
        (job.prompt.concept, job.prompt.style)
        for place, seed in enumerate(WORLD.seeds)
        for job in targets(WORLD, seed, place, 1, 6, WORLD.objects)
        if job.prompt.concept not in job.erased
    )
    assert set(seen) == {(name, style) for name in WORLD.objects for style in WORLD.styles}
    assert max(seen.values()) <= 5
