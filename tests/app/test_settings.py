"""Settings of a picture: what is refused, the round trip, and that a file repeats its picture."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lbdt import canvas, cli
from lbdt.app.erasing import emerge
from lbdt.app.settings import MOST_PROMPT, PictureSettings, digest_of, load_editor, read_settings
from lbdt.canvas.defaults import pipeline_of
from lbdt.cli import erase_picture
from lbdt.donors import AVOIDED, SOURCES
from lbdt.editors import Steering
from lbdt.editors.edit_report import StepMask
from lbdt.runs.limits import LARGEST, MOST_PADDING, MOST_PATCHES, MOST_SEED, MOST_STEPS
from tests import toy
from tests.fuzzing import fuzz
from tests.repeats import repeats

TOY = PictureSettings("a cat", ("Cats",), model="pipe", eraser="eraser", steps=3)


def changed(**values) -> str:
    """The JSON of `TOY` with other values; ... takes a field out."""
    found = json.loads(TOY.to_json()) | values
    return json.dumps({name: value for name, value in found.items() if value is not ...})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": 2}, "expected schema 1, got 2"),
        ({"schema": True}, "expected schema 1, got True"),
        ({"schema": ...}, "expected schema 1, got None"),
        ({"paddings": 1}, "unknown field 'paddings'; did you mean 'padding'?"),
        ({"qqqqqqqq": 1}, "unknown field 'qqqqqqqq'; fields are prompt, concepts"),
        ({"seed": ...}, "missing seed; expected every field"),
        ({"prompt": None}, "prompt: expected text, got None"),
        ({"prompt": "a" * (MOST_PROMPT + 1)}, "prompt: expected 0 to 10000 characters, got 10001"),
        ({"concepts": "Cats"}, "concepts: expected a list of names, got 'Cats'"),
        ({"concepts": []}, "concepts: expected 1 to 1000 names, got 0"),
        ({"concepts": ["Cats", 3]}, "concepts: expected text, got 3"),
        ({"concepts": ["Cats", "Dogs", "Cats"]}, "concepts: expected every name once, got 'Cats' again"),
        ({"eraser": None}, "eraser: an eraser belongs to a pipeline"),
        ({"model": ""}, "model: expected 1 to 4096 characters, got 0"),
        ({"kind": "cats"}, "kind: expected one of saeuron, "),
        ({"method": "uce"}, "method: expected one of per, steering; got 'uce'"),
        ({"strength": -1.0}, "strength: is of method 'steering', and the method is 'per'"),
        ({"method": "steering", "padding": 1}, "padding: is of method 'per', and the method is 'steering'"),
        (
            {"method": "steering", "strength": {"Dogs": 1}},
            "strength: expected a number, or one for each of Cats",
        ),
        ({"method": "steering", "strength": "1"}, "strength: expected a number, got '1'"),
        ({"padding": -1}, "padding: expected a whole number from 0 to 65535, got -1"),
        ({"padding": 1.0}, "padding: expected a whole number, got 1.0"),
        ({"padding": True}, "padding: expected a whole number, got True"),
        ({"source": "noise"}, "source: expected one of random, nearest, mean, row; got 'noise'"),
        ({"avoid": 1}, "avoid: expected one of erased, known; got 1"),
        ({"min_patches": 0}, "min_patches: expected a whole number from 1 to "),
        ({"steps": MOST_STEPS + 1}, "steps: expected a whole number from 1 to 10000, got 10001"),
        ({"guidance": -0.5}, "guidance: expected a finite number from 0 to 1e+06, got -0.5"),
        ({"guidance": 10**7}, "guidance: expected a finite number from 0 to 1e+06, got 10000000"),
        ({"seed": 2**63}, "seed: expected a whole number from 0 to 9223372036854775807"),
        ({"seed": None}, "seed: expected a whole number, got None"),
        ({"version": ""}, "version: expected 1 to 4096 characters, got 0"),
        ({"digest": "ab"}, "digest: expected 64 hexadecimal digits, got 'ab'"),
    ],
    ids=lambda value: json.dumps(value, default=lambda _: "absent")[:60] if isinstance(value, dict) else "",
)
def test_a_file_is_refused_in_a_sentence(values, message):
    with pytest.raises(ValueError) as caught:
        PictureSettings.from_json(changed(**values), "mine.json")
    assert str(caught.value).startswith("mine.json: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        (changed(guidance=math.nan), "NaN is no JSON"),
        (changed(guidance=1).replace("1,", "1e999,"), "a number that overflows"),
        (changed().replace('"seed"', '"seed": 1, "seed"'), "'seed' comes twice"),
        (b"\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=["empty", "list", "nan", "overflow", "twice", "bytes", "depth"],
)
def test_what_is_no_settings_file_is_refused(text, message):
    with pytest.raises(ValueError, match=r"^mine\.json: ") as caught:
        PictureSettings.from_json(text, "mine.json")
    assert message in str(caught.value)


def test_numbers_that_are_not_finite_are_refused_in_python_too():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="guidance: expected a finite number"):
            replace(TOY, guidance=value)


def maybe(strategy):
    return st.none() | strategy


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
NUMBERS = st.floats(-LARGEST, LARGEST)


@st.composite
def settings_of_any_kind(draw):
    concepts = tuple(draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)))
    eraser = draw(maybe(NAMES))
    if draw(st.booleans()):
        each = st.fixed_dictionaries(dict.fromkeys(concepts, NUMBERS))
        own = {"method": "steering", "strength": draw(maybe(NUMBERS | each))}
    else:
        own = {
            "padding": draw(maybe(st.integers(0, MOST_PADDING))),
            "source": draw(maybe(st.sampled_from(SOURCES))),
            "avoid": draw(maybe(st.sampled_from(AVOIDED))),
            "min_patches": draw(maybe(st.integers(1, MOST_PATCHES))),
        }
    return PictureSettings(
        draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=50)),
        concepts,
        model=draw(maybe(NAMES)) if eraser else None,
        eraser=eraser,
        kind=draw(st.sampled_from(list(canvas.KINDS))),
        steps=draw(maybe(st.integers(1, MOST_STEPS))),
        guidance=draw(maybe(st.floats(0, LARGEST))),
        seed=draw(st.integers(0, MOST_SEED)),
        digest=draw(maybe(st.text("0123456789abcdef", min_size=64, max_size=64))),
        **own,
    )


@fuzz(settings_of_any_kind())
def test_json_gives_back_the_same(settings):
    text = settings.to_json()
    assert PictureSettings.from_json(text) == PictureSettings.from_json(text.encode()) == settings
    assert PictureSettings.from_json(text).to_json() == text
    assert json.loads(text).keys() == {"schema", *(field.name for field in fields(PictureSettings))}


def test_resolved_settings_say_what_the_eraser_said(tmp_path):
    made = TOY.resolved(toy.eraser(padding=2, source="row", avoid="known", min_patches=3))
    assert (made.padding, made.source, made.avoid, made.min_patches) == (2, "row", "known", 3)
    pipe = toy.pipeline(tmp_path)
    assert made.guidance is None and TOY.resolved(toy.eraser(), pipe).guidance == 7.5
    given = replace(TOY, padding=0, guidance=2)
    kept = given.resolved(toy.eraser(padding=2), pipe)
    assert (kept.padding, kept.guidance, kept.steps) == (0, 2.0, 3)
    assert replace(TOY, steps=None).resolved(toy.eraser()).steps == 20


@pytest.mark.parametrize("kind", list(canvas.KINDS))
def test_on_emojicanvas_the_sampling_is_the_kinds(kind):
    made = PictureSettings("a cat", ("Cats",), kind=kind).resolved(canvas.load_eraser(kind))
    assert (made.steps, made.guidance) == canvas.KINDS[kind]


def test_other_defaults_later_change_nothing():
    made = TOY.resolved(toy.eraser(padding=2, source="row"))
    later = toy.eraser(padding=1, source="mean", avoid="known", min_patches=5)
    assert made.resolved(later) is made
    applied = made.applied(later)
    assert (applied.padding, applied.source, applied.avoid, applied.min_patches) == (2, "row", "erased", None)
    assert (later.padding, later.source) == (1, "mean")


@pytest.mark.parametrize(
    "other",
    [{"threshold": 0.4}, {"target": "update"}, {"bank": True}, {"detect_at": toy.DETECT_AT}],
    ids=lambda other: next(iter(other)),
)
def test_another_erasers_settings_are_refused(other):
    made = TOY.resolved(toy.eraser())
    assert made.digest == digest_of(toy.eraser(padding=3))
    with pytest.raises(ValueError, match="digest: these settings are of another eraser"):
        made.resolved(toy.eraser(**other))


def test_an_unknown_concept_and_the_other_methods_editor_are_refused():
    with pytest.raises(ValueError, match="did you mean 'Cats'"):
        replace(TOY, concepts=("cat",)).resolved(toy.eraser())
    with pytest.raises(TypeError, match="editor: method 'steering' takes an editor of kind steering"):
        replace(TOY, method="steering").resolved(toy.eraser())
    with pytest.raises(ValueError, match="expected resolved ones"):
        TOY.applied(toy.eraser())


def test_a_steering_with_a_strength_for_each_concept():
    steering = Steering.from_eraser(toy.eraser(), strength={"Cats": -1.0, "Dogs": -2.0})
    made = replace(TOY, method="steering", concepts=("Dogs", "Cats")).resolved(steering)
    assert made.strength == {"Dogs": -2.0, "Cats": -1.0}
    assert PictureSettings.from_json(made.to_json()) == made
    assert made.applied(Steering.from_eraser(toy.eraser(), strength=-9.0)).strength == made.strength
    with pytest.raises(ValueError, match="strength: expected a number, or one for each of Trees"):
        replace(TOY, method="steering", concepts=("Trees",)).resolved(steering)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    toy.pipeline(root / "tokenizer").save_pretrained(root / "pipe")
    eraser = toy.eraser(bank=True)
    eraser.save_pretrained(root / "eraser", decoder=True)
    Steering.from_eraser(eraser, strength=-1.0).save_settings(root / "eraser")
    return root


def lbdt(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "options",
    [
        ["--concept", "Cats"],
        "--concept Cats --concept Dogs --padding 0 --source mean --avoid known --min-patches 2 --guidance 2.5".split(),
        ["--concept", "Cats", "--method", "steering"],
        ["--concept", "Cats", "--method", "steering", "--strength", "-3"],
    ],
    ids=["defaults", "all", "steering", "strength"],
)
def test_a_saved_picture_is_repeated(options, folders, tmp_path):
    file, first, second = tmp_path / "new" / "picture.json", tmp_path / "a.png", tmp_path / "b.png"
    place = ["--model", folders / "pipe", "--eraser", folders / "eraser", "--steps", 3, "--seed", 5]
    place += ["--device", "cpu"]
    done = lbdt("erase", "a cat", *options, *place, "--save-settings", file, "--out", first)
    assert done.exit_code == 0, done.output
    again = lbdt("erase", "--settings", file, "--out", second, "--device", "cpu", "--json")
    assert again.exit_code == 0, again.output
    assert repeats(second.read_bytes(), first.read_bytes())
    saved = read_settings(file)
    assert saved.digest and saved.seed == 5 and saved.steps == 3 and saved.guidance is not None
    assert json.loads(again.stdout)["seed"] == 5 and "is of lbdt" not in again.stderr
    made = replace(saved, version="0.0.0")
    file.write_text(made.to_json())
    other = lbdt("erase", "--settings", file, "--out", second, "--device", "cpu")
    assert other.exit_code == 0 and "is of lbdt 0.0.0, and this is " in other.stderr


def test_the_page_makes_the_pictures_of_the_command(folders, tmp_path):
    file, out = tmp_path / "picture.json", tmp_path / "a.png"
    place = ["--model", folders / "pipe", "--eraser", folders / "eraser", "--steps", 3, "--device", "cpu"]
    done = lbdt("erase", "a cat", "--concept", "Cats", *place, "--save-settings", file, "--out", out)
    assert done.exit_code == 0, done.output
    settings = read_settings(file)
    pipe = pipeline_of(settings.model, torch.device("cpu"))
    *steps, last = emerge(pipe, load_editor(settings), settings, cancelled=lambda: False)
    masks = [StepMask(e.timestep, e.mask.detected[None], e.mask.replaced[None]) for e in steps[3:]]
    captions = ("without", "patches of Cats", "Cats erased")
    with Image.open(out) as written:
        assert repeats(erase_picture.compose(last.without, masks, last.erased, captions), written.copy())
    assert last.settings == settings


@pytest.mark.parametrize(
    "options",
    [["a cat"], ["--concept", "Cats"], ["--seed", "0"], ["--save-settings", "x.json"], ["--kind", "saeuron"]],
    ids=lambda options: options[0],
)
def test_beside_a_file_of_settings_nothing_else_is_taken(options, tmp_path):
    (tmp_path / "picture.json").write_text(TOY.to_json())
    refused = lbdt("erase", *options, "--settings", tmp_path / "picture.json")
    assert refused.exit_code == 2 and "leave out" in refused.output


@pytest.mark.parametrize("missing", [["a cat"], ["--concept", "Cats"], []], ids=["concept", "prompt", "both"])
def test_without_a_file_prompt_and_concept_are_needed(missing):
    refused = lbdt("erase", *missing)
    assert refused.exit_code == 2 and "missing; give" in refused.output


def test_a_bad_file_and_a_bad_place_are_one_line(folders, tmp_path):
    (tmp_path / "picture.json").write_text(changed(seed=-1))
    failed = lbdt("erase", "--settings", tmp_path / "picture.json")
    assert failed.exit_code == 1 and "picture.json: seed: expected a whole number" in failed.stderr
    place = ["--model", folders / "pipe", "--eraser", folders / "eraser", "--device", "cpu"]
    failed = lbdt("erase", "a cat", "--concept", "Cats", *place, "--save-settings", tmp_path)
    assert failed.exit_code == 1 and f"--save-settings {tmp_path}: is a folder" in failed.stderr
    made = TOY.resolved(toy.eraser(threshold=0.4))
    made = replace(made, model=str(folders / "pipe"), eraser=str(folders / "eraser"))
    (tmp_path / "picture.json").write_text(made.to_json())
    failed = lbdt("erase", "--settings", tmp_path / "picture.json", "--device", "cpu")
    assert failed.exit_code == 1 and "of another eraser" in failed.stderr
