"""What the eraser and the steering baselines have in common: settings, their file, and the digest of both."""

import json
import subprocess
import sys

import pytest
import torch

from lbdt.activations.pipelines import digest_of_module
from lbdt.editors import ConceptEraser, Editor, Steering, TextSteering, UnetEditor
from lbdt.runs.digests import marked, sha256
from tests import toy

KINDS = ("eraser", "steering")
CHANGES = {
    "padding": ({"padding": 3}, {}),
    "source": ({"source": "mean"}, {}),
    "avoid": ({"avoid": "known"}, {}),
    "strength": ({}, {"strength": -4.0}),
    "hookpoint": ({"hookpoint": toy.DETECT_AT}, {"hookpoint": toy.DETECT_AT}),
    "target": ({"target": "update"}, {}),
    "detect_at": ({"detect_at": toy.DETECT_AT}, {}),
    "rule": ({}, {"rule": "sdxl"}),
    "error": ({}, {"error": "released"}),
}
FREE = ("padding", "source", "strength")


def editor(kind: str, **settings) -> UnetEditor:
    if kind == "eraser":
        return toy.eraser(k=8, **settings)
    parts = toy.eraser(k=8)
    given = {"hookpoint": toy.HOOKPOINT, "strength": -1.0, "selection": {"top_k": 1}} | settings
    return Steering(parts.sae, parts.dictionary, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_are_what_the_file_says_and_the_class_takes(tmp_path, kind):
    made = editor(kind)
    made.save_pretrained(tmp_path)
    text = (tmp_path / f"{kind}.json").read_text()
    assert json.loads(text) == {"version": 1, **made.settings} and set(made.SHOWN) < set(made.settings)
    again = type(made).from_pretrained(tmp_path)
    assert again.settings == made.settings == type(made)(made.sae, made.dictionary, **made.settings).settings
    assert made.settings is not made.settings
    again.save_settings(tmp_path)
    assert (tmp_path / f"{kind}.json").read_text() == text


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for name in CHANGES for place, kind in enumerate(KINDS) if CHANGES[name][place]],
)
def test_given_settings_come_before_those_of_the_file(tmp_path, kind, name):
    """They change the digest too, but for those by which a run tells its own settings apart."""
    editor(kind).save_pretrained(tmp_path, **{"decoder": True} if kind == "eraser" else {})
    change = CHANGES[name][KINDS.index(kind)]
    made = type(editor(kind)).from_pretrained(tmp_path, **change)
    assert made.settings == editor(kind).settings | change
    same = made.digest() == type(made).from_pretrained(tmp_path).digest()
    assert same is (name in FREE)


def test_a_bad_given_setting_is_refused_and_names_the_file(tmp_path):
    toy.eraser().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"eraser\.json: padding: expected an integer >= 0, got -1"):
        ConceptEraser.from_pretrained(tmp_path, padding=-1)
    with pytest.raises(ValueError, match=r"eraser\.json: .*strength"):
        ConceptEraser.from_pretrained(tmp_path, strength=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_digest_is_of_what_it_always_was(kind):
    """Unfinished evaluations and attacks hold it."""
    made = editor(kind)
    settings = {
        "eraser": ("detect_at=None", "target=output", "rule=None", "error=None", "where=None"),
        "steering": ("detect_at=None", "target=None", "rule=saeuron", "error=corrected", "where=all"),
    }
    parts = [digest_of_module(made.sae), f"hookpoint={toy.HOOKPOINT}", *settings[kind]]
    for place, concept in enumerate(toy.CONCEPTS):
        thresholds = made.dictionary.published_thresholds()[:, place : place + 1]
        parts += [concept, torch.tensor([place]), thresholds]
    assert made.digest() == sha256(marked([*parts, made.dictionary.mean, "no bank"]))


def test_each_kind_is_an_editor_and_says_what_it_is():
    sae = toy.eraser().sae
    made = {
        "eraser": editor("eraser"),
        "steering": editor("steering"),
        "text": TextSteering(sae, "text_encoder.a"),
    }
    assert all(isinstance(each, Editor) for each in made.values())
    assert [repr(each) for each in made.values()] == [
        f"ConceptEraser(3 concepts, hookpoint={toy.HOOKPOINT!r}, padding=1, source='random')",
        f"Steering(3 concepts, hookpoint={toy.HOOKPOINT!r}, rule saeuron, strength -1.0, "
        "reconstruction error corrected: x + (z' - z) W_dec)",
        "TextSteering(hookpoint='text_encoder.a', text encoder, strength -0.5)",
    ]
    released = editor("steering", error="released")
    assert [each.has_gradient for each in (made["eraser"], made["steering"], released)] == [True, True, False]


def test_looking_at_an_editors_concepts_loads_no_diffusers():
    code = "import sys, lbdt; lbdt.ConceptEraser; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
