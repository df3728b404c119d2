"""Every objective's written-out gradient against autograd of the loss as its formula states it, in float64."""

import pytest
import torch
from torch.nn import functional as F

from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training import Dense, Ranked, Supervision, objectives, sparse
from lbdt.training.objectives import BatchRows, Context, Scales
from lbdt.training.supervision import BatchLabels

D, LATENTS, K, IMAGES, PATCHES = 6, 20, 5, 8, 6
SCALES = Scales(variance=0.7, activation=1.3)


def autoencoder(activation="topk", **kwargs):
    torch.manual_seed(0)
    config = SAEConfig(
        D, LATENTS, K, activation=activation, normalize_decoder=activation != "topk_sigmoid", **kwargs
    )
    sae = SparseAutoencoder(config).double()
    for parameter in sae.parameters():
        parameter.data.normal_()
    if activation == "jumprelu":
        sae.theta.data.uniform_(0.1, 0.5)
    return sae


def labelled():
    generator = torch.Generator().manual_seed(2)
    present = (torch.rand(IMAGES, 5, generator=generator) < 0.3).double()
    present[0] = 1.0
    return BatchLabels(torch.tensor([3, 7, 11, 0, 19]), 2, present, PATCHES)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES * PATCHES, D, generator=generator, dtype=torch.float64) * 2 + 1


def dense_code(sae, x):
    """Pre-activations and activations [n, L], by autograd."""
    read = x - sae.b_dec
    if sae.pre_encoder is not None:
        read = F.gelu(F.linear(read, sae.pre_encoder[0].weight, sae.pre_encoder[0].bias))
    h = F.linear(read, sae.encoder.weight, sae.encoder.bias)
    if sae.config.activation in ("relu", "jumprelu"):
        return h, h.relu() if sae.config.activation == "relu" else torch.where(h > sae.theta, h, 0.0)
    values, indices = h.topk(K)
    values = values.sigmoid() if sae.config.activation == "topk_sigmoid" else values.relu()
    return h, torch.zeros_like(h).scatter(1, indices, values)


def compare(sae, objective, expected_terms, expected_loss, dead=None, skip=()):
    expected = torch.autograd.grad(expected_loss, list(sae.parameters()), allow_unused=True)
    x = data()
    context = Context(dead, 0 if dead is None else int(dead.sum()), scales=SCALES)
    rows = BatchRows(x, (x - x.mean(0)).square().sum(), len(x), labelled())
    outcome = objective.accumulate(sae, rows, context)
    for name, term in expected_terms.items():
        assert float(outcome.terms[name]) == pytest.approx(float(term.detach())), name
    for (name, parameter), gradient in zip(sae.named_parameters(), expected, strict=True):
        if name not in skip:
            torch.testing.assert_close(
                parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("pre", [False, True], ids=["affine", "pre-encoder"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense auxk", "sparse auxk"])
@pytest.mark.parametrize("activation", ["topk", "topk_sigmoid"])
@pytest.mark.parametrize("kind", ["fvu", "mse", "scaled-mse", "relative"])
def test_every_reconstruction_with_auxk(monkeypatch, activation, kind, sparse, pre):
    monkeypatch.setattr("lbdt.training.objectives._SPARSE_BELOW", 0 if sparse else 16)
    sae, x = autoencoder(activation, pre_encoder=pre), data()
    dead = torch.arange(LATENTS) % 2 == 0
    variance = (x - x.mean(0)).square().sum()
    h, z = dense_code(sae, x)
    error = z @ sae.W_dec + sae.b_dec - x
    loss = {
        "fvu": error.square().sum() / variance,
        "mse": error.square().mean(),
        "scaled-mse": error.square().mean() / SCALES.variance,
        "relative": (error.square() / (x.square() + 1e-2 * SCALES.variance)).mean(),
    }[kind]
    values, indices = torch.where(dead, h, -torch.inf).topk(4)
    values = values.sigmoid() if activation == "topk_sigmoid" else values.relu()
    predicted = torch.zeros_like(h).scatter(1, indices, values) @ sae.W_dec
    residual = -error.detach()
    own = (residual - residual.mean(0)).square().sum()
    auxk = (predicted - residual).square().sum() / (own if kind == "scaled-mse" else variance)
    objective = Ranked(reconstruction=kind, auxk_alpha=0.25, auxk=4)
    terms = {"fvu": error.square().sum() / variance, "auxk": auxk}
    compare(sae, objective, terms, loss + 0.25 * auxk, dead)


def pooled(h, z, labels, variant, share, strength, activation):
    v = h[:, labels.latents]
    if variant == "released":
        v = v.relu()
    elif variant == "sparse-sigmoid":
        v = z[:, labels.latents]
    elif variant == "image":
        relative = v / 4 + 1 if activation == "topk_sigmoid" else v / SCALES.activation
        v = 8 * (relative / strength - 0.5)
    images = v.view(IMAGES, PATCHES, -1)
    return images.topk(max(1, -(-int(share * PATCHES * 100) // 100)), dim=1).values.mean(1)


@pytest.mark.parametrize("pre", [False, True], ids=["affine", "pre-encoder"])
@pytest.mark.parametrize(
    ("variant", "activation", "share", "strength"),
    [
        ("image", "topk", 0.5, 3.0),
        ("image", "topk", 0.0, 1.0),
        ("image", "topk_sigmoid", 0.5, 2.0),
        ("paper", "topk", 1.0, 1.0),
        ("released", "topk", 1.0, 1.0),
        ("sparse-sigmoid", "topk_sigmoid", 1.0, 1.0),
    ],
    ids=["image", "image largest patch", "image sigmoid", "paper", "released", "sparse-sigmoid"],
)
def test_every_supervised_term(variant, activation, share, strength, pre):
    sae, x, labels = autoencoder(activation, pre_encoder=pre), data(), labelled()
    h, z = dense_code(sae, x)
    error = z @ sae.W_dec + sae.b_dec - x
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    v, present = pooled(h, z, labels, variant, share, strength, activation), labels.present
    if variant == "paper":
        assignment = -F.logsigmoid(v)[present > 0].mean()
    elif variant == "sparse-sigmoid":
        assignment = F.binary_cross_entropy(v, present)
    else:
        assignment = F.binary_cross_entropy_with_logits(v, present)
    pairs = torch.corrcoef(v.T)[:3, 3:]
    correlation = pairs.mean() if variant == "paper" else pairs.square().mean()
    l1 = h.relu().mean() if variant == "released" else z.sum(1).mean()
    objective = Ranked(
        auxk_alpha=0.0, supervision=Supervision(variant, 0.6, 0.3, 0.2, pool=share, strength=strength)
    )
    terms = {"fvu": fvu, "assignment": assignment, "correlation": correlation, "l1": l1}
    compare(sae, objective, terms, fvu + 0.6 * (assignment + 0.3 * correlation) + 0.2 * l1)


@pytest.mark.parametrize("pre", [False, True], ids=["affine", "pre-encoder"])
@pytest.mark.parametrize("dead", [False, True], ids=["", "auxk"])
def test_relu_in_chunks(monkeypatch, dead, pre):
    monkeypatch.setattr("lbdt.training.objectives._CHUNK_ELEMENTS", 4 * 7 * LATENTS)
    sae, x = autoencoder("relu", pre_encoder=pre), data()
    variance = (x - x.mean(0)).square().sum()
    h, z = dense_code(sae, x)
    error = z @ sae.W_dec + sae.b_dec - x
    fvu = error.square().sum() / variance
    penalty = (z * sae.W_dec.norm(dim=1)).sum(1).mean() / (variance / len(x)).sqrt()
    terms = {"fvu": fvu, "sparsity": penalty, "l0": (z > 0).sum() / len(x)}
    loss = fvu + 0.3 * penalty
    silent = torch.arange(LATENTS) % 2 == 0 if dead else None
    if dead:
        values, indices = torch.where(silent, h, -torch.inf).topk(4)
        predicted = torch.zeros_like(h).scatter(1, indices, values.relu()) @ sae.W_dec
        terms["auxk"] = (predicted + error.detach()).square().sum() / variance
        loss = loss + 0.25 * terms["auxk"]
    compare(sae, Dense(sparsity=0.3, auxk_alpha=0.25, auxk=4), terms, loss, silent)


@pytest.mark.parametrize("pre", [False, True], ids=["affine", "pre-encoder"])
def test_jumprelu_follows_the_rectangle_kernel(monkeypatch, pre):
    """Thresholds get the pseudo-derivatives of arXiv 2407.14435, worked out here per entry; the rest is autograd's."""
    monkeypatch.setattr("lbdt.training.objectives._CHUNK_ELEMENTS", 4 * 7 * LATENTS)
    sae, x = autoencoder("jumprelu", pre_encoder=pre), data()
    variance = (x - x.mean(0)).square().sum()
    h, z = dense_code(sae, x)
    z.retain_grad()
    fvu = (z @ sae.W_dec + sae.b_dec - x).square().sum() / variance
    l0 = (z > 0).sum() / len(x)
    fvu.backward(retain_graph=True)
    width = 0.4 * SCALES.activation
    near = ((h - sae.theta).abs() < width / 2).double()
    wanted = (-(sae.theta / width) * near * z.grad - 0.3 / len(x) / width * near).sum(0).detach()
    assert wanted.any()
    for parameter in sae.parameters():
        parameter.grad = None
    compare(sae, Dense(0.3, bandwidth=0.4), {"fvu": fvu, "sparsity": l0}, fvu, skip=("theta",))
    torch.testing.assert_close(sae.theta.grad, wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Supervision("other"), "variant: expected one of image, paper"),
        (lambda: Supervision(weight=-1.0), "weight: expected a finite number >= 0"),
        (lambda: Supervision(pool=1.5), r"pool: expected a share in \[0, 1\]"),
        (
            lambda: Ranked(reconstruction="l2").check(SAEConfig(4, 8, 2)),
            "reconstruction: expected one of fvu",
        ),
        (lambda: Dense(bandwidth=0.0).check(SAEConfig(4, 8, activation="relu")), "bandwidth > 0"),
    ],
    ids=["variant", "weight", "pool", "reconstruction", "bandwidth"],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("auxk", [2, None], ids=["few taken", "many taken"])
@pytest.mark.parametrize("dead", [[], [3], [0, 1, 2, 5, 19]], ids=["none dead", "one dead", "five dead"])
@pytest.mark.parametrize("rows, d, latents, k", [(37, 6, 50, 5), (2, 3, 7, 7), (130, 17, 90, 1)])
def test_codes_without_pre_activations_give_the_same_step(monkeypatch, rows, d, latents, k, dead, auxk):
    torch.manual_seed(3)
    sae = SparseAutoencoder(SAEConfig(d, latents, k))
    x = torch.randn(d, rows).T  # not contiguous
    mask = torch.zeros(latents, dtype=torch.bool)
    mask[[at % latents for at in dead]] = True
    if auxk == 2:
        monkeypatch.setattr(objectives, "_SPARSE_BELOW", 1)
    found = []
    for way in (True, False):
        monkeypatch.setattr(objectives, "encodes", lambda *given, way=way: way)
        held = lambda *given: pytest.fail("computed all pre-activations")  # noqa: E731
        monkeypatch.setattr(objectives, "project", held if way else sparse.project)
        sae.zero_grad()
        batch = BatchRows(x, (x - x.mean(0)).square().sum(), rows)
        outcome = Ranked(auxk=auxk).accumulate(sae, batch, Context(mask, int(mask.sum())))
        gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
        found.append(outcome.terms | gradients | {"smallest": outcome.smallest})
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    "dtype, precision, expected",
    [
        (torch.float32, "float32", True),
        (torch.float32, "bfloat16", False),
        (torch.float64, "float32", False),
    ],
)
def test_codes_are_made_without_pre_activations_in_float32_on_a_cpu(dtype, precision, expected):
    assert sparse.encodes(torch.zeros(2, 3, dtype=dtype), precision) is expected
