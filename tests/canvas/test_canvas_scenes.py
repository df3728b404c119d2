"""The embedded world's own parts: scenes, tokenizer, trainers that resume."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from lbdt import canvas
from lbdt.canvas import models, scenes, trainers
from lbdt.canvas.defaults import labelled_canvas_prompts
from lbdt.canvas.faults import FAULTS, spoiled
from lbdt.canvas.generate import empty_requests, object_requests, one_hot, pair_requests, shown
from tests.repeats import repeats

needs_font = pytest.mark.skipif(
    not any(scenes.Path(p).is_file() for p in scenes._FONT_CANDIDATES),
    reason="rendering needs Debian's fonts-noto-color-emoji; the shipped models do not",
)


@needs_font
def test_a_scene_depends_on_its_arguments_only():
    first = np.asarray(scenes.render("Cats", "Sketch", 5))
    scenes.render("Dogs", "Neon", 6)
    assert (np.asarray(scenes.render("Cats", "Sketch", 5)) == first).all()
    assert (np.asarray(scenes.render("Cats", "Sketch", 6)) != first).any()
    assert first.shape == (128, 128, 3)


@needs_font
def test_styles_share_the_scene_and_differ_in_pixels():
    pictures = [np.asarray(scenes.render("Trees", style, 3)).astype(int) for style in scenes.STYLES]
    for i, a in enumerate(pictures):
        assert all(np.abs(a - b).max() > 60 and np.abs(a - b).mean() > 1 for b in pictures[i + 1 :])


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ("Dragons", "unknown concept 'Dragons'"),
        (("Cats", "Dragons"), "unknown concept 'Dragons'"),
        (("Cats", "Cats"), "up to 2 different ones, got Cats, Cats"),
        (("Cats", "Dogs", "Trees"), "up to 2 different ones, got Cats, Dogs, Trees"),
    ],
    ids=["unknown", "second unknown", "twice", "three"],
)
def test_scenes_that_cannot_be_drawn_are_refused(concepts, message):
    with pytest.raises(ValueError, match=message):
        scenes.render(concepts, "Photo", 0)


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match="unknown style 'Fog'"):
        scenes.render((), "Fog", 0)


@pytest.mark.parametrize(
    ("concepts", "style", "text"),
    [
        ("Cats", "Sketch", "An image of Cats in Sketch style."),
        ("Cats", None, "An image of Cats."),
        (("Cats",), "Sketch", "An image of Cats in Sketch style."),
        (("Dogs", "Cats"), "Sketch", "An image of Dogs and Cats in Sketch style."),
        (("Dogs", "Cats"), None, "An image of Dogs and Cats."),
        ((), "Sketch", "An image in Sketch style."),
        ((), None, "An image."),
    ],
    ids=str,
)
def test_prompt_is_the_published_template_for_any_number_of_objects(concepts, style, text):
    assert canvas.prompt(concepts, style) == text


def test_twenty_objects_of_unlearncanvas_and_six_styles():
    assert len(canvas.OBJECTS) == 20 and len(canvas.STYLES) == 6 and "Jellyfish" in canvas.OBJECTS


def test_tokenizer_has_one_token_per_known_word_and_spells_others(tmp_path):
    tokenizer = models.build_tokenizer(tmp_path)
    texts = [canvas.prompt((a, b), s) for a, b in pairwise(canvas.OBJECTS) for s in canvas.STYLES]
    ids = tokenizer(texts).input_ids
    # start, 9 words, full stop, end
    assert {len(row) for row in ids} == {12} and len({tuple(row) for row in ids}) == 19 * 6
    assert len(tokenizer("a zebra").input_ids) > 4


def test_no_two_requests_share_a_seed():
    seeds = range(3)
    cases = [
        *object_requests(seeds, plain=True),
        *empty_requests(seeds, plain=True, each=3),
        *pair_requests(seeds, plain=True),
    ]
    assert len({case.seed for case in cases}) == len(cases) == 3 * 7 * (20 + 3 + 20)


def test_pairs_are_of_two_objects_and_every_object_stands_on_both_sides():
    cases = pair_requests(range(3), plain=True)
    prompts = labelled_canvas_prompts(range(3), pairs=True).prompts[-len(cases) :]
    assert [(p.text, p.shown) for p in prompts] == [
        (r.prompt, tuple(canvas.OBJECTS[o] for o in r.objects)) for r in cases
    ]
    left, right = ([case.objects[side] for case in cases] for side in (0, 1))
    assert all(a != b for a, b in zip(left, right, strict=True))
    assert set(left) == set(right) == set(range(20))
    assert len(set(zip(left, right, strict=True))) > 150


def test_what_is_asked_for_as_a_mask():
    cases = [empty_requests([0])[0], object_requests([0])[3], pair_requests([0])[5]]
    assert [row.nonzero().flatten().tolist() for row in shown(cases)] == [
        sorted(case.objects) for case in cases
    ]
    assert one_hot(torch.tensor([[-1, -1], [4, -1]])).sum(1).tolist() == [0, 1]


def test_boxes_keep_to_the_grid_with_two_patches_between_them():
    left, right = scenes.PLACES
    assert all(edge % scenes.GRID == 0 for edge in (left, right, scenes.BOX, scenes.FLOOR))
    assert right - (left + scenes.BOX) == 2 * scenes.GRID and right + scenes.BOX <= scenes.SIDE


@needs_font
@pytest.mark.parametrize("anywhere", [False, True], ids=["two-places", "anywhere"])
def test_an_object_stands_in_its_box_and_the_landscape_is_left(anywhere):
    columns = set()
    for seed in range(40):
        scene, bare = (
            np.asarray(scenes.render("Bears", "Photo", seed, anywhere=anywhere, bare=bare)).astype(int)
            for bare in (False, True)
        )
        assert (bare == bare[:, :1]).all()
        down, across = (scene != bare).any(axis=2).nonzero()
        assert 0 < np.ptp(down) < scenes.BOX and 0 < np.ptp(across) < scenes.BOX
        columns.add(int(across.min()) // scenes.GRID)
    assert len(columns) == 2 if not anywhere else len(columns) > 3


@needs_font
@pytest.mark.parametrize("anywhere", [False, True], ids=["two-places", "anywhere"])
def test_of_a_pair_the_first_named_stands_left(anywhere):
    for seed in range(20):
        both, bare = (
            np.asarray(scenes.render(("Bears", "Frogs"), "Photo", seed, anywhere=anywhere, bare=bare)).astype(
                int
            )
            for bare in (False, True)
        )
        changed = (both != bare).any(axis=2)
        columns = changed.any(axis=0).nonzero()[0]
        middle = (columns.min() + columns.max() + 1) // 2
        redness = [
            (half[where][:, 0] - half[where][:, 1]).mean()
            for half, where in (
                (both[:, :middle], changed[:, :middle]),
                (both[:, middle:], changed[:, middle:]),
            )
        ]
        # A bear is brown, a frog is green.
        assert redness[0] > 0 > redness[1]


def test_of_five_scenes_one_is_empty_two_hold_one_object_and_two_a_pair():
    labels, styles = scenes.scene_labels(3000, 9)
    assert [sum(len(row) == n for row in labels) for n in range(3)] == [600, 1200, 1200]
    assert np.bincount(styles).tolist() == [500] * 6
    counts = np.bincount([c for row in labels for c in row], minlength=20)
    assert counts.min() > 0.8 * counts.mean() and all(len(set(row)) == len(row) for row in labels)


@needs_font
def test_a_batch_holds_the_scenes_of_its_labels():
    images, objects, styles = scenes.render_batch(10, 5)
    assert objects[0].tolist() == [-1, -1] and (objects[3] >= 0).all()
    for i in (0, 1, 3):
        names = [scenes.OBJECTS[c] for c in objects[i] if c >= 0]
        assert (images[i] == np.asarray(scenes.render(names, scenes.STYLES[styles[i]], 5_000_000 + i))).all()


@needs_font
def test_every_fault_shows_and_depends_on_its_seed_only():
    names = ("Cats", "Trees")
    for number in range(5 * len(FAULTS)):
        style = scenes.STYLES[number % 6]
        picture, bare = (np.asarray(scenes.render(names, style, number, bare=bare)) for bare in (False, True))
        other = np.asarray(scenes.render("Frogs", scenes.STYLES[(number + 1) % 6], number + 1))
        found = spoiled(picture, other, bare, number)
        assert (found == spoiled(picture, other, bare, number)).all()
        assert found.shape == picture.shape and found.dtype == np.uint8
        assert np.abs(found.astype(int) - picture).max() > 8


def _fit(folder, steps, stop_at=None, muon=False):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    optimizers = [trainers.adamw(net.parameters(), 0.01)]
    if muon:
        optimizers = [trainers.Muon([net.weight], lr=0.02), torch.optim.AdamW([net.bias], lr=0.01)]

    def loss(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=generator)
        return (net(x) - x.sum(1, keepdim=True)).square().mean()

    return trainers.minimise("net", folder, net, steps, loss, optimizers, warmup=5, ema=0.9, save_every=10)


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_training_resumes_to_the_same_weights(tmp_path, muon):
    unbroken = _fit(tmp_path / "a", 40, muon=muon)
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "b", 40, stop_at=27, muon=muon)
    resumed = _fit(tmp_path / "b", 40, muon=muon)
    assert repeats([unbroken.weight, unbroken.bias], [resumed.weight, resumed.bias])


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)], ids=str)
def test_muon_orthogonalises(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(trainers.orthogonal(x))
    assert values.min() > 0.3 and values.max() < 1.4


def test_classify_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\)"):
        canvas.classify(torch.zeros(1, 3, 64, 64))


def test_unknown_eraser_kind_is_refused():
    with pytest.raises(ValueError, match="saeuron"):
        canvas.load_eraser(kind="unknown")
