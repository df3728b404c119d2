"""One prompt and seed by every method, beside each other."""

from dataclasses import replace

import pytest
import torch

from lbdt import canvas
from lbdt.activations.prompts import Prompt
from lbdt.app.comparing import MOST_STRENGTHS, ComparedPicture, base_prompts, compare
from lbdt.app.erasing import emerge
from lbdt.app.examples import Progress
from lbdt.app.settings import PictureSettings
from lbdt.editors import Steering
from lbdt.evaluation.block_watch import BlockWatch
from lbdt.evaluation.metrics.activation_shift import fit
from lbdt.evaluation.values import NO_GUIDANCE
from tests import toy
from tests.repeats import repeats

STEPS = 3
ASKED = PictureSettings("a cat", ("Cats",), model="pipe", eraser="eraser", steps=STEPS, guidance=3, seed=5)
BASE = [Prompt(text, seed=seed) for seed, text in enumerate(("ab", "dog", "a tree", "cat", "bird"), 50)]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def eraser():
    return toy.eraser(bank=True)


@pytest.fixture(scope="module")
def steering(eraser):
    return Steering.from_eraser(eraser, strength=-1.0)


def never() -> bool:
    return False


def rows_of(pipe, prompts, **call):
    """Every patch of the block's output in the pictures of the prompts, [P, T, N, d]."""
    with BlockWatch(pipe, toy.HOOKPOINT, [p.seed for p in prompts], patches=None) as watch:
        pictures = pipe(
            [p.text for p in prompts],
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(p.seed) for p in prompts],
            **call,
        ).images
    rows = watch.rows()
    return pictures, rows.view(len(prompts), STEPS, -1, rows.shape[1])


def test_the_cells_are_the_methods_pictures(pipe, eraser, steering):
    events = list(compare(pipe, eraser, steering, ASKED, [-1, -30.0], cancelled=never))
    assert all(isinstance(event, ComparedPicture) for event in events)
    assert [(e.method, e.strength) for e in events] == [
        ("without", None),
        ("per", None),
        ("steering", -1.0),
        ("steering", -30.0),
        ("negative", None),
    ]
    *_, erased = emerge(pipe, eraser, ASKED, cancelled=never)
    assert repeats(events[0].picture, erased.without) and repeats(events[1].picture, erased.erased)
    steered = replace(ASKED, method="steering", strength=-30.0)
    *_, last = emerge(pipe, steering, steered, cancelled=never)
    assert repeats(events[3].picture, last.erased)
    (picture,), _ = rows_of(pipe, [Prompt("a cat", seed=5)], negative_prompt=["Cats"])
    assert repeats(events[4].picture, picture) and events[4].note == "Cats"
    assert all(e.seconds > 0 for e in events)
    assert toy.traces(pipe) == []


def test_what_is_outside_is_that_of_the_metric(pipe, eraser, steering):
    events = list(compare(pipe, eraser, steering, ASKED, [-30.0], cancelled=never, base=BASE))
    assert [e for e in events if isinstance(e, Progress)] == [Progress(4, 5), Progress(5, 5)]
    cells = events[2:]
    reference = fit(torch.cat([rows_of(pipe, part)[1].flatten(0, 2) for part in (BASE[:4], BASE[4:])]))
    _, rows = rows_of(pipe, [Prompt("a cat", seed=5)])
    shares = [reference.compare(each).outside for each in rows[0]]
    assert repeats([share for _, share in cells[0].outside_by_step], shares)
    assert cells[0].outside == pytest.approx(sum(shares) / STEPS)
    assert cells[0].outside == pytest.approx(reference.compare(rows.flatten(0, 2)).outside)
    times = pipe.scheduler.timesteps.tolist()
    assert all([t for t, _ in cell.outside_by_step] == times for cell in cells)
    assert cells[2].outside > cells[0].outside  # a steering as strong as that leaves the usual
    # The base is kept.
    again = list(compare(pipe, eraser, None, replace(ASKED, seed=6), [], cancelled=never, base=BASE))
    assert [e.method for e in again] == ["without", "per", "negative"]


def test_without_a_base_the_picture_without_is_it(pipe, eraser):
    first, *_ = compare(pipe, eraser, None, ASKED, [], cancelled=never)
    _, rows = rows_of(pipe, [Prompt("a cat", seed=5)])
    rows = rows.flatten(0, 2)
    assert first.outside == pytest.approx(fit(rows).compare(rows).outside)


@pytest.mark.parametrize("guidance", [0, 1], ids=str)
def test_without_guidance_a_negative_prompt_does_not_apply(pipe, eraser, guidance):
    *_, last = compare(pipe, eraser, None, replace(ASKED, guidance=guidance), [], cancelled=never)
    assert last == ComparedPicture("negative", None, None, None, None, note=NO_GUIDANCE)


def test_a_negative_prompt_of_ones_own(pipe, eraser):
    *_, last = compare(pipe, eraser, None, ASKED, [], cancelled=never, negative="dog")
    (picture,), _ = rows_of(pipe, [Prompt("a cat", seed=5)], negative_prompt=["dog"])
    assert repeats(last.picture, picture) and last.note == "dog"


@pytest.mark.parametrize("after", [0, 1, STEPS, 2 * STEPS + 1, 3 * STEPS])
def test_cancelled_the_pipeline_is_what_it_was(pipe, eraser, steering, after):
    before, _ = rows_of(pipe, [Prompt("a cat", seed=5)])
    left = iter(range(after))
    events = compare(pipe, eraser, steering, ASKED, [-1.0], cancelled=lambda: next(left, None) is None)
    # Asked once, and then after each step.
    assert len(list(events)) == max(0, after - 1) // STEPS
    assert toy.traces(pipe) == []
    assert repeats(rows_of(pipe, [Prompt("a cat", seed=5)])[0][0], before[0])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"strengths": ["1"]}, TypeError, "strengths: expected numbers, got '1'"),
        ({"strengths": [True]}, TypeError, "strengths: expected numbers, got True"),
        ({"strengths": [float("nan")]}, ValueError, "strengths: expected finite numbers"),
        ({"strengths": [-1e7]}, ValueError, "strengths: expected finite numbers up to 1e"),
        ({"strengths": [-1.0] * (MOST_STRENGTHS + 1)}, ValueError, "strengths: expected at most 16, got 17"),
        ({"steering": None}, ValueError, "strengths: expected none without a steering"),
        ({"steering": toy.eraser()}, TypeError, "steering: expected a Steering, got ConceptEraser"),
        ({"settings": replace(ASKED, concepts=("cat",))}, ValueError, "did you mean 'Cats'"),
    ],
    ids=["text", "bool", "nan", "large", "many", "no-steering", "an-eraser", "concept"],
)
def test_what_cannot_be_compared_is_refused_at_once(pipe, eraser, steering, change, kind, message):
    given = {"steering": steering, "settings": ASKED, "strengths": [-1.0]} | change
    with pytest.raises(kind, match=message):
        compare(pipe, eraser, cancelled=never, **given)


def test_the_base_of_emojicanvas_has_every_object_and_style_and_no_other_pictures_seed():
    prompts = base_prompts()
    assert [prompt.concept for prompt in prompts] == list(canvas.OBJECTS)
    assert {prompt.style for prompt in prompts} == set(canvas.STYLES)
    assert len({prompt.seed for prompt in prompts}) == len(prompts)
