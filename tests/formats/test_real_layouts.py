"""Other projects' SAE folders under the names that they really have, and what their loaders would make of lbdt's."""

import json

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from lbdt import cli
from lbdt.sae import ACTIVATIONS, SAEConfig, SparseAutoencoder
from lbdt.sae.model import read_sae
from tests.formats import fixtures, published

UNET = "unet.down_blocks.2.attentions.1"
LAYER = "text_encoder.text_model.encoder.layers.9"
RUN = f"{UNET}_k10_hidden5120_auxk256_bs4096_lr0.0001"
STEERERS = {**fixtures.UNBOX, "auxk_coef": 1 / 32}


def convert(source, out, *more):
    return CliRunner().invoke(cli.app, ["convert", str(source), "--out", str(out), *map(str, more)])


@pytest.mark.parametrize(
    ("where", "hookpoint"),
    [
        (fixtures.RUN, f"{fixtures.RUN}/final"),
        (fixtures.RUN, None),
        ("a b=c;d,e:12:30/run #1 (best)", "a b=c;d,e:12:30/run #1 (best)/final"),
        ("12:30", "12:30/final"),
    ],
    ids=["by name", "as the only choice", "any name", "a time"],
)
def test_a_folder_with_colons_is_reached(tmp_path, where, hookpoint):
    fixtures.unbox(tmp_path / where / "final", STEERERS)
    read = read_sae(tmp_path, hookpoint)
    assert (read.format, read.sae.config.update) == ("steerers", False)
    assert any("the only one there" in note for note in read.assumptions) == (hookpoint is None)
    more = () if hookpoint is None else ("--hookpoint", hookpoint)
    done = convert(tmp_path, tmp_path / "out", *more)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("hookpoint", ["C:/x", "c:\\x", "C:"])
def test_a_drive_is_no_subfolder(tmp_path, hookpoint):
    fixtures.unbox(tmp_path / fixtures.RUN / "final")
    with pytest.raises(ValueError, match="expected the name of a subfolder"):
        SparseAutoencoder.from_pretrained(tmp_path, hookpoint=hookpoint)


def test_two_runs_are_listed_and_asked_for(tmp_path):
    for name in (fixtures.RUN, RUN):
        fixtures.unbox(tmp_path / name / "final")
    with pytest.raises(ValueError, match=f"pass hookpoint=.*{fixtures.RUN}/final, {RUN}/final"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("folder", "config", "kind", "update", "site"),
    [
        (f"{RUN}/final", fixtures.UNBOX, "sdxl-unbox", True, f"{UNET}:update"),
        (f"{fixtures.RUN}/final", fixtures.UNBOX, "steerers", False, f"{LAYER}:output"),
        (f"{fixtures.RUN}/final", STEERERS, "steerers", False, f"{LAYER}:output"),
        ("text_encoder_2.encoder.block.23_k32_hidden16384", fixtures.UNBOX, "steerers", False, None),
        ("final", STEERERS, "steerers", False, None),
    ],
    ids=["a UNet block", "a text layer", "a text layer and its key", "a second encoder", "its key alone"],
)
def test_the_name_of_the_folder_tells_whose_it_is(tmp_path, monkeypatch, folder, config, kind, update, site):
    fixtures.unbox(tmp_path / folder, config)
    monkeypatch.chdir(tmp_path / folder)
    site = "text_encoder_2.encoder.block.23:output" if folder.startswith("text_encoder_2") else site
    for path in (tmp_path / folder, "."):
        read = read_sae(path)
        assert (read.format, read.sae.config.update, read.sae.config.site) == (kind, update, site)
        assert any(f"as {kind}'s are, by" in note for note in read.assumptions)


@pytest.mark.parametrize(
    ("folder", "config", "why"),
    [
        ("sae", fixtures.UNBOX, "its name is no block's"),
        ("layers.9_k3_hidden12/final", fixtures.UNBOX, "its name is no block's"),
        (RUN, STEERERS, "its name is sdxl-unbox's and its auxk_coef Concept Steerers'"),
    ],
    ids=["no block", "no root", "name and key disagree"],
)
def test_what_the_files_leave_open_is_asked(tmp_path, folder, config, why):
    path = fixtures.unbox(tmp_path / folder, config)
    with pytest.raises(
        ValueError, match=rf"{why}; pass format='sdxl-unbox' or 'steerers' .lbdt convert: --from"
    ):
        SparseAutoencoder.from_pretrained(path)
    refused = convert(path, tmp_path / "out")
    assert refused.exit_code == 1 and "--from" in refused.stderr and not (tmp_path / "out").exists()
    for kind, update in (("sdxl-unbox", True), ("steerers", False)):
        assert SparseAutoencoder.from_pretrained(path, format=kind).config.update == update
        assert read_sae(path, update=update).format == kind
        assert convert(path, tmp_path / kind, "--from", kind).exit_code == 0


@pytest.mark.parametrize("activation", [kind for kind in ACTIVATIONS if kind != "topk"])
@pytest.mark.parametrize("encoder_only", [False, True], ids=["whole", "encoder only"])
def test_saeurons_loader_fails_on_a_kind_that_it_does_not_know(tmp_path, activation, encoder_only):
    threshold = 0.4 if activation == "batch_topk" else None
    sae = SparseAutoencoder(SAEConfig(6, 12, 3, activation=activation, threshold=threshold))
    sae.requires_grad_(False).save_pretrained(tmp_path, encoder_only=encoder_only)
    with pytest.raises(KeyError, match="d_in"):
        published.saeuron(tmp_path, torch.randn(5, 6))
    back = SparseAutoencoder.from_pretrained(tmp_path)
    assert (back.config.activation, back.config.d_in) == (activation, 6)


def test_older_files_of_such_a_kind_are_read_as_they_were(tmp_path):
    sae = SparseAutoencoder(SAEConfig(6, 12, 3, activation="topk_sigmoid")).requires_grad_(False)
    sae.save_pretrained(tmp_path)
    path = tmp_path / "cfg.json"
    old = sae.config.to_json()
    assert "d_in" in old and json.loads(path.read_text()).keys() ^ old.keys() == {"d_in", "width"}
    path.write_text(json.dumps(old))
    assert SparseAutoencoder.from_pretrained(tmp_path).config.to_json() == old
    path.write_text(json.dumps(old | {"width": 6}))
    with pytest.raises(ValueError, match=r"cfg\.json: unknown key 'width'"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("write", "project"),
    [
        (fixtures.saelens, "SAELens"),
        (lambda f: fixtures.saelens(f, {"architecture": "topk", "metadata": {"hook_name": "x"}}), "SAELens"),
        (lambda f: fixtures.saelens(f, {"hook_point": "x", "d_in": 6, "d_sae": 12}), "SAELens"),
        (fixtures.dictionary_learning, "dictionary_learning"),
        (lambda f: (fixtures.dictionary_learning(f) / "config.json").unlink(), "dictionary_learning"),
    ],
    ids=["SAELens", "SAELens 6", "SAELens before 3", "dictionary_learning", "its weights alone"],
)
@pytest.mark.parametrize("format", ["auto", "saeuron", "sdxl-unbox"])
def test_files_of_projects_that_are_not_read_are_named(tmp_path, write, project, format):
    write(tmp_path / "sae")
    with pytest.raises(
        ValueError, match=rf"an SAE of {project}, .*expected those of lbdt, saeuron.*or train one"
    ):
        SparseAutoencoder.from_pretrained(tmp_path / "sae", format=format)
    done = convert(tmp_path / "sae", tmp_path / "out", "--from", format)
    assert done.exit_code == 1 and project in done.stderr and not (tmp_path / "out").exists()


def test_a_topk_sae_is_still_saeurons(tmp_path):
    sae = SparseAutoencoder(SAEConfig(6, 12, 3)).requires_grad_(False)
    sae.save_pretrained(tmp_path)
    x = torch.randn(5, 6)
    torch.testing.assert_close(published.saeuron(tmp_path, x)[2], sae(x))
    assert "W_dec" in safetensors.torch.load_file(tmp_path / "sae.safetensors")
