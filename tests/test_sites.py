"""An SAE or a dictionary of another site than an editor looks at: refused by constructors, files and commands."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lbdt import ConceptEraser, Steering, canvas, cli
from lbdt.dictionary import ConceptDictionary
from lbdt.editors import TextSteering
from lbdt.sae import SAEConfig, SparseAutoencoder
from tests import toy

HERE, THERE = f"{toy.HOOKPOINT}:output", f"{toy.DETECT_AT}:output"
UPDATE = f"{toy.HOOKPOINT}:update"


def parts(sae_site, dictionary_site, update=False):
    made = toy.eraser(update=update)
    return made.sae.with_site(sae_site), made.dictionary.replaced(site=dictionary_site)


FITTING = {
    "neither known": (None, None, {}),
    "both known": (HERE, HERE, {}),
    "SAE known": (HERE, None, {}),
    "dictionary known": (None, HERE, {}),
    "detect_at": (THERE, THERE, {"detect_at": toy.DETECT_AT}),
    "update replaced": (HERE, HERE, {"target": "update"}),
    "update": (UPDATE, UPDATE, {"update": True}),
}
REFUSED = {
    "SAE": (THERE, None, {}, f"sae: trained at {THERE}, but the .* looks at {HERE} .hookpoint.; .*with_site"),
    "dictionary": (None, THERE, {}, f"dictionary: scored at {THERE}, but the .* looks at {HERE} .*replaced"),
    "SAE and dictionary": (HERE, THERE, {}, f"dictionary: scored at {THERE}, but the .* looks at {HERE}"),
    "dictionary of an update": (HERE, UPDATE, {}, f"dictionary: scored at {UPDATE}, but .* looks at {HERE}"),
    "dictionary of an output": (None, HERE, {"update": True}, f"scored at {HERE}, but .* at {UPDATE}"),
}
DETECTED = {
    "SAE of the hookpoint": (
        HERE,
        None,
        f"sae: trained at {HERE}, but the eraser looks at {THERE} .detect_at.",
    ),
    "dictionary of the hookpoint": (
        THERE,
        HERE,
        f"dictionary: scored at {HERE}, but .* at {THERE} .detect_at.",
    ),
}


@pytest.mark.parametrize("case", FITTING)
def test_parts_of_the_block_and_parts_that_do_not_say_are_taken(tmp_path, case):
    sae_site, site, settings = FITTING[case]
    sae, dictionary = parts(sae_site, site, settings.get("update", False))
    settings = {key: value for key, value in settings.items() if key != "update"}
    eraser = ConceptEraser(sae, dictionary, toy.HOOKPOINT, **settings)
    eraser.save_pretrained(tmp_path, decoder=True)
    back = ConceptEraser.from_pretrained(tmp_path)
    assert (back.sae.config.site, back.dictionary.site) == (sae_site, site)
    for steering in (
        Steering.from_eraser(eraser, strength=-1.0),
        Steering.from_pretrained(tmp_path, strength=-1.0),
    ):
        assert (steering.sae.config.site, steering.dictionary.site) == (sae_site, site)


@pytest.mark.parametrize("editor", [ConceptEraser, Steering], ids=["eraser", "steering"])
@pytest.mark.parametrize("case", REFUSED)
def test_parts_of_another_site_are_refused(editor, case):
    sae_site, site, settings, message = REFUSED[case]
    strength = {"strength": -1.0} if editor is Steering else {}
    with pytest.raises(ValueError, match=message):
        editor(*parts(sae_site, site, **settings), toy.HOOKPOINT, **strength)


@pytest.mark.parametrize("case", DETECTED)
def test_it_is_the_block_looked_at_that_counts(case):
    sae_site, site, message = DETECTED[case]
    with pytest.raises(ValueError, match=message):
        ConceptEraser(*parts(sae_site, site), toy.HOOKPOINT, detect_at=toy.DETECT_AT)


def test_a_block_that_is_set_later_is_compared_at_the_next_use(tmp_path):
    eraser = ConceptEraser(*parts(HERE, HERE), toy.HOOKPOINT)
    eraser.hookpoint = toy.DETECT_AT
    for use in (lambda: eraser.save_pretrained(tmp_path), lambda: eraser.attach(None, ["Cats"])):
        with pytest.raises(ValueError, match=f"sae: trained at {HERE}, but the eraser looks at {THERE}"):
            use()


def test_parts_moved_on_purpose_are_taken():
    sae, dictionary = parts(THERE, THERE)
    ConceptEraser(sae.with_site(None), dictionary.replaced(site=None), toy.HOOKPOINT)


def test_a_folder_whose_parts_disagree_is_refused_by_file(tmp_path):
    ConceptEraser(*parts(HERE, HERE), toy.HOOKPOINT).save_pretrained(tmp_path)
    path = tmp_path / "eraser.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hookpoint": toy.DETECT_AT}))
    with pytest.raises(ValueError, match=rf"eraser\.json: sae: trained at {HERE}, but .* {THERE}"):
        ConceptEraser.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (None, None),
        ("text_encoder.text_model.encoder.layers.0:output", None),
        ("text_encoder.encoder.layers.0:output", None),
        ("text_encoder.encoder.layers.1:output", r"layers\.1:output, but the steering looks at .*layers\.0"),
        (
            "text_encoder_2.encoder.layers.0:output",
            r"text_encoder_2\..*, but the steering looks at text_encoder\.",
        ),
    ],
    ids=["not known", "transformers 4", "transformers 5", "another layer", "another encoder"],
)
@pytest.mark.parametrize(
    "name", ["encoder.layers.0", "text_model.encoder.layers.0"], ids=["here 5", "here 4"]
)
def test_a_text_encoders_layer(name, site, message):
    sae = SparseAutoencoder(SAEConfig(d_in=16, num_latents=16, k=2, site=site))
    if message is None:
        assert TextSteering(sae, f"text_encoder.{name}").hookpoint == f"text_encoder.{name}"
        return
    with pytest.raises(ValueError, match=f"sae: trained at .*{message}"):
        TextSteering(sae, f"text_encoder.{name}")


@pytest.mark.parametrize(
    ("sae_site", "site", "more", "message"),
    [
        (HERE, HERE, (), None),
        (None, None, (), None),
        (THERE, None, (), f"sae: trained at {THERE}, but the eraser looks at {HERE} (hookpoint)"),
        (HERE, THERE, (), f"dictionary: scored at {THERE}, but the eraser looks at {HERE} (hookpoint)"),
        (HERE, None, ("--detect-at", toy.DETECT_AT), f"looks at {THERE} (detect_at)"),
    ],
    ids=["both known", "neither known", "SAE", "dictionary", "detect-at"],
)
def test_assemble(tmp_path, sae_site, site, more, message):
    sae, dictionary = parts(sae_site, site)
    sae.save_pretrained(tmp_path / "sae")
    dictionary.save_pretrained(tmp_path / "dictionary")
    places = ("--sae", tmp_path / "sae", "--dictionary", tmp_path / "dictionary", "--out", tmp_path / "out")
    arguments = ("assemble", *places, "--hookpoint", toy.HOOKPOINT, "--top-k", 1, *more)
    done = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    if message is None:
        assert done.exit_code == 0, done.output
        back = ConceptEraser.from_pretrained(tmp_path / "out")
        assert (back.sae.config.site, back.dictionary.site) == (sae_site, site)
        return
    assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", list(canvas.KINDS))
def test_the_embedded_erasers_load_with_their_site_or_without_one(kind):
    folder = canvas.WEIGHTS / f"eraser-{kind}"
    eraser = ConceptEraser.from_pretrained(folder)
    own = f"{eraser.hookpoint}:{'update' if eraser.sae.config.update else 'output'}"
    # The others' SAEs are older than sites.
    site = own if kind == "saeparate" else None
    assert eraser.sae.config.site == site and eraser.dictionary.site == own
    assert ConceptDictionary.from_pretrained(folder / "dictionary").site == own
    digest = eraser.digest()
    eraser.sae = eraser.sae.with_site(own if site is None else None)
    with torch.no_grad():
        assert eraser.digest() == digest
