"""Editors of an SAE with a pre-encoder: they detect what `sae.encode` says, at once for all concepts."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lbdt import Steering, ops
from lbdt.editors import ConceptEraser
from lbdt.hooks.pre_encoder import PreEncoder
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.testing import assert_close
from tests import toy
from tests.repeats import MISALIGNED, repeats
from tests.steering import models

SIZE, LATENTS = 8, 32
KINDS = ("topk", "topk_sigmoid", "relu", "jumprelu", "batch_topk", "topk_update", "relu_update")


def sae_of(case: str) -> SparseAutoencoder:
    """Random weights; "_update" at the end: of the block's update."""
    kind = case.removesuffix("_update")
    extra = {"threshold": 0.3} if kind == "batch_topk" else {}
    config = SAEConfig(SIZE, LATENTS, 4, activation=kind, update=kind != case, pre_encoder=True, **extra)
    generator = torch.Generator().manual_seed(3)
    sae = SparseAutoencoder(config).requires_grad_(False)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6)
    return sae


def eraser(case: str = "topk", **settings) -> ConceptEraser:
    # Without a rank test more latents pass.
    given = models.random_steering("topk", 0.4 if case.startswith("topk") else 1.5, strength=-1.0)
    options = {"selection": given.selection, "padding": 0, **settings}
    return ConceptEraser(sae_of(case), given.dictionary, "unet.block", **options)


def steering(case: str = "topk", **settings) -> Steering:
    return Steering.from_eraser(eraser(case), **{"strength": -1.0, **settings})


def calls(rows: int = 4) -> list[tuple[torch.Tensor, ...]]:
    """Timesteps, output and input of the block at two bins; 3 x 4 patches."""
    return [
        (torch.full((rows,), float(t)), models.maps(rows, seed=t), models.maps(rows, seed=t + 1))
        for t in (999, 333)
    ]


def detected(made, names: list[str], x: torch.Tensor, given: torch.Tensor, timestep: float) -> torch.Tensor:
    """[B, N] by the code of each patch, latent by latent."""
    seen = (x - given if made.sae.config.update else x).flatten(2).transpose(1, 2)
    values, indices = made.sae.encode(seen)
    z = torch.zeros(*seen.shape[:2], LATENTS).scatter(2, indices, values)
    out = torch.zeros(seen.shape[:2], dtype=torch.bool)
    bin = toy.TIMESTEPS.index(int(timestep))
    for name in names:
        chosen = made.select(name)
        for column, latent in enumerate(chosen.latents.tolist()):
            out |= z[..., latent] > chosen.thresholds[bin, column]
    return out


def masks(made, names, given_calls, **attach):
    pipe = toy.EchoPipe(SIZE)
    with torch.no_grad(), made.attach(pipe, names, layout=pipe.layout, keep_masks=True, **attach) as attached:
        outputs = [pipe.unet(*call)[0] for call in given_calls]
    return [kept.detected.flatten(1) for kept in attached.masks()], outputs


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("editor", ["per", "gate", "saeuron", "sdxl"])
def test_masks_equal_those_of_the_code(case, editor):
    if editor in ("per", "gate"):
        made = eraser(case, **({"min_patches": 1} if editor == "gate" else {}))
    else:
        made = steering(case, rule=editor)
    names = ["Cats", "Trees"]
    got, _ = masks(made, names, calls())
    for mask, (timesteps, x, given) in zip(got, calls(), strict=True):
        expected = detected(made, names, x, given, float(timesteps[0]))
        assert torch.equal(mask, expected)
        assert 0 < int(expected.sum()) < expected.numel()


@pytest.mark.parametrize("layout", ["channels last", "slice", "patches"])
def test_strides_do_not_matter(layout):
    made = eraser()
    (timesteps, x, given), _ = calls()
    if layout == "channels last":
        strided = x.contiguous(memory_format=torch.channels_last)
    elif layout == "slice":
        strided = torch.randn(4, 2 * SIZE, 3, 8)[:, ::2, :, ::2].copy_(x)
    else:
        strided = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(x.shape)
    (mask,), _ = masks(made, ["Cats"], [(timesteps, strided, given)])
    assert torch.equal(mask, detected(made, ["Cats"], x, given, 999))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_it_follows_the_activations_and_keeps_its_exact_values(dtype):
    made = eraser("topk_update")
    pipe = toy.EchoPipe(SIZE)
    wide = [tuple(tensor.to(dtype) for tensor in call) for call in calls()]
    with torch.no_grad(), made.attach(pipe, ["Cats"], keep_masks=True, layout=pipe.layout) as attached:
        for call in (wide[0], calls()[0], wide[0]):
            pipe.unet(call[0].float(), *call[1:])
    first, exact, again = (kept.detected.flatten(1) for kept in attached.masks())
    expected = detected(made, ["Cats"], *calls()[0][1:], 999)
    assert torch.equal(exact, expected) and torch.equal(first, again)
    tolerated = 0 if dtype == torch.float64 else 4  # patches on the border
    assert int((first != expected).sum()) <= tolerated


@pytest.mark.parametrize("minus", [False, True], ids=["output", "update"])
def test_the_map_of_every_row_is_what_the_sae_says(minus):
    sae = sae_of("topk")
    x, given = models.maps(3), models.maps(3, seed=1)
    pre = PreEncoder(*sae.folded_pre_encoder())
    seen = x - given if minus else x
    out = pre(x, given if minus else None)
    assert out.shape == (3, SIZE, 12) and out.is_contiguous()
    assert_close(out.transpose(1, 2), sae.looked(seen.flatten(2).transpose(1, 2)), "encode_topk")
    assert torch.equal(pre(x[1:2]), pre(x)[1:2])
    assert pre(x[:0]).shape == (0, SIZE, 12)


def test_it_is_computed_once_a_call_also_for_known_latents(monkeypatch):
    ran, seen = [], []
    original, detect = PreEncoder.__call__, ops.detect_patches
    monkeypatch.setattr(PreEncoder, "__call__", lambda *a: ran.append(1) or original(*a))
    monkeypatch.setattr(ops, "detect_patches", lambda x, *a, **k: seen.append(x) or detect(x, *a, **k))
    made = eraser("topk_update", avoid="known")
    masks(made, ["Cats"], calls())
    assert len(ran) == 2 and len(seen) == 4
    assert seen[0] is seen[1] and seen[2] is seen[3] and seen[0] is not seen[2]


def test_donors_avoid_the_patches_of_known_concepts():
    made = eraser(avoid="known", source="nearest")
    (timesteps, x, given), _ = calls()
    x = x.clone()
    marks = torch.arange(12.0).view(1, 1, 3, 4)
    _, (out,) = masks(made, ["Cats"], [(timesteps, x, given)])
    known = detected(made, list(toy.CONCEPTS), x, given, 999)
    changed = (out != x).flatten(2).any(1)
    assert changed.any() and marks.numel() == known.shape[1]
    for row, patch in changed.nonzero().tolist():
        donor = (x.flatten(2)[row] == out.flatten(2)[row, :, patch].unsqueeze(1)).all(0).nonzero().flatten()
        assert donor.numel() == 1 and not known[row, donor[0]]


@pytest.mark.parametrize("kind", ["per", "saeuron", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_patches_that_are_not_finite_are_counted(kind, dtype):
    made = eraser() if kind == "per" else steering(rule=kind)
    pipe = toy.EchoPipe(SIZE)
    (timesteps, x, given), (later, y, _) = calls()
    x[0, 3, 1, 2], x[1, 0, 0, 0], x[2, ..., 3] = torch.nan, torch.inf, -torch.inf
    with torch.no_grad(), made.attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        pipe.unet(timesteps, x.to(dtype), given.to(dtype))
        pipe.unet(later, y.to(dtype), given.to(dtype))
        with pytest.warns(RuntimeWarning, match="5 patches of the hooked activation were NaN or infinite"):
            report = attached.report()
    assert [step.not_finite for step in report.steps] == [5, 0]


@pytest.mark.parametrize("kind", ["per", "saeuron", "sdxl"])
def test_an_overflow_in_it_is_no_silence(kind):
    """Finite in half precision, but not after the map: no patch is detected there, and the report says so."""
    made = eraser() if kind == "per" else steering(rule=kind)
    made.sae.pre_encoder[0].weight.fill_(2.0)
    pipe = toy.EchoPipe(SIZE)
    (timesteps, x, given), _ = calls()
    x[0, :, 1, 2] = 30000.0
    with torch.no_grad(), made.attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        pipe.unet(timesteps, x.half(), given.half())
        with pytest.warns(RuntimeWarning, match="1 patches of the hooked activation were NaN or infinite"):
            assert attached.report().not_finite == 1


@pytest.mark.parametrize("case", ["topk", "relu", "topk_update"])
@pytest.mark.parametrize("error", ["corrected", "released"])
def test_steering_equals_the_rule_patch_by_patch(case, error):
    made = steering(case, error=error, strength=-3.0)
    (timesteps, x, given), _ = calls()
    _, (out,) = masks(made, ["Cats"], [(timesteps, x, given)])
    sae, chosen = made.sae, made.select("Cats")
    update = sae.config.update
    seen = (x - given if update else x).flatten(2).transpose(1, 2)
    values, indices = sae.encode(seen)
    z = torch.zeros(*seen.shape[:2], LATENTS).scatter(2, indices, values)
    changed = z.clone()
    for column, latent in enumerate(chosen.latents.tolist()):
        fires = z[..., latent] > chosen.thresholds[0, column]
        factor = -3.0 * made.dictionary.mean[0, 0, latent]
        changed[..., latent] = torch.where(fires, z[..., latent] * factor, z[..., latent])
    edit = (changed - z) @ sae.W_dec
    if error == "released":
        edit = edit + 2 * (z @ sae.W_dec + sae.b_dec - seen)
    assert (changed != z).any()
    assert_close(out, x + edit.transpose(1, 2).reshape(x.shape), models.QUANTITY)


@pytest.mark.parametrize("rule", ["gsae", "sdxl"])
def test_vector_rules_take_the_blocks_own_norm(rule):
    made = steering("topk", rule=rule, strength=-0.5)
    plain = models.random_steering("topk", rule=rule, strength=-0.5)
    plain.sae.W_dec.copy_(made.sae.W_dec)
    _, got = masks(made, ["Cats"], calls(), rows="all")
    _, expected = masks(plain, ["Cats"], calls(), rows="all")
    # Every patch is steered, whatever the encoder says.
    assert all(repeats(a, b) for a, b in zip(got, expected, strict=True))


def test_the_gradient_of_a_steering_passes_through_it():
    made = steering("relu")
    pipe = toy.EchoPipe(SIZE)
    (timesteps, x, given), _ = calls(1)
    x = x.double().requires_grad_(True)
    with made.attach(pipe, ["Cats"], layout=pipe.layout):
        assert torch.autograd.gradcheck(
            lambda y: pipe.unet(timesteps, y, given.double())[0], (x,), nondet_tol=1e-12 if MISALIGNED else 0
        )


SETTINGS = [
    pytest.param(lambda: eraser(), id="per"),
    pytest.param(lambda: eraser("topk_update", avoid="known"), id="per-update-known"),
    pytest.param(lambda: eraser("relu", min_patches=2), id="per-gate"),
    pytest.param(lambda: steering("topk_update"), id="saeuron"),
    pytest.param(lambda: steering("relu", error="released"), id="saeuron-released"),
    pytest.param(lambda: steering("topk", rule="sdxl", where="detected"), id="sdxl-detected"),
]


@pytest.mark.parametrize("make", SETTINGS)
def test_it_runs_on_tensors_without_values(make):
    pipe = toy.EchoPipe(SIZE, guided=True)
    with make().attach(pipe, ["Cats", "Dogs"], layout=pipe.layout):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            (out,) = pipe.unet(*(mode.from_tensor(tensor) for tensor in calls()[0]))
        assert tuple(out.shape) == (4, SIZE, 3, 4)


@pytest.mark.parametrize("make", SETTINGS)
def test_a_compiled_block(make):
    pipe, made = toy.EchoPipe(SIZE, guided=True), make()
    with torch.no_grad(), made.attach(pipe, [["Cats", "Dogs"], []], layout=pipe.layout) as attached:
        expected = [pipe.unet(*call)[0] for call in calls()]
    reported = attached.report()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), made.attach(pipe, [["Cats", "Dogs"], []], layout=pipe.layout) as attached:
        assert all(repeats(compiled(*c)[0], e) for c, e in zip(calls(), expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert attached.report() == reported and reported.replaced > 0


def test_concepts_are_exchanged_in_place():
    made, pipe = eraser(), toy.EchoPipe(SIZE)
    with torch.no_grad(), made.attach(pipe, ["Cats"], keep_masks=True, layout=pipe.layout) as attached:
        attached.set(concepts=["Dogs"])
        pipe.unet(*calls()[0])
    expected = detected(made, ["Dogs"], *calls()[0][1:], 999)
    assert torch.equal(attached.masks()[0].detected.flatten(1), expected)


def test_it_is_saved_with_the_eraser_and_told_apart(tmp_path):
    made = eraser()
    made.save_pretrained(tmp_path, decoder=True)
    again = ConceptEraser.from_pretrained(tmp_path)
    assert again.sae.config.pre_encoder and again.digest() == made.digest()
    made.sae.pre_encoder[0].bias += 1
    assert made.digest() != again.digest()
    (got,), _ = masks(again, ["Cats"], calls()[:1])
    assert torch.equal(got, detected(again, ["Cats"], *calls()[0][1:], 999))
