"""`lbdt assemble` and `lbdt erase --method steering`, on the tiny pipeline."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lbdt import ConceptEraser, Steering, cli
from tests import toy


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    eraser = toy.eraser(k=4)
    eraser.sae.save_pretrained(root / "sae")
    eraser.dictionary.save_pretrained(root / "dictionary")
    toy.pipeline(root / "tokenizer").save_pretrained(root / "pipe")
    return root


def lbdt(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def assemble(parts, out, *more: object):
    inputs = ("--sae", parts / "sae", "--dictionary", parts / "dictionary", "--hookpoint", toy.HOOKPOINT)
    return lbdt("assemble", *inputs, "--out", out, *more)


def test_the_folder_holds_what_was_asked_for(parts, tmp_path):
    more = (
        "--padding",
        2,
        "--source",
        "mean",
        "--avoid",
        "known",
        "--target",
        "update",
        "--top-k",
        1,
        "--thresholds",
        "published",
    )
    done = assemble(parts, tmp_path / "eraser", *more, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["concepts"] == {"Cats": [0], "Dogs": [1], "Trees": [2]}
    eraser = ConceptEraser.from_pretrained(tmp_path / "eraser")
    assert (eraser.padding, eraser.source, eraser.target, eraser.avoid) == (2, "mean", "update", "known")
    assert eraser.selection == {"top_k": 1, "thresholds": "published"}
    assert eraser.sae.W_dec is None


def test_a_second_call_gives_the_same_bytes(parts, tmp_path):
    kept = []
    for _ in range(2):
        assert assemble(parts, tmp_path / "eraser", "--top-k", 1, "--dtype", "float16").exit_code == 0
        kept.append({p: p.read_bytes() for p in (tmp_path / "eraser").rglob("*") if p.is_file()})
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "more", [(), ("--steering", "saeuron", "--strength", -2)], ids=["no-steering", "another"]
)
def test_a_unit_of_no_sdxl_rule_is_refused(parts, tmp_path, more):
    done = assemble(parts, tmp_path / "e", "--unit", "patches", *more)
    assert done.exit_code == 2 and "--steering sdxl only" in done.stderr
    assert not (tmp_path / "e").exists()


def test_steering_keeps_the_decoder(parts, tmp_path):
    done = assemble(parts, tmp_path / "e", "--top-k", 1, "--steering", "sdxl", "--strength", -2)
    assert done.exit_code == 0, done.output
    steering = Steering.from_pretrained(tmp_path / "e")
    assert (steering.rule, steering.strength, steering.selection) == ("sdxl", -2.0, {"top_k": 1})
    full = toy.eraser(k=4).sae
    assert torch.equal(steering.sae.W_dec, full.W_dec)
    ConceptEraser.from_pretrained(tmp_path / "e")


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (("--steering", "sdxl"), 2, "together"),
        (("--top-k", 1, "--percentile", 99), 1, "not both"),
        (("--assigned",), 1, "assign"),
        (("--dictionary", "/nowhere", "--top-k", 1), 1, "/nowhere"),
    ],
    ids=["rule without strength", "two criteria", "no assignment", "no such dictionary"],
)
def test_refusals_write_nothing(parts, tmp_path, more, code, text):
    done = assemble(parts, tmp_path / "eraser", *more)
    assert done.exit_code == code and text in done.output
    assert not (tmp_path / "eraser").exists()


def test_a_folder_of_something_else_is_left_alone(parts, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    done = assemble(parts, tmp_path, "--top-k", 1)
    assert done.exit_code == 1 and "something else than an eraser" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def erase(parts, folder, out, *more: object):
    places = ("--model", parts / "pipe", "--eraser", folder, "--out", out, "--steps", 2, "--device", "cpu")
    return lbdt("erase", "a cat", "--concept", "Cats", *places, *more)


def test_the_same_folder_serves_both_methods(parts, tmp_path):
    assemble(parts, tmp_path / "e", "--top-k", 1, "--steering", "saeuron", "--strength", -2)
    for method, word in (("per", "patches replaced"), ("steering", "patches steered")):
        done = erase(parts, tmp_path / "e", tmp_path / f"{method}.png", "--method", method)
        assert done.exit_code == 0, done.output
        assert word in done.stdout and (tmp_path / f"{method}.png").stat().st_size
    done = erase(
        parts, tmp_path / "e", tmp_path / "s.png", "--method", "steering", "--strength", -7, "--json"
    )
    values = json.loads(done.stdout)
    assert (values["rule"], values["strength"]) == ("saeuron", -7.0) and "padding" not in values
    assert values["report"]["ran"].startswith("rule saeuron, strength -7.0")


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "steering", "--padding", 1),
        ("--method", "steering", "--avoid", "known"),
        ("--strength", -1),
    ],
    ids=["padding of steering", "avoid of steering", "strength of PER"],
)
def test_options_of_the_other_method_are_bad_usage(parts, tmp_path, more):
    assert erase(parts, tmp_path / "e", tmp_path / "x.png", *more).exit_code == 2
    assert not (tmp_path / "x.png").exists()


def test_an_eraser_without_a_decoder_cannot_steer(parts, tmp_path):
    assemble(parts, tmp_path / "e", "--top-k", 1)
    done = erase(parts, tmp_path / "e", tmp_path / "x.png", "--method", "steering", "--strength", -1)
    assert done.exit_code == 1 and "decoder" in done.output
