"""What a visitor may ask for, whatever their browser sends."""

import pytest
import torch

from lbdt.app.asked import Asked, AskedError, asked_of, fields_of, strengths_of
from lbdt.app.settings import PictureSettings
from lbdt.app.world import MOST_VISITS, Limits, World

GOOD = Asked(
    "An image of Dogs and Cats in Sketch style.", ["Cats"], "saeuron", 7, 20, 3.0, 0, "row", "known", 0
)


@pytest.fixture(scope="module")
def world():
    world = World(torch.device("cpu"), limits=Limits(steps=50))
    yield world
    world.close()


def test_good_fields_are_resolved_and_come_back(world):
    settings, editor = asked_of(GOOD, world)
    assert settings.digest and settings.seed == 7 and editor is world.editor("saeuron")
    assert fields_of(settings, world) == GOOD
    assert asked_of(fields_of(settings, world), world)[0] == settings


def test_numbers_of_json_may_be_floats(world):
    settings, _ = asked_of(GOOD._replace(seed=7.0, steps=20.0, padding=1.0), world)
    assert (settings.seed, settings.steps, settings.padding) == (7, 20, 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": None}, "Prompt: say what"),
        ({"prompt": 3}, "Prompt: say what"),
        ({"prompt": "a" * 501}, "at most 500 characters, got 501"),
        ({"prompt": "cat " * 60}, "122 tokens, and the model reads 24"),
        ({"concepts": []}, "choose from 1 to 10"),
        ({"concepts": "Cats"}, "choose from 1 to 10"),
        ({"concepts": ["Cats"] * 11}, "choose from 1 to 10"),
        ({"concepts": ["Cat"]}, "does not know 'Cat'"),
        ({"concepts": [["Cats"]]}, "does not know"),
        ({"kind": "../x"}, "Eraser: expected one of saeuron"),
        ({"kind": ["saeuron"]}, "Eraser: expected one of"),
        ({"seed": None}, "Seed: expected a whole number"),
        ({"seed": float("nan")}, "Seed: expected a whole number"),
        ({"seed": float("inf")}, "Seed: expected a whole number"),
        ({"seed": True}, "Seed: expected a whole number"),
        ({"seed": 2**60}, "Seed: expected a whole number"),
        ({"steps": 51}, "Denoising steps: expected a whole number from 1 to 50"),
        ({"guidance": float("nan")}, "Guidance scale: expected"),
        ({"guidance": "3"}, "Guidance scale: expected"),
        ({"padding": -1}, "Padding: expected"),
        ({"padding": 9}, "Padding: expected a whole number from 0 to 8"),
        ({"prompt": "a \ud800 cat"}, "Prompt: "),
        ({"source": "all"}, "source: expected one of"),
        ({"avoid": 3}, "avoid: expected"),
        ({"min_patches": 0.5}, "Gate: expected a whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_in_words(world, change, text):
    with pytest.raises(AskedError, match=text):
        asked_of(GOOD._replace(**change), world)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("-1, -5", [-1.0, -5.0]), ("", []), (" 2 ", [2.0]), ("1e2", [100.0])],
    ids=str,
)
def test_strengths(text, numbers):
    assert strengths_of(text, 4) == numbers


@pytest.mark.parametrize("text", ["a", "1,,2", "nan", "inf", "1e9", "1,2,3,4,5", None, ["1"]], ids=str)
def test_strengths_that_are_refused(text):
    with pytest.raises(AskedError, match="at most 4 numbers from -1000 to 1000"):
        strengths_of(text, 4)


def test_settings_of_another_page_are_refused(world):
    for settings, text in (
        (
            PictureSettings("a", ("Cats",), kind="saeuron", steps=51),
            "51 steps, and this page makes at most 50",
        ),
        (PictureSettings("a", ("Cats",), eraser="/somewhere"), "another model or eraser"),
        (PictureSettings("a", ("Cats",), method="steering", strength=-1.0), "tab Compare"),
    ):
        with pytest.raises(AskedError, match=text):
            fields_of(settings, world)


def test_visitors_are_forgotten_with_their_files_but_not_while_something_is_made(world):
    def came(name):
        with world.place(name) as visit:
            return visit

    first = came("first")
    (first.folder / "picture.png").write_bytes(b"x")
    assert world.visit("first") is first and world.visit("nobody") is None
    making = first.begin()
    assert not making.cancel.is_set() and first.begin() is not making and making.cancel.is_set()
    with world.place("busy") as busy:
        for number in range(MOST_VISITS):
            came(f"visitor {number}")
        assert world.visit("busy") is busy and not busy.making.cancel.is_set() and busy.folder.exists()
    assert world.visit("first") is None and not first.folder.exists() and first.making.cancel.is_set()
    again = came("first")
    assert again is not first and again.folder.exists()
    world.leave("first")
    world.leave("nobody")
    assert not again.folder.exists() and again.cancel_comparison.is_set()


def test_the_second_tokenizer_and_the_pipelines_own_limit_count_too(world, monkeypatch):
    class Two(type(world.pipe)):
        def __call__(self, prompt, max_sequence_length=10, **settings):
            raise NotImplementedError

    two = Two(**world.pipe.components)
    monkeypatch.setattr(world, "pipe", two)
    with pytest.raises(AskedError, match="Prompt: 12 tokens, and the model reads 10"):
        asked_of(GOOD._replace(prompt="cat " * 5), world)
    two.tokenizer_2, two.tokenizer = two.tokenizer, None
    with pytest.raises(AskedError, match="Prompt: 12 tokens, and the model reads 10"):
        asked_of(GOOD._replace(prompt="cat " * 5), world)
