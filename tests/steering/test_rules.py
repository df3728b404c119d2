"""Known numbers through the steering hook: every rule by hand, and against the released loop written out."""

import pytest
import torch

from lbdt.dictionary import Selection
from lbdt.editors import Steering
from lbdt.testing import assert_close
from tests import toy
from tests.layouts import bits
from tests.steering import models

WIDTH = models.WIDTH


def at(timestep: float, rows: int) -> torch.Tensor:
    return torch.full((rows,), timestep)


def steered(steering, x, concepts, timestep=666.0, given=None, guided=False, **attach):
    """The steered output and the attachment's report, on a pipeline of one block."""
    pipe = toy.EchoPipe(x.shape[1], guided=guided)
    with steering.attach(pipe, concepts, layout=pipe.layout, **attach) as attached, torch.no_grad():
        out = pipe.unet(at(timestep, x.shape[0]), x, given)[0]
    return out, attached.report()


def test_saeuron_scales_what_is_above_the_threshold():
    x = torch.zeros(1, WIDTH, 3, 5)
    x[0, 0, 1, 2], x[0, 0, 2, 4] = 2.0, 0.4  # threshold 0.5
    x[0, 1] = 9.0  # another concept's
    out, report = steered(models.dials(strength=-2.0), x, ["Cats"])
    expected = x.clone()
    # z = 2 becomes 2 * strength * a = 2 * -2 * 1.5, and the decoder's row is twice the unit vector.
    expected[0, 0, 1, 2] = 2.0 + 2 * (2 * -2 * 1.5 - 2)
    assert torch.equal(out, expected)
    assert report.detected == report.replaced == pytest.approx(1 / 15)


def test_gsae_adds_the_patch_norm_along_the_row():
    x = torch.zeros(2, WIDTH, 1, 2)
    x[:, 2, 0, 0], x[:, 3, 0, 0], x[:, 0, 0, 1] = 3.0, 4.0, 1.0
    out, report = steered(models.dials(rule="gsae", strength=-0.5, k=2), x, ["Cats"], guided=True)
    expected = x.clone()
    expected[1, 0, 0, 0] -= 0.5 * 5.0  # the conditional half only
    expected[1, 0, 0, 1] -= 0.5 * 1.0
    assert torch.equal(out, expected)
    assert report.detected == 0.25 and report.replaced == 0.5


@pytest.mark.parametrize(
    ("unit", "mean"), [("active", (3 * 1.5 + 7.0) / 2), ("patches", 7.0)], ids=["where-active", "of-the-bin"]
)
def test_sdxl_adds_a_mean_activation(unit, mean):
    x = torch.randn(2, WIDTH, 2, 3, generator=torch.Generator().manual_seed(0))
    given = torch.randn(2, WIDTH, 2, 3, generator=torch.Generator().manual_seed(1))
    steering = models.dials(rule="sdxl", strength=-2.0, update=True, unit=unit)
    steering.dictionary.mean[0, 1, 0] = 7.0  # Cats at timestep 666
    steering.dictionary.fired[0] = 2  # of the four patches that there are
    out, report = steered(steering, x, ["Cats"], given=given)
    expected = x.clone()
    expected[:, 0] += -2.0 * mean * 2.0
    assert torch.equal(out, expected) and report.replaced == 1.0


def test_the_unit_of_a_latent_that_was_never_active_is_zero():
    steering = models.dials(rule="sdxl", strength=-2.0)
    steering.dictionary.mean[0], steering.dictionary.fired[0] = 0.0, 0
    steering.select = lambda name: Selection(torch.tensor([0]), torch.zeros(4, 1), name, "published")
    x = torch.ones(1, WIDTH, 1, 2)
    assert torch.equal(steered(steering, x, ["Cats"])[0], x)


def test_without_the_count_of_active_patches_the_unit_is_asked_for():
    steering = models.random_steering("topk", strength=-1.0)
    steering.dictionary.fired = None
    with pytest.raises(ValueError, match="unit: the dictionary does not say .* or give unit='patches'"):
        Steering(steering.sae, steering.dictionary, "unet.block", rule="sdxl", strength=-1.0)
    made = Steering(
        steering.sae, steering.dictionary, "unet.block", rule="sdxl", strength=-1.0, unit="patches"
    )
    assert made.unit == "patches"


@pytest.mark.parametrize("rule", ["gsae", "sdxl"])
def test_only_where_detected(rule):
    x = torch.zeros(1, WIDTH, 2, 2)
    x[0, 3] = 1.0
    x[0, 0, 1, 0] = 2.0
    out, report = steered(models.dials(rule=rule, strength=-1.0, k=2, where="detected"), x, ["Cats"])
    assert (out != x).any(1).nonzero().tolist() == [[0, 1, 0]]
    assert report.detected == report.replaced == 0.25


@pytest.mark.parametrize(
    ("case", "error"),
    [(case, "corrected") for case in models.KINDS]
    + [(case, "released") for case in models.KINDS if case != "topk_sigmoid"],  # refused
)
def test_saeuron_is_the_released_loop(case, error):
    steering = models.random_steering(case, strength=-3.0, error=error)
    x, given = models.maps(4), models.maps(4, seed=5)
    got, report = steered(steering, x, ["Cats", "Trees"], given=given, guided=True)
    want, fires = models.released_loop(steering, x, ["Cats", "Trees"], 666, given)
    if error == "corrected":
        assert torch.equal((got != x).any(1), fires.view(4, 3, 4))
        want = want - models.released_loop(steering, x, [], 666, given)[0] + x
    assert 0 < int(fires.sum()) < fires.numel()
    assert_close(got, want, models.QUANTITY)
    assert report.detected == pytest.approx(float(fires.float().mean()))
    assert report.replaced == pytest.approx(1.0 if error == "released" else report.detected)


def test_the_released_sign_doubles_the_error_where_nothing_is_steered():
    steering = models.random_steering("topk", strength=-1.0, error="released", threshold=1e6)
    x = models.maps(2)
    out, report = steered(steering, x, ["Cats"])
    tokens = x.flatten(2).transpose(1, 2)
    assert_close(out.flatten(2).transpose(1, 2), 2 * steering.sae(tokens) - tokens, models.QUANTITY)
    assert "as released: 2 x_hat - x" in str(report) and "released" in report.to_dict()["ran"]
    assert (report.detected, report.replaced) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["map", "tokens", "channels_last"])
@pytest.mark.parametrize("case", ["no latent fires", "factor 1", "gsae 0", "sdxl 0"])
def test_an_identity_edit_keeps_every_bit(dtype, layout, case):
    if case == "no latent fires":
        steering = models.random_steering("topk", strength=-9.0, threshold=1e6)
    elif case == "factor 1":
        steering = models.random_steering("topk", strength=1.0)
        steering.dictionary.mean[0] = 1.0
    else:
        steering = models.random_steering("topk", rule=case.split()[0], strength=0.0)
    x = models.maps(2).view(2, -1, 3, 4)[..., :3].to(dtype)  # 3 x 3, so tokens are a square
    x[0, 0] = -0.0
    if layout == "tokens":
        x = x.flatten(2).transpose(1, 2).contiguous()
    elif layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    pipe = toy.EchoPipe(models.SIZE)
    with steering.attach(pipe, ["Cats"], layout=pipe.layout) as attached, torch.no_grad():
        out = pipe.unet(at(666.0, 2), x)[0]
    assert out.dtype == dtype and torch.equal(bits(out), bits(x))
    assert (attached.report().detected > 0) == (case != "no latent fires")
    assert attached.report().replaced == 0


@pytest.mark.parametrize("rule", ["saeuron", "gsae", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded(rule, dtype):
    steering = models.random_steering("topk", rule=rule, strength=-2.0)
    x = models.maps(2).to(dtype)
    half, _ = steered(steering, x, ["Cats"])
    full, _ = steered(steering, x.float(), ["Cats"])
    assert half.dtype == dtype
    assert_close(half, full.to(dtype), models.QUANTITY)


@pytest.mark.parametrize("rule", ["saeuron", "gsae", "sdxl"])
def test_tokens_are_patches_too(rule):
    steering = models.random_steering("topk", rule=rule, strength=-2.0)
    x = models.maps(2)[..., :3].contiguous()
    tokens = x.flatten(2).transpose(1, 2).contiguous()
    maps, sequence = steered(steering, x, ["Cats"])[0], steered_tokens(steering, tokens)
    assert_close(sequence, maps.flatten(2).transpose(1, 2), models.QUANTITY)
    last, _ = steered(steering, x.to(memory_format=torch.channels_last), ["Cats"])
    assert_close(last, maps, models.QUANTITY)


def steered_tokens(steering, tokens):
    pipe = toy.EchoPipe(models.SIZE)
    with steering.attach(pipe, ["Cats"], layout=pipe.layout), torch.no_grad():
        return pipe.unet(at(666.0, tokens.shape[0]), tokens)[0]


def test_halves_sets_and_windows():
    x = torch.zeros(4, WIDTH, 1, 2)
    x[:, 0, 0, 0] = x[:, 1, 0, 1] = 1.0
    steering = models.dials(strength=-1.0)
    sets = [["Cats"], ["Dogs", "Cats"]]
    for rows, expected in (("all", [1, 2, 1, 2]), ("cond", [0, 0, 1, 2]), (None, [1, 2, 1, 2])):
        out, _ = steered(steering, x, sets, guided=True, rows=rows)
        assert (out != x).any(1).sum((1, 2)).tolist() == expected
    assert torch.equal(steered(steering, x, [[], []], guided=True)[0], x)
    pipe, treated = toy.EchoPipe(WIDTH), []
    with steering.attach(pipe, ["Cats"], steps=(1, 3), layout=pipe.layout) as attached:
        treated = [not torch.equal(pipe.unet(at(t, 4), x)[0], x) for t in toy.TIMESTEPS]
    assert treated == [False, True, True, False]
    assert [step.replaced > 0 for step in attached.report().steps] == treated
    with (
        steering.attach(pipe, sets, layout=pipe.layout),
        pytest.raises(ValueError, match="2 entries for 3 images"),
    ):
        pipe.unet(at(1.0, 3), x[:3])


def test_untreated_rows_keep_their_bits_under_the_released_sign_too():
    steering = models.random_steering("topk", strength=-1.0, error="released")
    x = models.maps(2)
    out, report = steered(steering, x, [["Cats"], []])
    assert torch.equal(out[1], x[1]) and not bool((out[0] == x[0]).all(0).any())
    assert report.replaced == 0.5


@pytest.mark.parametrize("rule", ["saeuron", "gsae", "sdxl"])
def test_a_shared_latent_is_edited_by_the_larger_factor(rule):
    x = torch.zeros(3, WIDTH, 1, 1)
    x[:, 0] = 2.0
    strength = {"Cats": -1.0, "Dogs": -4.0}
    steering = models.sharing(rule=rule, strength=strength)
    sets = [["Cats"], ["Dogs", "Cats"], ["Dogs"]]
    out, _ = steered(steering, x, sets, rows="all")
    alone = [steered(steering, x[:1], [name])[0] for name in ("Cats", "Dogs")]
    assert torch.equal(out, torch.cat([alone[0], alone[1], alone[1]]))
    # Below the threshold of Dogs (3.0 in `sharing` with high=True) Cats edits it.
    if rule == "saeuron":
        steering = models.sharing(rule=rule, strength=strength, high=True)
        out, _ = steered(steering, x, sets, rows="all")
        assert torch.equal(out, torch.cat([alone[0], alone[0], x[2:]]))


def test_strength_per_concept():
    x = torch.zeros(2, WIDTH, 1, 1)
    x[0, 0] = x[1, 1] = 1.0
    steering = models.dials(strength={"Cats": -1.0, "Dogs": -2.0})
    out, _ = steered(steering, x, ["Cats", "Dogs"])
    assert out[0, 0].item() == 1 + 2 * (-1.5 - 1) and out[1, 1].item() == 1 + 2 * (-3.0 - 1)


def test_gradients_pass_the_corrected_edit():
    x = models.maps(1).requires_grad_()
    steering: Steering = models.random_steering("topk", strength=-3.0)
    pipe = toy.EchoPipe(models.SIZE)
    with steering.attach(pipe, ["Cats"], layout=pipe.layout):
        out = pipe.unet(at(666.0, 1), x)[0]
        out.square().sum().backward()
    where = (out != x).any(1, keepdim=True).expand_as(x)
    assert torch.equal(x.grad[~where], 2 * x.detach()[~where])
    assert not torch.equal(x.grad[where], 2 * out.detach()[where])
