"""The site that an SAE's files name: kept, validated, and told by other projects' folders."""

import dataclasses
import json

import pytest
import torch

from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.sae.model import read_sae
from tests.formats import fixtures, published

BLOCK = "unet.up_blocks.1.attentions.1"
OUTPUT, UPDATE = f"{BLOCK}:output", f"{BLOCK}:update"


def make(site=OUTPUT, update=False):
    sae = SparseAutoencoder(SAEConfig(6, 12, 3, update=update, site=site))
    return sae.requires_grad_(False)


@pytest.mark.parametrize(
    ("site", "update", "encoder_only"),
    [(OUTPUT, False, False), (UPDATE, True, False), (OUTPUT, False, True), (None, True, False)],
    ids=["output", "update", "encoder only", "not known"],
)
def test_the_site_comes_back(tmp_path, site, update, encoder_only):
    make(site, update).save_pretrained(tmp_path, encoder_only=encoder_only, dtype=torch.float16)
    back = SparseAutoencoder.from_pretrained(tmp_path)
    assert (back.config.site, back.config.encoder_only) == (site, encoder_only)
    back.save_pretrained(tmp_path / "again")
    assert SparseAutoencoder.from_pretrained(tmp_path / "again").config == back.config


def test_a_file_without_a_site_is_as_it_always_was(tmp_path):
    make(None).save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / "cfg.json").read_text())) == [
        *("expansion_factor", "normalize_decoder", "num_latents", "k", "batch_topk", "sample_topk"),
        *("input_unit_norm", "multi_topk", "d_in", "activation", "threshold", "update", "encoder_only"),
    ]
    assert SparseAutoencoder.from_pretrained(tmp_path).config.site is None


def test_saeurons_loader_reads_a_file_with_a_site(tmp_path):
    sae, x = make(), torch.randn(5, 6)
    sae.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["site"] == OUTPUT
    torch.testing.assert_close(published.saeuron(tmp_path, x)[2], sae(x))


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        (
            BLOCK,
            ValueError,
            r"site: expected None or a name such as '.*:output', got 'unet\.up.*kind: expected",
        ),
        (f"{BLOCK}:input", ValueError, "kind: expected one of output, update; got 'input'"),
        ("unet:output", ValueError, "hookpoint: expected a dotted name"),
        ("unet.a b:output", ValueError, "hookpoint: expected a dotted name"),
        ("", ValueError, "site: expected None or a name"),
        (f"{BLOCK}:output:", ValueError, "kind: expected one of output, update; got 'output:'"),
        (UPDATE, ValueError, rf"expected {BLOCK}:output or None, as update is false, got {UPDATE}"),
        (3, TypeError, "site: expected None or a name such as .*, got 3"),
    ],
    ids=["no kind", "unknown kind", "no block", "no name", "empty", "colon", "other kind", "number"],
)
def test_a_site_that_is_none_is_refused(tmp_path, site, error, message):
    with pytest.raises(error, match=message):
        SAEConfig(6, 12, 3, site=site)
    with pytest.raises(error, match=message):
        make().with_site(site)
    make().save_pretrained(tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"site": site}))
    with pytest.raises(ValueError, match=f"cfg.json: .*{message}"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_an_sae_is_moved_with_its_parameters():
    sae, x = make(), torch.randn(5, 6)
    moved = sae.with_site(None)
    assert (sae.config.site, moved.config.site) == (OUTPUT, None)
    assert moved.config == dataclasses.replace(sae.config, site=None)
    assert torch.equal(moved(x), sae(x)) and moved.W_dec is sae.W_dec
    assert sae.with_site("unet.mid_block.attentions.0:output").config.site.startswith("unet.mid_block")


@pytest.mark.parametrize(
    ("folder", "write", "options", "site"),
    [
        (BLOCK, fixtures.saeuron, {}, OUTPUT),
        (BLOCK, fixtures.saeuron, {"update": True}, UPDATE),
        (BLOCK, fixtures.saeuron, {"format": "gsae"}, OUTPUT),
        (f"{BLOCK}_k10_hidden5120_auxk256_bs4096_lr0.0001/final", fixtures.unbox, {}, UPDATE),
        (f"{BLOCK}_k10_hidden5120_auxk256_bs4096_lr0.0001", fixtures.unbox, {}, UPDATE),
        ("unet.mid_block.attentions.0", fixtures.saeuron, {}, "unet.mid_block.attentions.0:output"),
        (f"{BLOCK}.proj_out_k3_hidden12", fixtures.unbox, {}, f"{BLOCK}.proj_out:update"),
        ("up_blocks.1.attentions.1", fixtures.saeuron, {}, None),
        ("layers.9", fixtures.saeuron, {}, None),
        (f"{BLOCK}/best", fixtures.saeuron, {}, None),
        ("unet.v2", fixtures.saeuron, {}, None),
        (f"{BLOCK}-copy", fixtures.saeuron, {}, None),
    ],
    ids=[
        *("SAeUron's", "given as an update", "G-SAE's", "sdxl-unbox's", "without final", "mid block"),
        *("a part of it", "no root", "a language model's", "another subfolder", "no block", "another name"),
    ],
)
def test_the_folders_of_other_projects_name_the_site(tmp_path, folder, write, options, site):
    write(tmp_path / folder)
    for found in (
        read_sae(tmp_path, folder, **options),
        read_sae(tmp_path / folder, **options),
    ):
        assert found.sae.config.site == site
        assert any("by the name of its folder" in note for note in found.assumptions) == (site is not None)


def test_the_folder_of_an_sae_of_lbdts_own_says_nothing(tmp_path):
    make(None).save_pretrained(tmp_path / BLOCK)
    assert SparseAutoencoder.from_pretrained(tmp_path, hookpoint=BLOCK).config.site is None
    make("unet.mid_block.attentions.0:output").save_pretrained(tmp_path / BLOCK)
    for format in ("auto", "saeuron"):
        sae = SparseAutoencoder.from_pretrained(tmp_path, hookpoint=BLOCK, format=format)
        assert sae.config.site == "unet.mid_block.attentions.0:output"
