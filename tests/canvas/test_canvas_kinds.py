"""The five shipped erasers and their steering baselines, each at the sampling it was trained for."""

import functools

import pytest

from lbdt import canvas
from lbdt.canvas import Sampling
from lbdt.canvas.generate import PictureRequest, images, shown
from tests.repeats import repeats

CATS = canvas.OBJECTS.index("Cats")
OTHERS = [canvas.OBJECTS.index(name) for name in ("Trees", "Birds", "Flowers", "Towers")]
CASES = [PictureRequest((CATS,), style, 9300 + style) for style in range(4)]
CASES += [PictureRequest((concept,), style, 9310 + style) for style, concept in enumerate(OTHERS)]
TRUTH = shown(CASES)
KINDS = list(canvas.KINDS)


@pytest.fixture(scope="module")
def pipe():
    return canvas.load_pipeline()


@pytest.fixture(scope="module")
def bare(pipe):
    """The pictures without an eraser, by the sampling."""
    return functools.cache(lambda steps, guidance: images(pipe, CASES, steps, guidance))


@pytest.mark.parametrize("kind", KINDS)
def test_each_eraser_removes_cats_and_keeps_the_rest(pipe, bare, kind):
    base = canvas.classify(bare(*canvas.KINDS[kind]))[0]
    eraser = canvas.load_eraser(kind)
    assert eraser.concepts == canvas.OBJECTS
    with eraser.attach(pipe, concepts=["Cats"], seed=[case.seed for case in CASES]):
        after = canvas.classify(images(pipe, CASES, *canvas.KINDS[kind]))[0]
    assert (base == TRUTH).all(1).sum() >= 7
    assert after[:4, CATS].sum() <= 1
    assert after[4:][TRUTH[4:]].sum() >= 3
    assert [step.timestep for step in eraser.report().steps] == eraser.dictionary.timesteps.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_each_steering_baseline_changes_pictures_of_cats_and_comes_off(pipe, kind):
    steering = canvas.load_steering(kind)
    sampling = Sampling(4, canvas.KINDS[kind].guidance)
    base = images(pipe, CASES[:2], *sampling)
    with steering.attach(pipe, concepts=["Cats"]):
        steered = images(pipe, CASES[:2], *sampling)
    assert steering.report().replaced > 0
    assert ((steered - base).abs().mean(dim=(1, 2, 3)) > 0).all()
    assert repeats(images(pipe, CASES[:2], *sampling), base)


@pytest.mark.parametrize(
    ("kind", "rule", "activation", "update"),
    [
        ("saeuron", "saeuron", "topk", True),
        ("saemnesia", "saeuron", "topk", True),
        ("gsae", "gsae", "topk_sigmoid", True),
        ("sdxl", "sdxl", "topk", True),
        ("saeparate", "saeuron", "topk", True),
    ],
    ids=KINDS,
)
def test_each_kind_is_what_its_name_says(kind, rule, activation, update):
    eraser, steering = canvas.load_eraser(kind), canvas.load_steering(kind)
    assert (steering.rule, steering.hookpoint) == (rule, eraser.hookpoint)
    assert (eraser.sae.config.activation, eraser.sae.config.update) == (activation, update)
    supervised = kind in ("saemnesia", "gsae")
    assert eraser.sae.config.pre_encoder == (kind == "saeparate")
    assert (eraser.dictionary.assigned is not None) == supervised
    if supervised:
        assert sum(rank == 0 for rank in eraser.dictionary.assigned_ranks().values()) >= 18
    if kind == "gsae":
        assert eraser.dictionary.assigned == {name: i for i, name in enumerate(canvas.OBJECTS)}


def test_a_strength_of_the_callers_own():
    assert canvas.load_steering("saemnesia", strength={"Cats": -3.0}).strength == {"Cats": -3.0}
    with pytest.raises(ValueError, match="saeuron, saemnesia, gsae, sdxl, saeparate"):
        canvas.load_steering("sdxl-base")
