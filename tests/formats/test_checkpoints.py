"""Other projects' SAE folders: read to the same numbers as their own loaders, or refused by name."""

import json

import pytest
import safetensors.torch
import torch

from lbdt.formats import FORMATS
from lbdt.sae import SAEConfig, SparseAutoencoder, unbox
from lbdt.sae.model import read_sae
from lbdt.testing import assert_close
from tests.formats import fixtures, published

STEERERS = {**fixtures.UNBOX, "auxk_coef": 1 / 32}
PLAIN = {**fixtures.SAEPARATE, "use_pre_encoder_gelu": False}
X = torch.randn(7, fixtures.D, generator=torch.Generator().manual_seed(1))


def agrees(sae, reference):
    """Pre-activations, dense code and reconstruction equal the published loader's."""
    pre, code, out = reference
    assert_close(sae.pre_activations(X), pre, "encode_topk")
    values, indices = sae.encode(X)
    assert_close(torch.zeros_like(pre).scatter(-1, indices, values), code, "encode_topk")
    assert_close(sae(X), out, "encode_topk")


@pytest.mark.parametrize(
    ("write", "loader", "format", "kind", "update"),
    [
        (lambda f: fixtures.saeuron(f), published.saeuron, "auto", "saeuron", False),
        (lambda f: fixtures.saeuron(f), published.saeuron, "saemnesia", "saemnesia", False),
        (lambda f: fixtures.saeparate(f), published.saeparate, "auto", "saeparate", False),
        (lambda f: fixtures.saeparate(f), published.saeparate, "saeparate", "saeparate", False),
        (lambda f: fixtures.saeuron(f, PLAIN), published.saeparate, "auto", "saeparate", False),
        (lambda f: fixtures.saeuron(f), published.saeparate, "saeparate", "saeparate", False),
        (lambda f: fixtures.saeuron(f, PLAIN), published.saeuron, "saeuron", "saeuron", False),
        (lambda f: fixtures.saeuron(f, fixtures.SPARSIFY), published.saeuron, "auto", "sparsify", False),
        (lambda f: fixtures.unbox(f), published.unbox, "sdxl-unbox", "sdxl-unbox", True),
        (lambda f: fixtures.unbox(f, STEERERS), published.unbox, "auto", "steerers", False),
        (lambda f: fixtures.unbox(f), published.unbox, "steerers", "steerers", False),
    ],
    ids=[
        "saeuron",
        "saemnesia",
        "saeparate",
        "saeparate-by-option",
        "saeparate-flag-false",
        "saeparate-without-flag",
        "saeparate-flag-false-as-saeuron",
        "sparsify",
        "sdxl-unbox",
        "steerers-by-key",
        "steerers-by-option",
    ],
)
def test_a_foreign_folder_gives_its_own_loaders_numbers(tmp_path, write, loader, format, kind, update):
    folder = write(tmp_path / "sae")
    read = read_sae(folder, format=format)
    assert (read.format, read.sae.config.update, read.sae.config.activation) == (kind, update, "topk")
    assert read.assumptions and not read.sae.training
    agrees(read.sae, loader(folder, X))
    assert SparseAutoencoder.from_pretrained(folder, format=format).config == read.sae.config


def test_a_gsae_has_saeurons_files_and_its_own_activation(tmp_path):
    folder = fixtures.saeuron(tmp_path / "gsae")
    sae = SparseAutoencoder.from_pretrained(folder, format="gsae")
    assert sae.config.activation == "topk_sigmoid"
    agrees(sae, published.saeuron(folder, X, sigmoid=True))
    assert "no G-SAE" in " ".join(read_sae(folder).assumptions)


def test_a_state_dict_without_a_wrapper_and_renamed_tensors_are_read(tmp_path):
    reference = published.unbox(fixtures.unbox(tmp_path / "wrapped"), X)
    bare = fixtures.unbox(tmp_path / "bare", wrap=False)
    agrees(SparseAutoencoder.from_pretrained(bare, format="steerers"), reference)
    w = fixtures.weights()
    renamed = {"b_dec": w["b"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"]}
    dropped = dict.fromkeys(("pre_bias", "latent_bias", "decoder.weight"))
    for config in (fixtures.SAEURON, fixtures.UNBOX):
        folder = fixtures.unbox(tmp_path / "hybrid", config, "cfg.json", **renamed, **dropped)
        agrees(read_sae(folder, format="saemnesia", update=False).sae, reference)


@pytest.mark.parametrize("format", ["saeuron", "saemnesia", "gsae", "sparsify"])
def test_a_pre_encoder_is_nobody_elses(tmp_path, format):
    folder = fixtures.saeparate(tmp_path / "sae")
    with pytest.raises(ValueError, match=f"an SAE of {format} has no pre-encoder; read it as saeparate"):
        read_sae(folder, format=format)


def test_a_pre_encoder_beside_a_state_dict_is_refused(tmp_path):
    folder = fixtures.unbox(tmp_path / "hybrid", fixtures.SAEPARATE, name="cfg.json")
    with pytest.raises(ValueError, match="has no place for a pre-encoder"):
        read_sae(folder, format="saemnesia", update=False)


def test_a_hybrid_does_not_say_what_its_sae_was_trained_on(tmp_path):
    folder = fixtures.unbox(tmp_path / "hybrid", name="cfg.json")
    with pytest.raises(ValueError, match="does not say .*residual_sae.* pass format='sdxl-unbox'"):
        SparseAutoencoder.from_pretrained(folder)
    assert read_sae(folder, update=True).sae.config.update
    assert SparseAutoencoder.from_pretrained(folder, format="sdxl-unbox").config.update


def test_update_is_the_callers_where_the_files_leave_it_open(tmp_path):
    given = read_sae(fixtures.saeuron(tmp_path / "a"), update=True)
    assert given.sae.config.update and "block's output" not in " ".join(given.assumptions)
    assert not read_sae(fixtures.unbox(tmp_path / "b"), update=False).sae.config.update
    SparseAutoencoder.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="update: the file says false"):
        read_sae(tmp_path / "own", update=True)


def test_what_lbdt_saves_the_published_loaders_read(tmp_path):
    sae = SparseAutoencoder(SAEConfig(fixtures.D, fixtures.N, fixtures.K)).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(2))
    sae.save_pretrained(tmp_path / "lbdt")
    agrees(sae, published.saeuron(tmp_path / "lbdt", X))
    unbox.save_unbox(sae, tmp_path / "unbox")
    agrees(sae, published.unbox(tmp_path / "unbox", X))
    back = read_sae(tmp_path / "unbox", update=False).sae
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in sae.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "unbox").iterdir()) == ["config.json", "state_dict.pth"]


def test_what_lbdt_saves_with_a_pre_encoder_saeparates_loader_reads(tmp_path):
    sae = read_sae(fixtures.saeparate(tmp_path / "theirs")).sae
    sae.save_pretrained(tmp_path / "ours")
    agrees(sae, published.saeparate(tmp_path / "ours", X))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu", "k": 0}, "hold a topk SAE with its decoder; got activation 'relu'"),
        ({"encoder_only": True}, "got activation 'topk' and encoder_only"),
    ],
    ids=["relu", "encoder-only"],
)
def test_what_unbox_files_cannot_hold_is_not_written(tmp_path, change, message):
    sae = SparseAutoencoder(SAEConfig(**{"d_in": 6, "num_latents": 12, "k": 3, **change}))
    with pytest.raises(ValueError, match=message):
        unbox.save_unbox(sae, tmp_path / "out")
    sae = SparseAutoencoder(SAEConfig(6, 12, 3)).requires_grad_(False)
    sae.b_dec[0] = torch.nan
    with pytest.raises(ValueError, match="pre_bias: expected finite values, got 1 NaN"):
        unbox.save_unbox(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"pre_bias": None}, r"state_dict\.pth: missing tensor pre_bias"),
        ({"extra": torch.ones(1)}, "unknown tensor extra"),
        ({"pre_bias": torch.ones(7)}, r"tensor pre_bias: expected shape \[6\], got \[7\]"),
        ({"decoder.weight": torch.ones(12, 6)}, r"decoder\.weight: expected shape \[6, 12\], got \[12, 6\]"),
        ({"latent_bias": torch.full((12,), torch.nan)}, "latent_bias: expected finite values, got 12 NaN"),
        ({"latent_bias": 3.0}, "latent_bias: expected a dense tensor, got float"),
        ({"latent_bias": torch.ones(12).to_sparse()}, "_rebuild_sparse_tensor"),
    ],
    ids=["missing", "unknown", "width", "transposed", "nan", "number", "sparse"],
)
def test_wrong_tensors_of_a_state_dict(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(fixtures.unbox(tmp_path / "sae", **tensors), format="sdxl-unbox")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": None}, r"config\.json: d_model: expected an integer >= 1, got None"),
        ({"n_dirs_local": -1}, "n_dirs_local: expected an integer >= 1"),
        ({"k": 13}, "k: activation 'topk' expects 1 <= k <= num_latents"),
        ({"layer_norm": True}, "unknown key layer_norm"),
        ({"n_dirs_local": 10**9}, r"encoder\.weight: expected shape \[1000000000, 6\]"),
    ],
    ids=["no-width", "negative", "k", "unknown-key", "huge"],
)
def test_wrong_config_of_a_state_dict(tmp_path, change, message):
    folder = fixtures.unbox(tmp_path / "sae", {**fixtures.UNBOX, **change})
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(folder, format="sdxl-unbox")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transcode": True}, "transcode: True is not supported .it predicts another activation"),
        ({"skip_connection": True}, "skip_connection: True is not supported"),
        ({"activation": "groupmax"}, "activation: 'groupmax' is not supported"),
        ({"mystery": 1}, "unknown key 'mystery'"),
    ],
    ids=["transcoder", "skip", "groupmax", "unknown"],
)
def test_a_sparsify_coder_that_is_no_topk_autoencoder_is_refused(tmp_path, change, message):
    folder = fixtures.saeuron(tmp_path / "sae", {**fixtures.SPARSIFY, **change})
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(folder)


def test_the_language_models_gsae_is_refused(tmp_path):
    folder = fixtures.unbox(tmp_path / "sae")
    torch.save({"models_state_dict": [{"pre_bias": torch.ones(6)}]}, folder / "state_dict.pth")
    with pytest.raises(ValueError, match="original G-SAE .* normalises each input"):
        SparseAutoencoder.from_pretrained(folder, format="steerers")
    config = {**fixtures.SAEURON, "activation": "relu"}
    with pytest.raises(ValueError, match="a G-SAE's is topk_sigmoid, got 'relu'"):
        SparseAutoencoder.from_pretrained(fixtures.saeuron(tmp_path / "b", config), format="gsae")


def test_nested_subfolders_are_named_and_reached(tmp_path):
    fixtures.write(tmp_path)
    root = tmp_path / "sdxl-unbox"
    name = "unet.up_blocks.1.attentions.1_k3_hidden12/final"
    assert SparseAutoencoder.from_pretrained(root, hookpoint=name).config.update
    with pytest.raises(ValueError, match=f"pass hookpoint=.*sdxl-unbox/{name}"):
        SparseAutoencoder.from_pretrained(tmp_path)
    for wrong in ("../saeuron", "a/../../b", "/etc", "a\\b", ".", "a//b", "", "*", "C:/x"):
        with pytest.raises(ValueError, match="expected the name of a subfolder"):
            SparseAutoencoder.from_pretrained(root, hookpoint=wrong)


def test_a_header_that_claims_more_than_the_file_has(tmp_path):
    path = fixtures.saeuron(tmp_path / "sae") / "sae.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae")
    header = json.dumps({"b_dec": {"dtype": "F32", "shape": [6], "data_offsets": [0, 1 << 40]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SparseAutoencoder.from_pretrained(tmp_path / "sae")


def test_half_precision_round_trip_through_unbox_files(tmp_path):
    sae = SparseAutoencoder.from_pretrained(fixtures.saeuron(tmp_path / "sae"))
    unbox.save_unbox(sae, tmp_path / "half", dtype=torch.float16)
    state = torch.load(tmp_path / "half" / "state_dict.pth", weights_only=True)["state_dict"]
    assert state["decoder.weight"].dtype == torch.float16
    back = SparseAutoencoder.from_pretrained(tmp_path / "half", format="sdxl-unbox")
    assert torch.equal(back.W_dec, sae.W_dec.half().float())


def test_every_format_is_read_by_name(tmp_path):
    SparseAutoencoder.from_pretrained(fixtures.saeuron(tmp_path / "a")).save_pretrained(tmp_path / "own")
    folders = {"sdxl-unbox": fixtures.unbox(tmp_path / "u"), "steerers": tmp_path / "u"}
    folders["sparsify"] = fixtures.saeuron(tmp_path / "s", fixtures.SPARSIFY)
    folders["lbdt"] = folders["auto"] = tmp_path / "own"
    for name in FORMATS:
        read = read_sae(folders.get(name, tmp_path / "a"), format=name)
        assert read.format == ("lbdt" if name == "auto" else name)
    assert safetensors.torch.load_file(tmp_path / "own" / "sae.safetensors")
