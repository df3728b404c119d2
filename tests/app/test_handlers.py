"""What the page's controls call, without a browser: on one's own pipeline, left in the middle, asked too much."""

import json
import logging
import signal
import threading
import time
from dataclasses import dataclass

import gradio as gr
import pytest
import torch

from lbdt.app.asked import Asked, AskedError, asked_of
from lbdt.app.compare_tab import CompareTab
from lbdt.app.erase_tab import EraseTab
from lbdt.app.inspect_tab import InspectTab
from lbdt.app.page import page
from lbdt.app.parts import BUSY, failed, followed
from lbdt.app.streaming import stream
from lbdt.app.world import Limits, World
from lbdt.canvas import KINDS
from tests import toy
from tests.app import browser as b

FIELDS = Asked("cat", ["Cats"], "saeuron", 7, 3, 3.0, 0, "row", "known", 0)


@dataclass
class Asking:
    """What Gradio says of who asks."""

    session_hash: str = "someone"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pipeline and an eraser of one's own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tokenizer").mkdir()
    toy.pipeline(folder / "tokenizer").save_pretrained(folder / "pipe")
    toy.eraser().save_pretrained(folder / "eraser", decoder=True)
    world = World(
        torch.device("cpu"), str(folder / "pipe"), str(folder / "eraser"), limits=Limits(steps=50, waiting=2)
    )
    yield world
    world.close()


@pytest.fixture(scope="module")
def tabs(world):
    with gr.Blocks():
        erase = EraseTab(world)
        return erase, CompareTab(world, erase.inputs()), InspectTab(world)


def last(events, control):
    """What a control shows in the end."""
    return [event[control] for event in events if control in event][-1]


def test_examples_are_computed_where_none_are_stored(tabs):
    *_, inspect = tabs
    events = list(inspect._compute(Asking(), "saeuron", "3"))
    assert "Latent 3: the 3 pictures" in last(events, inspect.status)
    assert len(last(events, inspect.gallery)) == 3


def test_methods_are_compared_by_a_folder_that_has_no_strength(tabs):
    _, compare, _ = tabs
    events = list(compare._compare(Asking(), "-1, -3", *FIELDS))
    assert "Done." in last(events, compare.status)
    assert len(last(events, compare.grid)) == 5


def test_an_eraser_that_cannot_steer_is_said_and_compared_without(tabs, world, monkeypatch):
    _, compare, _ = tabs

    def load(settings):
        raise ValueError("/secret/eraser.json: has no decoder")

    monkeypatch.setattr("lbdt.app.world.load_editor", load)
    monkeypatch.setattr(world, "_editors", {("saeuron", "per"): world.editor("saeuron")})
    said = last(compare._compare(Asking(), "-1", *FIELDS), compare.status)
    assert "leave them empty" in said and "secret" not in said
    assert "Done." in last(compare._compare(Asking(), "", *FIELDS), compare.status)


def test_closing_what_is_left_does_not_wait_for_its_step():
    begun, ended = threading.Event(), threading.Event()

    def work(emit, stop):
        emit(1)
        begun.wait(20)
        time.sleep(1)
        assert stop()
        ended.set()

    events = followed(stream(work, lambda: False))
    assert next(events) == 1
    begun.set()
    started = time.monotonic()
    events.close()
    assert time.monotonic() - started < 0.5 and not ended.is_set()
    assert ended.wait(20)


def test_a_picture_that_is_left_frees_its_place_and_the_pipeline(tabs, world):
    erase, *_ = tabs
    left = erase._generate(Asking("left"), *FIELDS._replace(steps=50))
    while "step" not in next(left).get(erase.status, ""):
        pass
    left.close()
    assert "Done:" in last(erase._generate(Asking(), *FIELDS), erase.status)
    assert toy.traces(world.pipe) == []


def test_a_picture_that_was_replaced_leaves_nothing_in_the_next(tabs, world):
    erase, *_ = tabs
    asking = Asking("impatient")
    first = erase._generate(asking, *FIELDS._replace(steps=50))
    while "With the eraser" not in next(first).get(erase.status, ""):
        pass
    second = erase._generate(asking, *FIELDS)
    next(second)
    assert "Cancelled." in last(first, erase.status)
    assert "Done:" in last(second, erase.status)
    assert [event.step for event in world.visit("impatient").making.steps] == [0, 1, 2]


def test_only_the_last_pictures_files_are_kept(tabs, world):
    erase, *_ = tabs
    for seed in (1, 2):
        list(erase._generate(Asking("often"), *FIELDS._replace(seed=seed)))
    names = sorted(path.name for path in world.visit("often").folder.iterdir())
    assert [name.split("-")[1] for name in names] == ["2", "2"]


def test_more_than_may_wait_are_told_to_come_again(tabs, world):
    erase, compare, inspect = tabs
    with world.place("one") as one, world.place("two") as two:
        assert one and two
        assert BUSY in last(erase._generate(Asking(), *FIELDS), erase.status)
        assert BUSY in last(compare._compare(Asking(), "-1", *FIELDS), compare.status)
        assert BUSY in last(inspect._compute(Asking(), "saeuron", "5"), inspect.status)
    assert "Done:" in last(erase._generate(Asking(), *FIELDS), erase.status)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": "a" * 501}, "at most 500 characters"),
        ({"seed": 2**53 + 1}, "Seed: expected"),
        ({"padding": 9}, "Padding: expected a whole number from 0 to 8"),
        ({"guidance": 51.0}, "Guidance scale: expected"),
    ],
    ids=["prompt", "seed", "padding", "guidance"],
)
def test_settings_that_the_controls_could_not_say_are_not_loaded(tabs, world, change, text):
    erase, *_ = tabs
    list(erase._generate(Asking(), *FIELDS))
    good = world.visit("someone").making.done.settings.to_json()
    assert "Settings loaded" in erase._load(good.encode())[erase.status]
    said = erase._load(json.dumps(json.loads(good) | change).encode())
    assert list(said) == [erase.status] and text in said[erase.status]


def test_words_of_a_failure_name_no_file_of_the_machine(caplog):
    with caplog.at_level(logging.ERROR, "lbdt.app"):
        assert "/secret" not in failed(FileNotFoundError(2, "No such file", "/secret/model"))
    assert "/secret/model" in caplog.text
    assert failed(ValueError("too much")) == "It could not be made: too much"


def test_visitors_are_answered_while_an_eraser_loads(world, monkeypatch):
    loading, go_on = threading.Event(), threading.Event()

    def load(settings):
        loading.set()
        go_on.wait(20)
        raise ValueError("none")

    monkeypatch.setattr("lbdt.app.world.load_editor", load)
    other = list(KINDS)[-1]
    thread = threading.Thread(target=lambda: pytest.raises(ValueError, world.editor, other))
    thread.start()
    assert loading.wait(20)
    answered = threading.Thread(target=world.visit, args=["meanwhile"], daemon=True)
    answered.start()
    answered.join(2)
    stuck = answered.is_alive()
    go_on.set()
    thread.join()
    assert not stuck and world.editor("saeuron")


def test_a_model_that_takes_no_guidance_is_given_none(world, monkeypatch):
    class Plain:
        tokenizer = None

        def __call__(self, prompt, num_inference_steps):
            """Never called."""

    monkeypatch.setattr(world, "pipe", Plain())
    assert asked_of(FIELDS._replace(guidance=0), world)[0].guidance is None
    with pytest.raises(AskedError, match="takes none; leave it at 0"):
        asked_of(FIELDS, world)


def test_defaults_of_a_kind_are_the_eraser_s(tabs):
    erase, *_ = tabs
    fields = erase._defaults("saeuron")
    assert fields[3:] == [20, 7.5, 1, "random", "erased", 0]
    assert all(isinstance(value, dict) for value in erase._defaults("../x"))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM], ids=lambda end: end.name)
def test_nothing_of_visitors_is_left_when_it_ends(tmp_path, monkeypatch, end):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with b.served(tmp_path, end=end):
        assert list(tmp_path.glob("lbdt-app-*"))
    assert not list(tmp_path.glob("lbdt-app-*"))


def test_every_handler_is_private_and_has_no_name(world):
    for handler in page(world).fns.values():
        assert handler.api_visibility == "private" or handler.targets[0][1] == "unload"
