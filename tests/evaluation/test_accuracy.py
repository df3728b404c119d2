"""UA, IRA and CRA: scores known by construction, and the protocol written out in plain Python."""

from __future__ import annotations

import random

import pytest
import torch

from lbdt.evaluation.evaluated_world import one_seen
from lbdt.evaluation.metrics.accuracy import average, global_average, mean_by, unlearning
from lbdt.evaluation.published import ERASURE

OBJECTS, STYLES = 4, 3
# Of every object in every style and in none (-1): the whole grid.
GRID = [(thing, style) for thing in range(OBJECTS) for style in (*range(STYLES), -1)]


def score(rows, count=OBJECTS, judged_styles=True):
    """Of rows (erased, object, style, seen object, seen style)."""
    erased, objects, styles, classes, seen_styles = torch.tensor(rows).T
    seen = one_seen(classes, count)
    return unlearning(erased, objects, styles, seen, seen_styles if judged_styles else None)


def grid(erased, wrong_object=lambda thing, style: False, wrong_style=lambda thing, style: False, of=GRID):
    """Rows of an erased concept, misread where the two functions say so."""
    return [
        (
            erased,
            thing,
            style,
            (thing + 1) % OBJECTS if wrong_object(thing, style) else thing,
            (style + 1) % STYLES if wrong_style(thing, style) else style % STYLES,
        )
        for thing, style in of
    ]


def always(*_):
    return True


def protocol(target, rows):
    """METHOD.md, 8.3, word for word, of one request's rows (object, style or -1, seen object, seen style)."""

    def accuracy(pairs):
        return sum(wanted == seen for wanted, seen in pairs) / len(pairs)

    by_class = {
        thing: accuracy([(row[0], row[2]) for row in rows if row[0] == thing])
        for thing in {row[0] for row in rows}
    }
    kept = [share for thing, share in by_class.items() if thing != target]
    themes = {row[1] for row in rows} - {-1}
    cra = [accuracy([(row[1], row[3]) for row in rows if row[1] == theme]) for theme in themes]
    return 100 * (1 - by_class[target]), 100 * sum(kept) / len(kept), 100 * sum(cra) / len(cra)


@pytest.mark.parametrize(
    ("rows", "ua", "ira", "cra"),
    [
        (grid(2), 0, 100, 100),
        (grid(2, lambda thing, style: thing == 2), 100, 100, 100),
        (grid(2, lambda thing, style: (thing, style) == (2, 1)), 25, 100, 100),
        (grid(2, lambda thing, style: (thing, style) == (2, -1)), 25, 100, 100),
        (grid(2, lambda thing, style: thing == 0), 0, 200 / 3, 100),
        (grid(2, lambda thing, style: (thing, style) == (0, 1)), 0, 275 / 3, 100),
        (grid(2, wrong_style=lambda thing, style: thing == 2), 0, 100, 75),
        (grid(2, wrong_style=lambda thing, style: style == 1), 0, 100, 200 / 3),
        (grid(2, wrong_style=lambda thing, style: style == -1), 0, 100, 100),
        (grid(2, always, always), 100, 0, 0),
    ],
    ids=[
        "nothing-changed",
        "own-all-missed",
        "own-one-of-four-missed",
        "own-without-a-style-missed",
        "another-object-lost",
        "one-picture-of-another-object-lost",
        "style-of-own-lost",
        "one-style-lost",
        "no-style-no-matter",
        "everything-lost",
    ],
)
def test_planted_verdicts(rows, ua, ira, cra):
    (concept, got), *none = score(rows).items()
    assert (concept, none) == (2, [])
    assert got[:3] == pytest.approx((ua, ira, cra))


@pytest.mark.parametrize(
    ("seen", "ua", "ira"),
    [([], 100, 0), ([0], 100, 100), ([2], 0, 0), ([0, 2], 0, 100), ([0, 1, 3], 100, 100)],
    ids=["nothing", "the-other", "the-erased", "both", "many"],
)
def test_several_objects_or_none_may_be_seen_in_a_picture(seen, ua, ira):
    """A picture of object 2, which is erased, and one of object 0."""
    verdicts = torch.zeros(2, OBJECTS, dtype=torch.bool)
    verdicts[:, seen] = True
    erased, objects, styles = torch.tensor([[2, 2], [2, 0], [-1, -1]])
    assert unlearning(erased, objects, styles, verdicts, None)[2] == (ua, ira, None)


def test_a_verdict_that_is_no_class_of_the_world_is_wrong():
    rows = [(2, 2, 0, -1, 0), (2, 1, 0, 1, 0)]
    assert score(rows)[2][:2] == (100, 100)


@pytest.mark.parametrize("seed", range(5))
def test_the_whole_grid_by_the_protocol_in_plain_python(seed):
    drawn = random.Random(seed)
    rows = [
        (erased, thing, style, drawn.randrange(OBJECTS), drawn.randrange(STYLES))
        for erased in (0, 3)
        for thing, style in GRID
        for _ in range(2)  # seeds
    ]
    drawn.shuffle(rows)
    scores = score(rows)
    assert set(scores) == {0, 3}
    for concept, got in scores.items():
        mine = [row[1:] for row in rows if row[0] == concept]
        assert got[:3] == pytest.approx(protocol(concept, mine))
        styled = [row for row in mine if row[1] >= 0]
        plain = 100 * sum(row[1] == row[3] for row in styled) / len(styled)
        assert got.cra == pytest.approx(plain), "every style has as many pictures, so it is the plain mean"


@pytest.mark.parametrize("sampled", [1, 2, 3])
def test_a_sample_of_others_stands_for_all_of_them(sampled):
    """Where the styles of all others are read alike, a sample's CRA is the whole grid's, however small."""

    def wrong(thing, style):
        return thing == 2 if style == 0 else style == 1  # own: 0 and 1 lost; others: 1 lost

    whole = score(grid(2, wrong_style=wrong))[2].cra
    part = [(thing, style) for thing, style in GRID if thing == 2 or thing in (0, 1, 3)[:sampled]]
    assert whole == pytest.approx((75 + 0 + 100) / 3)
    assert score(grid(2, wrong_style=wrong, of=part))[2].cra == pytest.approx(whole)


def test_shares_are_of_what_was_really_scored():
    """METHOD.md, 8.3: the published script once divided by the planned number of pictures."""
    rows = grid(2, lambda thing, style: style == 0, of=[(2, 0), (2, 1), (2, 2), (0, 0), (0, 1), (1, 0)])
    got = score(rows)[2]
    assert (got.ua, got.ira) == pytest.approx((100 / 3, 25))


@pytest.mark.parametrize(
    ("rows", "judged_styles", "missing"),
    [
        (grid(2), False, {"cra"}),
        (grid(2, of=[(thing, -1) for thing in range(OBJECTS)]), True, {"cra"}),
        (grid(2, of=[(2, 0), (2, 1)]), True, {"ira", "cra"}),
        (grid(2, of=[(0, 0), (1, 1)]), True, {"ua", "cra"}),
    ],
    ids=["no-style-classifier", "no-styled-prompt", "no-other-object", "not-its-own"],
)
def test_what_no_picture_can_say_is_none(rows, judged_styles, missing):
    got = score(rows, judged_styles=judged_styles)[2]._asdict()
    assert {name for name, value in got.items() if value is None} == missing


@pytest.mark.parametrize(
    "shapes",
    [
        ((3,), (2,), (3,), (3, 4), (3,)),
        ((0,), (0,), (0,), (0, 4), (0,)),
        ((2, 2), (2, 2), (2, 2), (2, 4), (2, 2)),
        ((3,), (3,), (3,), (3, 4), (2,)),
        ((3,), (3,), (3,), (3,), (3,)),
        ((3,), (3,), (3,), (2, 4), (3,)),
    ],
    ids=["length", "empty", "two-dimensions", "length-of-styles", "classes-seen", "length-of-seen"],
)
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="one length"):
        unlearning(*(torch.zeros(shape, dtype=torch.int64) for shape in shapes))


@pytest.mark.parametrize("row", ERASURE, ids=lambda row: f"{row.pipeline}-{row.method}")
def test_ga_reproduces_the_published_rows(row):
    # The page rounds to two decimals.
    assert (
        round(abs(global_average(row.UA, row.IRA, row.CRA, row.AR) - row.printed_global_average), 4) <= 0.01
    )


@pytest.mark.parametrize(
    ("given", "ga"),
    [
        ((80, 60, 40, 20), 65),
        ((80, 60, None, 20), 220 / 3),
        ((None, 60, 40, 20), None),
        ((80, None, 40, 20), None),
        ((80, 60, 40, None), None),
        ((0, 0, 0, 0), 25),
    ],
    ids=["all", "without-cra", "without-ua", "without-ira", "without-ar", "zeros"],
)
def test_ga_of_what_is_there(given, ga):
    assert global_average(*given) == (ga if ga is None else pytest.approx(ga))


def test_averages_leave_out_what_is_missing():
    assert average([1.0, None, 4.0]) == 2.5
    assert average([None]) is average([]) is None
    assert average([0.0]) == 0


def test_groups_weigh_the_same_whatever_their_size():
    values, groups = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([7, 7, 7, 2])
    assert mean_by(values, groups) == 0.5
    assert mean_by(values[:0], groups[:0]) is None
