"""The embedded world's own parts: scenes, tokenizer, trainers that resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lbdt import canvas
from lbdt.canvas import models, scenes, trainers
from lbdt.canvas.generate import object_requests
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


def test_unknown_concept_and_style_are_named():
    with pytest.raises(ValueError, match="unknown concept 'Dragons'"):
        scenes.render("Dragons", "Photo", 0)


def test_prompt_is_the_published_template():
    assert canvas.prompt("Cats", "Sketch") == "An image of Cats in Sketch style."
    assert canvas.prompt("Cats") == "An image of Cats."


def test_twenty_objects_of_unlearncanvas_and_six_styles():
    assert len(canvas.OBJECTS) == 20 and len(canvas.STYLES) == 6 and "Jellyfish" in canvas.OBJECTS


def test_tokenizer_has_one_token_per_known_word_and_spells_others(tmp_path):
    tokenizer = models.build_tokenizer(tmp_path)
    known = tokenizer(canvas.prompt("Waterfalls", "Watercolor")).input_ids
    assert len(known) == 10  # start, 7 words, full stop, end
    assert len(tokenizer("a zebra").input_ids) > 4
    texts = [canvas.prompt(c, s) for c in canvas.OBJECTS for s in canvas.STYLES]
    assert len({tuple(ids) for ids in tokenizer(texts).input_ids}) == 120


def test_grid_never_shares_a_seed():
    cases = object_requests(range(3), plain=True)
    assert len({case.seed for case in cases}) == len(cases) == 3 * 20 * 7


def test_objects_keep_to_the_patches_of_the_grid():
    assert all(
        x % scenes.GRID == y % scenes.GRID == 0 and max(x, y) + scenes.BOX <= 128 for x, y in scenes.PLACES
    )


@needs_font
@pytest.mark.parametrize("anywhere", [False, True], ids=["two-places", "anywhere"])
def test_an_object_stands_in_its_box_and_the_landscape_is_left(anywhere):
    pictures = [np.asarray(scenes.render("Bears", "Photo", i, anywhere=anywhere)) for i in range(40)]
    columns = set()
    for picture in pictures:
        # a landscape's rows are of one colour; an object's are not
        busy = (picture.std(axis=1).max(axis=-1) > 1).nonzero()[0]
        assert 0 < np.ptp(busy) < scenes.BOX
        columns.add(int((picture.astype(int) - picture[:, :1]).any(axis=(0, 2)).argmax()))
    assert len(columns) > (2 if anywhere else 1)


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
