"""`lbdt assemble` into a folder that an earlier call wrote, or was killed in; and of parts that belong elsewhere."""

import json

import pytest
import torch

from lbdt import ConceptEraser, Steering
from lbdt.cli.assemble import write_eraser
from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.scoring import sae_settings
from tests import toy


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    eraser = toy.eraser(k=4)
    eraser.sae.save_pretrained(root / "sae")
    eraser.dictionary.save_pretrained(root / "dictionary")
    return root


def assemble(parts, out, rule=None, **settings):
    settings = {"hookpoint": toy.HOOKPOINT, "selection": {"top_k": 1}} | settings
    strength = None if rule is None else -2.0
    places = (str(parts / "sae"), str(parts / "dictionary"), out)
    return write_eraser(*places, settings=settings, rule=rule, strength=strength, dtype="float32")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(BaseException):
    pass


def dies(*_args, **_kwargs):
    raise Killed


@pytest.mark.parametrize(
    "moment",
    [(ConceptDictionary, "save_pretrained"), (Steering, "save_settings")],
    ids=["eraser half written", "steering not written"],
)
def test_a_killed_call_leaves_the_old_eraser_and_the_same_call_replaces_it(
    parts, tmp_path, monkeypatch, moment
):
    assemble(parts, tmp_path / "whole", "sdxl")
    assemble(parts, tmp_path / "killed", padding=3)
    (tmp_path / "killed/README.md").write_text("mine")
    before = contents(tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*moment, dies)
        assemble(parts, tmp_path / "killed", "sdxl")
    assert contents(tmp_path / "killed") == before
    assemble(parts, tmp_path / "killed", "sdxl")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") | {"README.md": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_what_an_older_version_left_half_written_is_replaced(parts, tmp_path):
    assemble(parts, tmp_path / "whole")
    (tmp_path / "killed/sae").mkdir(parents=True)
    for name in (".assembling", "sae/cfg.json", "steering.json"):
        (tmp_path / "killed" / name).touch()
    assemble(parts, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_no_steering_stays_of_an_eraser_that_had_one(parts, tmp_path):
    assemble(parts, tmp_path / "e", "sdxl")
    assemble(parts, tmp_path / "e")
    assemble(parts, tmp_path / "new")
    assert contents(tmp_path / "e") == contents(tmp_path / "new")
    assert ConceptEraser.from_pretrained(tmp_path / "e").sae.W_dec is None


OUTPUT, UPDATE = f"{toy.HOOKPOINT}:output", f"{toy.HOOKPOINT}:update"


def test_an_sae_of_another_training_than_the_dictionarys_is_refused(parts, tmp_path):
    eraser = toy.eraser(k=4)
    (tmp_path / "dictionary").symlink_to(parts / "dictionary")
    with torch.no_grad():
        eraser.sae.encoder.bias[3] += 1
    eraser.sae.save_pretrained(tmp_path / "sae")
    source = tmp_path / "scored"
    eraser.dictionary.save_pretrained(source)
    (source / "score.json").write_text(json.dumps({"sae": sae_settings(toy.eraser(k=4).sae)}))
    settings = {"hookpoint": toy.HOOKPOINT, "selection": {"top_k": 1}}
    common = {"settings": settings, "rule": None, "strength": None, "dtype": "float32"}
    with pytest.raises(
        ValueError, match="score.json: the dictionary is of an SAE with SHA-256 .*score again"
    ):
        write_eraser(str(tmp_path / "sae"), str(source), tmp_path / "out", **common)
    assert not (tmp_path / "out").exists()
    write_eraser(str(parts / "sae"), str(source), tmp_path / "out", **common)


@pytest.mark.parametrize(
    ("made", "target", "message"),
    [
        ({"site": OUTPUT, "bank_site": OUTPUT}, "output", None),
        ({"site": OUTPUT, "bank_site": UPDATE}, "update", None),
        ({"site": OUTPUT, "bank_site": None}, "update", None),
        (
            {"site": UPDATE, "bank_site": OUTPUT},
            "output",
            "site: the dictionary is of .*:update, and the eraser",
        ),
        (
            {"site": OUTPUT, "bank_site": OUTPUT},
            "update",
            "bank site: the dictionary is of .*:output, and the er",
        ),
    ],
    ids=["output", "update replaced", "no bank", "SAE of another site", "bank of another site"],
)
def test_a_dictionary_of_another_site_is_refused(parts, tmp_path, made, target, message):
    toy.eraser(k=4, bank=True).dictionary.save_pretrained(tmp_path / "dictionary")
    (tmp_path / "sae").symlink_to(parts / "sae")
    (tmp_path / "dictionary/score.json").write_text(json.dumps(made))
    if message is None:
        assemble(tmp_path, tmp_path / "out", target=target)
        return
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()
