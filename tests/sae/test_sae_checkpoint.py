"""Round trips of checkpoints, and every damaged or foreign file."""

import json
import os

import pytest
import safetensors.torch
import torch

from lbdt.sae import ACTIVATIONS, SAEConfig, SparseAutoencoder
from lbdt.testing import assert_close

SAEURON_CFG = {
    "expansion_factor": 2,
    "normalize_decoder": True,
    "num_latents": 12,
    "k": 3,
    "batch_topk": True,
    "sample_topk": False,
    "input_unit_norm": False,
    "multi_topk": False,
    "d_in": 6,
}


def make(activation="topk", **fields):
    torch.manual_seed(0)
    threshold = 0.4 if activation == "batch_topk" else None
    sae = SparseAutoencoder(SAEConfig(6, 12, 3, activation=activation, threshold=threshold, **fields))
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae.requires_grad_(False)


def saved(folder, **tensors):
    """A SAeUron folder; `tensors` replace (or, None, remove) those of its file."""
    make().save_pretrained(folder)
    (folder / "cfg.json").write_text(json.dumps(SAEURON_CFG))
    state = {**safetensors.torch.load_file(folder / "sae.safetensors"), **tensors}
    safetensors.torch.save_file({k: v for k, v in state.items() if v is not None}, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_round_trip_is_exact(tmp_path, activation):
    sae = make(activation, update=True)
    sae.save_pretrained(tmp_path / "sae")
    back = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert back.config.to_json() == sae.config.to_json()
    assert not back.training
    for name, tensor in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    x = torch.randn(5, 6)
    assert_close(back(x), sae(x), "encode_topk")
    assert sorted(os.listdir(tmp_path / "sae")) == ["cfg.json", "sae.safetensors"]


def test_half_precision_files_load_as_rounded_float32(tmp_path):
    sae = make()
    sae.save_pretrained(tmp_path, dtype=torch.float16)
    assert safetensors.torch.load_file(tmp_path / "sae.safetensors")["W_dec"].dtype == torch.float16
    back = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(back.W_dec, sae.W_dec.half().float())


def test_encoder_only(tmp_path):
    sae = make()
    sae.save_pretrained(tmp_path, encoder_only=True)
    back = SparseAutoencoder.from_pretrained(tmp_path)
    x = torch.randn(5, 6)
    kept = {name: tensor for name, tensor in sae.state_dict().items() if name != "W_dec"}
    assert list(back.state_dict()) == list(kept)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in kept.items())
    assert_close(back.encode(x).values, sae.encode(x).values, "encode_topk")
    with pytest.raises(ValueError, match="has no decoder"):
        back(x)
    back.save_pretrained(tmp_path / "again")
    assert SparseAutoencoder.from_pretrained(tmp_path / "again").config.encoder_only


def test_saeuron_folder_trained_with_batch_topk_runs_per_patch(tmp_path):
    folder = tmp_path / "unet.up_blocks.1.attentions.1"
    folder.mkdir()
    saved(folder)
    sae = SparseAutoencoder.from_pretrained(tmp_path, hookpoint=folder.name, format="saeuron")
    assert (sae.config.activation, sae.rank_k, sae.config.batch_topk) == ("topk", 3, True)
    assert set(safetensors.torch.load_file(folder / "sae.safetensors")) == {
        "encoder.weight",
        "encoder.bias",
        "W_dec",
        "b_dec",
    }
    assert SparseAutoencoder.from_pretrained(tmp_path).config == sae.config
    with pytest.raises(
        ValueError, match="no subfolder 'mid'; subfolders with cfg.json or state_dict.pth: unet.up"
    ):
        SparseAutoencoder.from_pretrained(tmp_path, hookpoint="mid")
    with pytest.raises(ValueError, match="expected the name of a subfolder"):
        SparseAutoencoder.from_pretrained(tmp_path, hookpoint="../elsewhere")
    make().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"pass hookpoint=.*other, unet\.up_blocks\.1\.attentions\.1"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W_dec": None}, r"sae\.safetensors: missing tensor W_dec; expected W_dec, b_dec"),
        ({"extra": torch.ones(1)}, "unknown tensor extra"),
        ({"b_dec": torch.ones(7)}, r"tensor b_dec: expected shape \[6\], got \[7\]"),
        ({"encoder.weight": torch.ones(6, 12)}, r"expected shape \[12, 6\], got \[6, 12\]"),
        (
            {"encoder.bias": torch.full((12,), torch.nan)},
            "tensor encoder.bias: expected finite values, got 12",
        ),
        ({"W_dec": torch.full((12, 6), torch.inf)}, "tensor W_dec: expected finite values, got 72"),
    ],
    ids=["missing", "unknown", "width", "transposed", "nan", "inf"],
)
def test_wrong_tensors(tmp_path, tensors, message):
    saved(tmp_path, **tensors)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_latent": 12}, r"cfg\.json: unknown key 'num_latent'; nearest known key: num_latents"),
        ({"k": "3"}, r"cfg\.json: k: expected an integer, got '3'"),
        ({"k": 99}, r"cfg\.json: k: activation 'topk' expects"),
        ({"input_unit_norm": True}, "input_unit_norm: true is not supported"),
        ({"activation": "batch_topk"}, "needs a 'threshold'"),
    ],
    ids=["unknown key", "type", "range", "unit norm", "no threshold"],
)
def test_wrong_config(tmp_path, change, message):
    saved(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**SAEURON_CFG, **change}))
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "expected a JSON object, got list"), ('{"k": ', "not valid JSON"), ("{}", "missing key 'd_in'")],
    ids=["list", "cut", "empty"],
)
def test_damaged_config(tmp_path, text, message):
    saved(tmp_path)
    (tmp_path / "cfg.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1], ids=["empty", "length cut", "header cut", "data cut"])
def test_truncated_safetensors(tmp_path, keep):
    path = saved(tmp_path) / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"sae\.safetensors: not a readable safetensors file.*truncated"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["cfg.json", "sae.safetensors"])
def test_missing_files(tmp_path, name):
    (saved(tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_pickles_are_read_only_as_what_they_must_be(tmp_path):
    (tmp_path / "state_dict.pth").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"n_dirs_local": 12, "d_model": 6, "k": 3}')
    with pytest.raises(ValueError, match=r"state_dict\.pth: not a zip file as torch\.save writes"):
        SparseAutoencoder.from_pretrained(tmp_path, format="steerers")
    with pytest.raises(ValueError, match="format: expected one of auto"):
        SparseAutoencoder.from_pretrained(tmp_path, format="pickle")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "name only", "a/b/c"])
def test_neither_a_folder_nor_a_repository(name):
    with pytest.raises(ValueError, match="no such folder, and not a Hugging Face repository id"):
        SparseAutoencoder.from_pretrained(name)


def test_a_file_in_place_of_a_folder(tmp_path):
    path = saved(tmp_path) / "sae.safetensors"
    with pytest.raises(ValueError, match="expected a folder holding cfg.json, got a file"):
        SparseAutoencoder.from_pretrained(path)


def test_an_unreachable_repository_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="someone/not-cached: no such folder, and the Hugging Face repository"
    ):
        SparseAutoencoder.from_pretrained("someone/not-cached")


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make("relu")
    broken = make("relu")
    broken.W_dec[0, 0] = torch.nan
    with pytest.raises(ValueError, match="tensor W_dec: expected finite values, got 1 NaN"):
        broken.save_pretrained(tmp_path)
    broken.W_dec[0, 0] = 1e6
    with pytest.raises(ValueError, match="overflow torch.float16"):
        broken.save_pretrained(tmp_path, dtype=torch.float16)

    def full_disk(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
