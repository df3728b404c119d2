"""The linear map and GELU before the encoder (SAEParate): what the encoder reads, its parameters, its files."""

import json
import math

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from lbdt.sae import ACTIVATIONS, SAEConfig, SparseAutoencoder, unbox
from lbdt.sae import model as sae_model
from lbdt.sae.config import PRE_ENCODER
from lbdt.testing import assert_close

D, L, K = 7, 33, 5


def make(activation="topk", seed=0, **fields):
    torch.manual_seed(seed)
    threshold = 0.4 if activation == "batch_topk" else None
    config = SAEConfig(D, L, K, activation=activation, threshold=threshold, pre_encoder=True, **fields)
    sae = SparseAutoencoder(config)
    for parameter in sae.parameters():
        parameter.data.normal_()
    if activation == "jumprelu":
        sae.theta.data.abs_()
    return sae.requires_grad_(False)


def literal(sae, x):
    """h of x [..., D], as SAEParate's page has it, in float64; erf(0.5) is one of its values."""
    state = {name: tensor.double() for name, tensor in sae.state_dict().items()}
    v = (x.double() - state["b_dec"]) @ state["pre_encoder.0.weight"].T + state["pre_encoder.0.bias"]
    v = v * (1 + torch.erf(v / math.sqrt(2))) / 2
    return v @ state["encoder.weight"].T + state["encoder.bias"]


@pytest.mark.parametrize("shape", [(3, 11, D), (11, D), (D,), (0, D)], ids=str)
def test_pre_activations_equal_the_formula(shape):
    sae = make()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert_close(sae.pre_activations(x), literal(sae, x).float(), "encode_topk")
    assert_close(
        F.linear(sae.looked(x), sae.encoder.weight, sae.folded_bias()), sae.pre_activations(x), "encode_topk"
    )


def test_slices_of_larger_buffers_are_read():
    sae = make()
    x = torch.randn(2, D, 9, 4).permute(0, 2, 3, 1)[:, ::2]
    assert_close(sae.pre_activations(x), literal(sae, x).float(), "encode_topk")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_one_of_these_pre_activations(activation, monkeypatch):
    sae = make(activation)
    monkeypatch.setattr(sae_model, "_CHUNK_ELEMENTS", 4 * L)
    x = torch.randn(23, D)
    h, (values, indices) = literal(sae, x).float(), sae.encode(x)
    z = torch.zeros_like(h).scatter(1, indices, values)
    if activation.startswith("topk"):
        kept, at = h.topk(K, dim=1)
        kept = kept.relu() if activation == "topk" else kept.sigmoid()
        dense = torch.zeros_like(h).scatter(1, at, kept)
    else:
        floor = {"relu": 0.0, "jumprelu": getattr(sae, "theta", None), "batch_topk": 0.4}[activation]
        dense = torch.where(h > floor, h, 0.0)
    assert_close(z, dense, "encode_topk")
    assert_close(sae(x), dense @ sae.W_dec + sae.b_dec, "encode_topk")


def test_half_precision_weights_give_float32_codes():
    sae = make()
    x = torch.randn(6, D)
    exact = sae.pre_activations(x)
    h = sae.half().pre_activations(x.half())
    assert h.dtype == torch.float32 and sae.looked(x.half()).dtype == torch.float32
    assert float((h - exact).norm() / exact.norm()) < 4 * torch.finfo(torch.float16).eps


def test_the_folded_parts():
    sae = make()
    weight, bias = sae.folded_pre_encoder()
    linear = sae.pre_encoder[0]
    assert weight is linear.weight and torch.equal(sae.folded_bias(), sae.encoder.bias)
    torch.testing.assert_close(bias, linear.bias - linear.weight @ sae.b_dec)
    plain = SparseAutoencoder(SAEConfig(D, L, K))
    x = torch.randn(2, D)
    assert plain.folded_pre_encoder() is None and plain.looked(x) is x


def test_a_new_one_has_tied_weights_and_the_plain_ones_start_is_unchanged():
    sae = SparseAutoencoder(SAEConfig(D, L, K, pre_encoder=True))
    torch.testing.assert_close(F.normalize(sae.encoder.weight, dim=1), sae.W_dec)
    assert 0 < float(sae.pre_encoder[0].weight.detach().abs().max()) <= 1 / math.sqrt(D)
    assert not any("pre_encoder" in name for name in SparseAutoencoder(SAEConfig(D, L, K)).state_dict())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoder_only", [False, True], ids=["whole", "encoder only"])
def test_round_trip_is_exact(tmp_path, activation, encoder_only):
    sae = make(activation, update=True)
    sae.save_pretrained(tmp_path, encoder_only=encoder_only)
    back = SparseAutoencoder.from_pretrained(tmp_path)
    assert back.config.pre_encoder and back.config.encoder_only == encoder_only
    kept = {name: t for name, t in sae.state_dict().items() if not (encoder_only and name == "W_dec")}
    assert list(back.state_dict()) == list(kept)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in kept.items())
    values = json.loads((tmp_path / "cfg.json").read_text())
    assert values[PRE_ENCODER] is True and "pre_encoder" not in values
    # Loaders of SAeUron's would drop the pre-encoder of a file without a decoder in silence, so they find no width.
    assert ("d_in" in values) == (activation == "topk" and not encoder_only)


def test_half_precision_files_load_as_rounded_float32(tmp_path):
    sae = make()
    sae.save_pretrained(tmp_path, dtype=torch.float16)
    back = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(back.pre_encoder[0].weight, sae.pre_encoder[0].weight.half().float())


def test_a_plain_sae_says_nothing_of_it(tmp_path):
    SparseAutoencoder(SAEConfig(D, L, K)).save_pretrained(tmp_path)
    assert PRE_ENCODER not in json.loads((tmp_path / "cfg.json").read_text())


NAMES = ("pre_encoder.0.weight", "pre_encoder.0.bias")


@pytest.mark.parametrize(
    ("flag", "tensors", "message"),
    [
        (True, {NAMES[0]: None}, r"sae\.safetensors: missing tensor pre_encoder\.0\.weight"),
        (True, dict.fromkeys(NAMES), r"missing tensor pre_encoder\.0\.weight, pre_encoder\.0\.bias"),
        (False, {}, r"sae\.safetensors: unknown tensor pre_encoder\.0\.bias, pre_encoder\.0\.weight"),
        (None, {}, "unknown tensor pre_encoder"),
        (
            True,
            {NAMES[0]: torch.ones(D, D + 1)},
            r"pre_encoder\.0\.weight: expected shape \[7, 7\], got \[7, 8\]",
        ),
        (True, {NAMES[1]: torch.ones(D, 1)}, r"pre_encoder\.0\.bias: expected shape \[7\], got \[7, 1\]"),
        (
            True,
            {NAMES[1]: torch.full((D,), torch.nan)},
            r"pre_encoder\.0\.bias: expected finite values, got 7 NaN",
        ),
        (
            True,
            {NAMES[0]: torch.full((D, D), torch.inf)},
            r"pre_encoder\.0\.weight: expected finite values, got 49",
        ),
        (True, {NAMES[0]: torch.ones(D, D, dtype=torch.int32)}, "expected floating-point numbers"),
        ("yes", {}, r"cfg\.json: pre_encoder: expected true or false, got 'yes'"),
    ],
    ids=[
        "no weight",
        "no tensors",
        "flag false",
        "no flag",
        "width",
        "column",
        "nan",
        "inf",
        "integers",
        "no boolean",
    ],
)
@pytest.mark.parametrize("whose", ["lbdt", "saeparate"])
def test_wrong_files_are_refused(tmp_path, whose, flag, tensors, message):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    if whose == "saeparate":
        for name in ("activation", "threshold", "update", "encoder_only"):
            config.pop(name)
    config.pop(PRE_ENCODER)
    (tmp_path / "cfg.json").write_text(json.dumps(config if flag is None else {**config, PRE_ENCODER: flag}))
    state = {**safetensors.torch.load_file(tmp_path / "sae.safetensors"), **tensors}
    safetensors.torch.save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "sae.safetensors"
    )
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_the_key_of_the_file_is_saeparates(tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "pre_encoder": config.pop(PRE_ENCODER)}))
    with pytest.raises(
        ValueError, match="unknown key 'pre_encoder'; nearest known key: use_pre_encoder_gelu"
    ):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_unbox_files_have_no_place_for_it(tmp_path):
    with pytest.raises(ValueError, match="have no place for a pre-encoder"):
        unbox.save_unbox(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
