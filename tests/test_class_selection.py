"""A selection and a strength for each concept: in Python, in files, from SAeUron's parameters, on the command line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lbdt import ConceptEraser, Steering, cli
from lbdt.dictionary.picture_counts import PictureCounts
from tests import toy
from tests.formats import fixtures
from tests.repeats import repeats

OWN = {"top_k": 1, "Cats": {"percentile": 90.0}, "Dogs": {"top_k": 2, "thresholds": "published"}}
LATENTS = {"Cats": [0, 10], "Dogs": [1, 11], "Trees": [2]}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("toy"))


def eraser(selection=OWN, **settings) -> ConceptEraser:
    """Latent c + 10 fires for concept c too, at half of what latent c does."""
    made = toy.eraser(k=8, **settings)
    mean = made.dictionary.mean.clone()
    for concept in range(len(toy.CONCEPTS)):
        mean[concept, :, concept + 10] = mean[concept, :, concept] / 2
    dictionary = made.dictionary.replaced(mean=mean)
    return ConceptEraser(made.sae, dictionary, made.hookpoint, selection=selection, **settings)


def latents(editor) -> dict[str, list[int]]:
    return {name: editor.select(name).latents.tolist() for name in editor.concepts}


def images(editor, pipe, concepts=toy.CONCEPTS, **attach):
    with editor.attach(pipe, list(concepts), **attach) as handle:
        return toy.images(pipe), handle.report()


def test_a_concepts_own_criteria_stand_in_place_of_the_others(pipe):
    made = eraser()
    assert latents(made) == LATENTS and latents(eraser({})) == {n: [i, i + 10] for i, n in enumerate(LATENTS)}
    assert latents(eraser({"Cats": {"top_k": 1}})) == {"Cats": [0], "Dogs": [1, 11], "Trees": [2, 12]}
    chosen = {"Cats": made.dictionary.select("Cats", percentile=90.0), "Dogs": made.select("Dogs")}
    expected, report = images(eraser({"top_k": 1}), pipe, selections=chosen)
    got, same = images(made, pipe)
    assert repeats(got, expected) and same == report
    assert not torch.equal(got, images(eraser({"top_k": 1}), pipe)[0])


def test_what_was_given_is_copied():
    given = {"Cats": {"top_k": 1}}
    made = eraser(given)
    given["Cats"]["top_k"] = 2
    given["Dogs"] = {"top_k": 1}
    assert made.selection == {"Cats": {"top_k": 1}}


def test_a_concept_with_the_name_of_a_criterion():
    made = eraser({})
    dictionary = made.dictionary.replaced(concepts=("top_k", "Dogs", "Trees"))
    own = ConceptEraser(made.sae, dictionary, made.hookpoint, selection={"top_k": {"top_k": 1}})
    assert latents(own) == {"top_k": [0], "Dogs": [1, 11], "Trees": [2, 12]}


def test_it_is_saved_and_older_files_are_read(pipe, tmp_path):
    made = eraser()
    made.save_pretrained(tmp_path, decoder=True)
    assert json.loads((tmp_path / "eraser.json").read_text())["selection"] == OWN
    loaded = ConceptEraser.from_pretrained(tmp_path)
    assert loaded.selection == OWN and loaded.digest() == made.digest() != eraser({"top_k": 1}).digest()
    steering = Steering.from_eraser(made, strength={"Cats": -3.0, "Dogs": -1.0})
    steering.save_pretrained(tmp_path)
    again = Steering.from_pretrained(tmp_path)
    assert again.settings == steering.settings and latents(again) == LATENTS
    assert repeats(images(again, pipe, ["Cats", "Dogs"])[0], images(steering, pipe, ["Cats", "Dogs"])[0])
    for name in ("eraser.json", "steering.json"):
        values = json.loads((tmp_path / name).read_text()) | {"selection": {"top_k": 1}}
        (tmp_path / name).write_text(json.dumps(values))
    for loaded in (ConceptEraser.from_pretrained(tmp_path), Steering.from_pretrained(tmp_path)):
        assert latents(loaded) == {"Cats": [0], "Dogs": [1], "Trees": [2]}


REFUSED = {
    "unknown concept": (
        {"Cat": {"top_k": 1}},
        "selection: 'Cat': unknown concept 'Cat'; did you mean 'Cats'",
    ),
    "unknown criterion": (
        {"Cats": {"topk": 1}},
        "selection: 'Cats': .*unknown key topk; expected some of percent",
    ),
    "two criteria": (
        {"Cats": {"top_k": 1, "percentile": 99.0}},
        "'Cats': give percentile or top_k, not both",
    ),
    "no number": ({"Cats": {"percentile": "99"}}, "'Cats': percentile: expected a number, got '99'"),
    "two levels": ({"Cats": {"Dogs": {"top_k": 1}}}, "'Cats': .*unknown key Dogs"),
    "a list": (["top_k"], "selection: expected criteria such as {'top_k': 2}, got list"),
    "a number": (2, "selection: expected criteria such as .*, got 2"),
    "no criteria": ({"Cats": 3}, "unknown key Cats; expected some of percentile"),
    "wrong for the others": ({"top_k": 0, "Cats": {"top_k": 1}}, "top_k: expected an integer >= 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_selection_is_refused(case, tmp_path):
    selection, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        eraser(selection)
    with pytest.raises((ValueError, TypeError), match=message):
        Steering.from_eraser(eraser({}), strength=-1.0, selection=selection)
    made = eraser({})
    made.selection = selection
    with pytest.raises((ValueError, TypeError), match=message):
        made.save_pretrained(tmp_path)
    eraser({}).save_pretrained(tmp_path)
    path = tmp_path / "eraser.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"selection": selection}))
    with pytest.raises(ValueError, match=rf"eraser\.json: .*{message}"):
        ConceptEraser.from_pretrained(tmp_path)


def test_the_gate_is_of_the_concepts_that_are_detected_as_it_was_counted(pipe):
    """It was calibrated for top_k=1 to more patches than there are: nothing of Trees passes, all of Cats does."""
    made = eraser({"top_k": 1, "Cats": {"top_k": 2}})
    shape = len(toy.CONCEPTS), len(toy.TIMESTEPS), 18
    on, off = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    on[..., -1], off[..., -2] = 10, 10
    made.dictionary = made.dictionary.replaced(gate=PictureCounts(on, off, 16, {"top_k": 1}, 0.005))
    assert images(made, pipe, ["Trees"])[1].replaced == 0
    assert images(made, pipe, ["Cats"])[1].replaced > 0
    made.selection = {"top_k": 1, "Trees": {"top_k": 1}}
    assert images(made, pipe, ["Cats"])[1].replaced == images(made, pipe, ["Trees"])[1].replaced == 0


@pytest.mark.parametrize(
    ("key", "rule"), [("multiplier", "saeuron"), ("alpha", "gsae")], ids=["SAeUron", "G-SAE"]
)
@pytest.mark.parametrize("suffix", ["pth", "json"])
def test_steering_by_class_params(pipe, tmp_path, key, rule, suffix):
    path = fixtures.class_params(tmp_path / "class_params.pth", key)
    if suffix == "json":
        lbdt("convert", path, "--out", tmp_path / "json")
        path = tmp_path / "json" / "class_params.json"
    eraser({"top_k": 1}).save_pretrained(tmp_path / "e", decoder=True)
    made = Steering.from_pretrained(tmp_path / "e", class_params=path)
    assert (made.rule, made.strength) == (rule, {"Cats": -30.0, "Dogs": -15.0, "Trees": -1.0})
    assert made.selection["Dogs"] == {"percentile": 99.99, "thresholds": "published"}
    assert made.select("Dogs").criteria["percentile"] == 99.99
    by_hand = Steering.from_eraser(
        eraser(
            {name: {"percentile": p, "thresholds": "published"} for name, (p, _) in fixtures.PARAMS.items()}
        ),
        rule=rule,
        strength={name: strength for name, (_, strength) in fixtures.PARAMS.items()},
    )
    assert repeats(images(made, pipe)[0], images(by_hand, pipe)[0])
    made.save_pretrained(tmp_path / "e")
    assert Steering.from_pretrained(tmp_path / "e").settings == made.settings


def test_class_params_that_contradict_what_is_given(tmp_path):
    path = fixtures.class_params(tmp_path / "class_params.pth")
    eraser().save_pretrained(tmp_path / "e", decoder=True)
    for more, message in (
        ({"strength": -1.0}, "strength: class_params gives one for each concept"),
        ({"rule": "gsae"}, "rule: .*class_params.pth is of 'saeuron', got 'gsae'"),
    ):
        with pytest.raises(ValueError, match=message):
            Steering.from_pretrained(tmp_path / "e", class_params=path, **more)
    with pytest.raises(ValueError, match=r"nowhere\.pth: cannot be read|nowhere\.pth: no such file"):
        Steering.from_pretrained(tmp_path / "e", class_params=tmp_path / "nowhere.pth")


def lbdt(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    made = eraser()
    made.sae.save_pretrained(root / "sae")
    made.dictionary.save_pretrained(root / "dictionary")
    fixtures.class_params(root / "class_params.pth")
    fixtures.class_params(root / "alpha.pth", "alpha")
    torch.save({"Cat": {"percentile": 99.0, "multiplier": -1.0}}, root / "other.pth")
    torch.save({"Cats": {"percentile": 99.0, "multiplier": -1.0}}, root / "one.pth")
    return root


def assemble(parts, out, params, *more: object):
    inputs = ("--sae", parts / "sae", "--dictionary", parts / "dictionary", "--hookpoint", toy.HOOKPOINT)
    return lbdt("assemble", *inputs, "--out", out, "--class-params", parts / params, *more)


def test_assemble_takes_class_params(parts, tmp_path):
    done = assemble(parts, tmp_path / "e", "class_params.pth", "--steering", "saeuron")
    assert done.exit_code == 0, done.output
    assert "parameters  of 3 concepts from" in done.stdout
    steering, made = Steering.from_pretrained(tmp_path / "e"), ConceptEraser.from_pretrained(tmp_path / "e")
    assert steering.strength == {"Cats": -30.0, "Dogs": -15.0, "Trees": -1.0} and steering.rule == "saeuron"
    assert steering.selection == made.selection
    assert made.selection["Trees"] == {"percentile": 99.995, "thresholds": "published"}


def test_assemble_without_steering_takes_the_percentiles(parts, tmp_path):
    done = assemble(parts, tmp_path / "e", "one.pth", "--top-k", 1)
    assert done.exit_code == 0, done.output
    made = ConceptEraser.from_pretrained(tmp_path / "e")
    assert made.selection == {"top_k": 1, "Cats": {"percentile": 99.0, "thresholds": "published"}}
    assert not (tmp_path / "e" / "steering.json").exists() and made.sae.W_dec is None


@pytest.mark.parametrize(
    ("params", "more", "code", "text"),
    [
        ("class_params.pth", ("--steering", "saeuron", "--strength", -1), 2, "together"),
        ("class_params.pth", ("--strength", -1), 2, "together"),
        ("alpha.pth", ("--steering", "saeuron"), 1, "alpha.pth are of rule gsae; give that rule"),
        ("other.pth", (), 1, "has no class Cats, Dogs, Trees, but Cat, which the dictionary lacks"),
        ("nowhere.pth", (), 1, "nowhere.pth"),
        ("one.pth", ("--thresholds", "calibrated"), 1, "need histograms"),
    ],
    ids=["two strengths", "no rule", "another rule", "another dictionary", "absent", "not calibrated"],
)
def test_assemble_refuses_and_writes_nothing(parts, tmp_path, params, more, code, text):
    done = assemble(parts, tmp_path / "e", params, *more)
    assert done.exit_code == code and text in " ".join(done.output.split()), done.output
    assert not (tmp_path / "e").exists()
