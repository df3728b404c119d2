"""Encoder, activation functions, folding and the reduction of every kind to a test on pre-activations."""

import pytest
import torch
from torch.nn import functional as F

from lbdt.sae import ACTIVATIONS, SAEConfig, SparseAutoencoder, SparseCode
from lbdt.sae import model as sae_model

D, L, K = 7, 33, 5


def make(activation, d=D, latents=L, k=K, seed=0):
    torch.manual_seed(seed)
    threshold = 0.4 if activation == "batch_topk" else None
    sae = SparseAutoencoder(SAEConfig(d, latents, k, activation=activation, threshold=threshold))
    for parameter in sae.parameters():
        parameter.data.normal_()
    if activation == "jumprelu":
        sae.theta.data.abs_()
    return sae.requires_grad_(False)


def dense(sae, x):
    """The definition, literally: z [..., L]."""
    h = F.linear(x, sae.encoder.weight, sae.folded_bias())
    kind = sae.config.activation
    if kind in ("topk", "topk_sigmoid"):
        values, indices = h.topk(sae.config.k, dim=-1)
        values = values.relu() if kind == "topk" else values.sigmoid()
        return torch.zeros_like(h).scatter(-1, indices, values)
    floor = {"relu": 0.0, "jumprelu": getattr(sae, "theta", None), "batch_topk": sae.config.threshold}[kind]
    return torch.where(h > floor, h, 0.0)


def scatter(code, latents):
    z = torch.zeros(*code.values.shape[:-1], latents)
    return z.scatter(-1, code.indices, code.values)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 11, D), (11, D), (D,)], ids=str)
def test_encode_equals_the_dense_definition(activation, shape):
    sae = make(activation)
    x = torch.randn(*shape)
    code = sae.encode(x)
    assert code.values.dtype == torch.float32
    assert code.indices.dtype == torch.int64
    torch.testing.assert_close(scatter(code, L), dense(sae, x))


@pytest.mark.parametrize(
    ("latents", "k", "rows"),
    [(1, 1, 4), (9, 9, 4), (33, 1, 4), (33, 5, 0)],
    ids=["one latent", "k = L", "k = 1", "no rows"],
)
def test_encode_at_the_limits(latents, k, rows):
    sae = make("topk", latents=latents, k=k)
    x = torch.randn(rows, 2, D)
    code = sae.encode(x)
    assert code.values.shape == (rows, 2, k)
    torch.testing.assert_close(scatter(code, latents), dense(sae, x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_in_chunks_equals_encode_at_once(activation, monkeypatch):
    sae = make(activation)
    x = torch.randn(23, D)
    whole = scatter(sae.encode(x), L)
    monkeypatch.setattr(sae_model, "_CHUNK_ELEMENTS", 4 * L)
    torch.testing.assert_close(scatter(sae.encode(x), L), whole)


def test_encode_takes_slices_of_larger_buffers_and_zeros():
    sae = make("topk")
    x = torch.randn(2, D, 9, 4).permute(0, 2, 3, 1)[:, ::2]
    torch.testing.assert_close(scatter(sae.encode(x), L), dense(sae, x))
    zeros = torch.zeros(3, D)
    torch.testing.assert_close(scatter(sae.encode(zeros), L), dense(sae, zeros))


def test_half_precision_weights_give_float32_codes():
    sae = make("topk")
    for parameter in sae.parameters():  # small integers, so that float16 is exact
        parameter.data = parameter.data.mul(2).round()
    x = torch.randn(6, D).mul(2).round()
    expected = dense(sae, x)
    code = sae.half().encode(x.half())
    assert code.values.dtype == torch.float32
    assert torch.equal(code.values.sort(-1).values, expected.topk(K).values.sort(-1).values)


def test_folding_the_pre_bias():
    sae = make("relu")
    x = torch.randn(4, D)
    unfolded = F.linear(x - sae.b_dec, sae.encoder.weight, sae.encoder.bias)
    torch.testing.assert_close(sae.pre_activations(x), unfolded)
    assert sae.folded_bias().dtype == torch.float32
    assert sae.folded_bias().shape == (L,)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_decode_is_the_dense_product(activation):
    sae = make(activation)
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(sae(x), dense(sae, x) @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_detection_equals_the_test_on_pre_activations(activation):
    """z_i > mu_i iff h_i > to_pre_activation(mu)_i and rank_i < k, for every kind (METHOD.md, 2.1)."""
    sae = make(activation)
    x = torch.randn(400, D)
    h = sae.pre_activations(x)
    latents = torch.tensor([0, 3, 4, 17, 32])
    thresholds = torch.rand(6, 5) * (0.9 if activation == "topk_sigmoid" else 2.0)
    thresholds[0] = 0.0
    thresholds[1, 2] = torch.inf
    on_h = sae.to_pre_activation(thresholds, latents)
    assert torch.equal(torch.isposinf(on_h), torch.isposinf(thresholds))
    rank = (h.unsqueeze(1) > h[:, latents].unsqueeze(2)).sum(-1)  # [N, U]
    z = scatter(sae.encode(x), L)[:, latents]
    for mu, limit in zip(thresholds, on_h, strict=True):
        passes = h[:, latents] > limit
        if sae.rank_k:
            passes &= rank < sae.rank_k
        assert torch.equal(passes, z > mu)
    assert (z > thresholds[2]).any()


def test_rank_k_is_zero_without_a_rank_test():
    assert {kind: make(kind).rank_k for kind in ACTIVATIONS} == {
        "topk": K,
        "topk_sigmoid": K,
        "relu": 0,
        "jumprelu": 0,
        "batch_topk": 0,
    }


def test_a_sigmoid_threshold_of_one_never_passes():
    sae = make("topk_sigmoid")
    assert torch.isposinf(sae.to_pre_activation(torch.tensor([[1.0, 3.0]]), torch.tensor([0, 1]))).all()


def test_new_weights_are_tied_with_unit_decoder_rows():
    sae = SparseAutoencoder(SAEConfig(D, L, K))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(L))
    torch.testing.assert_close(F.normalize(sae.encoder.weight, dim=1), sae.W_dec)


def test_bad_arguments_are_named():
    sae = make("topk")
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 7\].*got \(3, 8\)"):
        sae.encode(torch.randn(3, 8))
    with pytest.raises(TypeError, match="floating-point tensor, got torch.int64"):
        sae.encode(torch.ones(3, D, dtype=torch.int64))
    with pytest.raises(ValueError, match="values >= 0 and no NaN"):
        sae.to_pre_activation(torch.tensor([[-0.1]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="values >= 0 and no NaN"):
        sae.to_pre_activation(torch.tensor([[torch.nan]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"latents: expected values in \[0, 33\), got 33"):
        sae.to_pre_activation(torch.tensor([[0.1]]), torch.tensor([33]))
    with pytest.raises(ValueError, match=r"expected \[T, U\] and \[U\]"):
        sae.to_pre_activation(torch.zeros(2, 3), torch.tensor([0]))
    without = SparseAutoencoder(SAEConfig(D, L, K, encoder_only=True))
    with pytest.raises(ValueError, match="has no decoder"):
        without.decode(SparseCode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)))
    untrained = SparseAutoencoder(SAEConfig(D, L, K, activation="batch_topk"))
    with pytest.raises(ValueError, match="has no threshold yet"):
        untrained.encode(torch.randn(2, D))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_in": 0}, "d_in: expected an integer > 0, got 0"),
        ({"num_latents": 0}, "num_latents: expected an integer > 0"),
        ({"k": 0}, "expects 1 <= k <= num_latents"),
        ({"k": 34}, "expects 1 <= k <= num_latents"),
        ({"activation": "gelu"}, "activation: expected one of topk"),
        ({"threshold": 0.5}, "only activation 'batch_topk' has one"),
        ({"activation": "batch_topk", "threshold": float("nan")}, "finite number >= 0"),
        ({"input_unit_norm": True}, "input_unit_norm: true is not supported"),
    ],
    ids=str,
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**{"d_in": D, "num_latents": L, "k": K, **fields})


def test_config_types():
    with pytest.raises(TypeError, match="k: expected an integer, got 2.0"):
        SAEConfig(D, L, 2.0)
    with pytest.raises(TypeError, match="update: expected true or false, got 1"):
        SAEConfig(D, L, K, update=1)
    assert SAEConfig(D, k=K, expansion_factor=4).num_latents == 4 * D
