"""`lbdt attack --world unlearncanvas`: the published pairs, sampling and judge, on tiny random models."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lbdt import cli
from lbdt.attack import unlearncanvas
from lbdt.attack.pairs import AttackRequest
from lbdt.evaluation.worlds.unlearncanvas import OBJECTS, STYLES, THEMES
from tests import toy
from tests.attack.test_attack_command import PLAN, longer
from tests.evaluation.test_unlearncanvas import COLOURS, LOOKS, THINGS, planted

CPU = torch.device("cpu")
MORE = {"world": "unlearncanvas", "model": "pipe"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """pipe/ with room for the published prompts, eraser/, and the classifiers under their published names."""
    root = tmp_path_factory.mktemp("unlearncanvas")
    toy.pipeline(root / "tokenizer").save_pretrained(root / "pipe")
    config = root / "pipe" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 40}))
    longer(root)
    toy.eraser(k=8).save_pretrained(root / "eraser", decoder=True)
    planted(root / "style50_cls.pth", OBJECTS, THINGS)
    planted(root / "style50.pth", THEMES, LOOKS)
    return root


@pytest.mark.parametrize(("task", "names"), [("object", THINGS), ("style", LOOKS)])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_judge_is_the_classifier_of_the_task(folder, task, names, given):
    file = folder / ("style50_cls.pth" if task == "object" else "style50.pth")
    judge = unlearncanvas.ClassifierNames(folder if given == "folder" else file, task, CPU)
    pictures = [Image.new("RGB", (16, 16), colour) for colour in COLOURS]
    assert judge(pictures) == list(names) and file.name in judge.name


def test_the_classifier_of_the_other_task_is_refused(folder):
    with pytest.raises(ValueError, match="expected a classifier of 51 classes, got 20"):
        unlearncanvas.ClassifierNames(folder / "style50_cls.pth", "style", CPU)


def test_the_pairs_are_the_published_thousand():
    rows = unlearncanvas.pairs("object", (), (), OBJECTS, 42)
    assert len(rows) == len({row.text for row in rows}) == 1000 and {row.seed for row in rows} == {42}
    assert rows[0].text == "An image of Architectures in Abstractionism style."
    swapped = unlearncanvas.pairs("style", (), (), STYLES, 42)
    assert {row.text for row in swapped} == {row.text for row in rows}
    assert (swapped[0].concept, swapped[0].style) == (STYLES[0], OBJECTS[0])


def test_what_is_not_named_is_what_the_eraser_knows_and_quick_thins_it():
    assert {row.concept for row in unlearncanvas.pairs("object", (), (), ("Cats", "Sphinx"), 0)} == {"Cats"}
    few = unlearncanvas.pairs("object", (), (), OBJECTS, 0, thin=True)
    assert len(few) == 4 * 17
    assert len(unlearncanvas.pairs("object", ("Cats", "Dogs"), ("Monet",), OBJECTS, 0, thin=True)) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        pytest.param(
            ("object", ("cat",), (), OBJECTS), "--concept cat: UnlearnCanvas, --task object", id="concept"
        ),
        pytest.param(("object", (), ("Cubist",), OBJECTS), "--style Cubist: UnlearnCanvas", id="style"),
        pytest.param(("object", (), ("Seed_Images",), OBJECTS), "--style Seed_Images", id="photographs"),
        pytest.param(
            ("style", ("Cats",), (), STYLES), "--concept Cats: UnlearnCanvas, --task style", id="task"
        ),
        pytest.param(("object", (), (), ("Sphinx",)), "knows none of UnlearnCanvas' concepts", id="eraser"),
    ],
)
def test_names_that_the_protocol_has_not_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        unlearncanvas.pairs(*given, 0)


def test_the_published_sampling_is_the_default():
    request = AttackRequest(**(PLAN | MORE))
    assert (request.settings().steps, request.settings().guidance) == (100, 9.0)
    assert (request.settings().judged, request.settings().position) == ("typed", "prefix")
    other = AttackRequest(
        **(PLAN | MORE | {"steps": 7, "guidance": 2.0, "position": "middle", "judged": "ids"})
    )
    assert (other.settings().steps, other.settings().guidance) == (7, 2.0)
    assert (other.settings().judged, other.settings().position) == ("ids", "middle")


def test_ddim_whatever_the_pipeline_came_with():
    from diffusers import DDIMScheduler, PNDMScheduler

    pipe = SimpleNamespace(scheduler=PNDMScheduler(beta_start=0.002))
    prepared = unlearncanvas.prepared(pipe)
    assert prepared is pipe and type(pipe.scheduler) is DDIMScheduler
    assert pipe.scheduler.config.beta_start == 0.002


@pytest.mark.parametrize(
    ("more", "concept"),
    [
        pytest.param([], "Cats", id="prefix"),
        pytest.param(["--position", "suffix", "--judged", "ids"], "Dogs", id="suffix-ids"),
        pytest.param(["--position", "middle"], "Cats", id="middle"),
    ],
)
def test_the_command(folder, tmp_path, more, concept):
    given = ["--model", "pipe", "--eraser", "eraser", "--classifier", "style50_cls.pth"]
    given = [str(folder / word) if (folder / word).exists() else word for word in given]
    search = ["--tokens", "1", "--iterations", "1", "--timesteps", "1", "--steps", "2", "--device", "cpu"]
    pairs = ["--concept", concept, "--style", "Joy", "--style", "Monet", "--seed", "42"]
    words = [
        "attack",
        "--world",
        "unlearncanvas",
        *given,
        *search,
        *pairs,
        *more,
        "--out",
        str(tmp_path / "a"),
    ]
    done = CliRunner().invoke(cli.app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert [pair["prompt"] for pair in values["pairs"]] == [
        f"An image of {concept} in {style} style." for style in ("Joy", "Monet")
    ]
    assert {pair["seed"] for pair in values["pairs"]} == {42} and values["attack"]["guidance"] == 9.0
    assert {pair["seen_before"] for pair in values["pairs"]} <= set(OBJECTS)
    kept = json.loads((tmp_path / "a" / "attack.json").read_text())
    assert "style50_cls.pth" in values["judge"] and kept["judge"] == values["judge"]
    table = CliRunner().invoke(cli.app, words)
    assert "published on UnlearnCanvas (reference pictures of its data set" in table.stdout
