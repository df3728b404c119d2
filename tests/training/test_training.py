"""The trainer: gradients against autograd, recovery of known features, resuming, dead latents."""

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.training import Dense, Ranked, explain_variance, geometric_median, train
from lbdt.training.objectives import BatchRows, Context
from tests.repeats import repeats

D, FEATURES, ACTIVE = 16, 24, 3


def features():
    return F.normalize(torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(0)), dim=1)


def batches(step, rows=512):
    """Sparse positive sums of FEATURES directions, around an offset that b_dec has to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    chosen = torch.rand(rows, FEATURES, generator=generator).topk(ACTIVE).indices
    values = torch.rand(rows, ACTIVE, generator=generator) + 0.5
    return torch.zeros(rows, FEATURES).scatter(1, chosen, values) @ features() + 2.0


def state_of(sae):
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert repeats(tensor, second[name]), name


def accumulate(sae, x, *, alpha, dead=None, guess=0.0):
    """Adds the gradient to `.grad`; the losses, and the latents that fired."""
    context = Context(dead, 0 if dead is None else int(dead.sum()), guess)
    rows = BatchRows(x, (x - x.mean(0)).square().sum(), len(x))
    outcome = Ranked(auxk_alpha=alpha).accumulate(sae, rows, context)
    return {name: float(term) for name, term in outcome.terms.items()}, outcome.fired


@pytest.mark.parametrize("batch_topk", [False, True], ids=["topk", "batch_topk"])
@pytest.mark.parametrize("guess", [0.0, 0.05, 9.0], ids=["no guess", "low guess", "guess too high"])
def test_gradients_equal_autograd_of_the_loss(batch_topk, guess):
    torch.manual_seed(0)
    n, k, latents = 50, 3, 20
    sae = SparseAutoencoder(SAEConfig(6, latents, k, batch_topk=batch_topk)).double()
    sae.b_dec.data.normal_()
    sae.encoder.bias.data.normal_()
    x = torch.randn(n, 6, dtype=torch.float64)
    dead = torch.arange(latents) % 3 == 0

    h = F.linear(x - sae.b_dec, sae.encoder.weight, sae.encoder.bias)
    if batch_topk:
        values, indices = h.flatten().topk(n * k)
        z = torch.zeros_like(h).flatten().scatter(0, indices, values.relu()).view_as(h)
    else:
        values, indices = h.topk(k)
        z = torch.zeros_like(h).scatter(1, indices, values.relu())
    reconstruction = z @ sae.W_dec + sae.b_dec
    variance = (x - x.mean(0)).square().sum()
    values, indices = torch.where(dead, h, -torch.inf).topk(3)
    predicted = torch.zeros_like(h).scatter(1, indices, values.relu()) @ sae.W_dec
    residual = (x - reconstruction).detach()
    fvu = (reconstruction - x).square().sum() / variance
    auxk = (predicted - residual).square().sum() / variance
    expected = torch.autograd.grad(fvu + 0.25 * auxk, list(sae.parameters()))

    metrics, _ = accumulate(sae, x, alpha=0.25, dead=dead, guess=guess)
    assert metrics["fvu"] == pytest.approx(fvu.item())
    assert metrics["auxk"] == pytest.approx(auxk.item())
    for (name, parameter), gradient in zip(sae.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("batch_topk", [False, True], ids=["topk", "batch_topk"])
def test_training_recovers_the_features_of_synthetic_data(batch_topk):
    config = SAEConfig(D, 2 * FEATURES, ACTIVE, batch_topk=batch_topk)
    losses = []
    sae = train(
        config,
        batches,
        1500,
        lr=3e-3,
        progress=False,
        log=lambda step, metrics: losses.append(metrics["fvu"]),
    )
    report = explain_variance(sae, batches(-1, 2048))
    assert losses[0] > 0.4
    assert report["fvu"] < 0.1
    assert 0 < report["l0"] <= ACTIVE
    assert 0 <= report["dead"] < 2 * FEATURES
    best = (features() @ sae.W_dec.T).amax(1)
    assert (best > 0.95).sum() >= 0.8 * FEATURES
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2 * FEATURES))


def test_batch_topk_activation_stores_a_threshold_that_keeps_k_latents_on_average():
    config = SAEConfig(D, 2 * FEATURES, ACTIVE, activation="batch_topk")
    sae = train(config, batches, 600, lr=3e-3, progress=False)
    assert sae.config.threshold > 0
    assert explain_variance(sae, batches(-1, 2048))["l0"] == pytest.approx(ACTIVE, rel=0.2)


class Killed(Exception):
    pass


@pytest.mark.parametrize("batch_topk", [False, True], ids=["topk", "batch_topk"])
def test_a_killed_run_resumes_to_the_same_weights_and_losses(tmp_path, batch_topk):
    config = SAEConfig(D, FEATURES, ACTIVE, batch_topk=batch_topk)
    settings = {"progress": False, "checkpoint_every": 4, "dead_after": 1024, "lr": 3e-3}
    whole, resumed = {}, {}
    expected = train(config, batches, 23, log=whole.__setitem__, **settings)

    def until_killed(step):
        if step == 14:
            raise Killed
        return batches(step)

    path = tmp_path / "training.ckpt"
    with pytest.raises(Killed):
        train(config, until_killed, 23, checkpoint=path, **settings)
    torch.manual_seed(123)
    sae = train(config, batches, 23, checkpoint=path, log=resumed.__setitem__, **settings)
    assert list(resumed) == list(range(12, 23))
    assert repeats(resumed, {step: whole[step] for step in resumed})
    assert_same_state(state_of(expected), state_of(sae))
    again = train(config, batches, 23, checkpoint=path, **settings)
    assert_same_state(state_of(expected), state_of(again))
    assert [file.name for file in tmp_path.iterdir()] == ["training.ckpt"]


def test_training_depends_on_the_seed_and_leaves_the_global_generator_alone():
    config = SAEConfig(D, FEATURES, ACTIVE)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = train(config, batches, 3, seed=1, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert_same_state(state_of(first), state_of(train(config, batches, 3, seed=1, progress=False)))
    other = train(config, batches, 3, seed=2, progress=False)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_auxk_teaches_dead_latents_the_residual_and_leaves_the_live_decoder_alone():
    """Latent 0 alone reconstructs, always: so the dead ones can fire in AuxK only, before and after its descent."""
    torch.manual_seed(0)
    sae = SparseAutoencoder(SAEConfig(D, 2 * FEATURES, 1))
    x = batches(0)
    sae.b_dec.data.copy_(x.mean(0))
    sae.encoder.bias.data[0] = 100.0
    sae.encoder.weight.data[0] = 0.0
    sae.W_dec.data[0] = features()[0] / 100
    dead = torch.arange(2 * FEATURES) >= FEATURES

    def gradient(alpha):
        for parameter in sae.parameters():
            parameter.grad = None
        metrics, fired = accumulate(sae, x, alpha=alpha, dead=dead)
        assert (fired == 0).all(), "a dead latent took part in the reconstruction"
        return metrics, {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}

    _, without = gradient(0.0)
    first, total = gradient(1.0)
    for name in ("W_dec", "encoder.weight", "encoder.bias"):
        assert torch.equal(total[name][~dead], without[name][~dead]), name
        assert not without[name][dead].any() and total[name][dead].any(), name
    assert without["W_dec"][0].any()
    optimizer = torch.optim.Adam([sae.W_dec, sae.encoder.weight, sae.encoder.bias], lr=1e-2)
    for _ in range(100):
        gradient(1.0)
        for parameter in (sae.W_dec, sae.encoder.weight, sae.encoder.bias):
            parameter.grad[~dead] = 0.0
        optimizer.step()
    last, _ = gradient(1.0)
    assert last["fvu"] == first["fvu"]
    assert last["auxk"] < 0.5 * first["auxk"]


def test_latents_count_as_dead_after_the_given_rows_and_auxk_then_applies():
    seen = []
    train(
        SAEConfig(D, 8 * FEATURES, 1),
        batches,
        12,
        dead_after=4 * 512,
        progress=False,
        log=lambda step, metrics: seen.append((metrics["dead"] > 0, metrics["auxk"] > 0)),
    )
    assert seen[:5] == [(False, False)] * 5
    assert all(dead and auxk for dead, auxk in seen[5:])


def test_geometric_median_ignores_an_outlier():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, 4, generator=generator)
    x[0] = 1e6
    assert float(geometric_median(x).abs().max()) < 1
    assert float(x.mean(0).abs().max()) > 1000


def test_explain_variance_of_a_perfect_and_a_dead_autoencoder():
    sae = SparseAutoencoder(SAEConfig(2, 4, 2, activation="relu")).requires_grad_(False)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    sae.encoder.weight.copy_(rows)
    sae.W_dec.copy_(rows)
    x = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    assert explain_variance(sae, x) == {"fvu": 0.0, "l0": 2.0, "dead": 2}
    sae.encoder.bias.fill_(-10.0)
    assert explain_variance(sae, x)["dead"] == 4


@pytest.mark.parametrize(
    ("config", "data", "settings", "message"),
    [
        ({}, None, {"objective": Dense()}, "activation 'topk': this objective trains relu or jumprelu"),
        (
            {"activation": "relu"},
            None,
            {"objective": Ranked()},
            "activation 'relu': this objective trains topk",
        ),
        ({"activation": "topk_sigmoid"}, None, {}, "expected normalize_decoder false"),
        ({}, None, {"precision": "float16"}, "precision: expected one of float32, bfloat16"),
        ({"multi_topk": True}, None, {}, "multi_topk: true is not supported in training"),
        ({}, None, {"steps": 0}, "expected steps >= 1"),
        ({}, torch.zeros(8, D + 1), {}, r"batches\(0\): expected \[n >= 2, 16\].*got \(8, 17\)"),
        ({}, torch.full((8, D), torch.nan), {}, "expected finite values, got NaN or infinity"),
    ],
    ids=["dense topk", "ranked relu", "sigmoid", "precision", "multi_topk", "steps", "width", "nan"],
)
def test_bad_arguments(config, data, settings, message):
    arguments = {"steps": 2, "progress": False, **settings}
    with pytest.raises(ValueError, match=message):
        train(SAEConfig(D, FEATURES, ACTIVE, **config), lambda step: data, **arguments)


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(tmp_path):
    config = SAEConfig(D, FEATURES, ACTIVE)
    path = tmp_path / "training.ckpt"
    train(config, batches, 2, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match="belongs to a run with another lr, steps"):
        train(config, batches, 3, lr=1e-3, checkpoint=path, progress=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not a readable training checkpoint"):
        train(config, batches, 2, checkpoint=path, progress=False)
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in torch.linspace(start, len(whole) - 1, 40).long().tolist():
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match="training.ckpt: (damaged, its tensors are not|.*expected finite)"
        ):
            train(config, batches, 2, checkpoint=path, progress=False)


def test_a_checkpoint_of_an_older_version_has_no_digest_and_is_read(tmp_path):
    config, path = SAEConfig(D, FEATURES, ACTIVE), tmp_path / "training.ckpt"
    wanted = train(config, batches, 2, checkpoint=path, progress=False).state_dict()
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    assert about.pop("sha256")
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), metadata=about))
    got = train(config, batches, 2, checkpoint=path, progress=False).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
