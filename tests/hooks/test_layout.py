"""Known numbers through the hooks: every packing, both layouts, guidance halves, windows, sets, seeds, update, bank."""

import pytest
import torch

from lbdt import reference
from lbdt.dictionary import Selection
from tests import toy

WIDTH = 4


def dials(**settings):
    """Latent i reads channel i and concept i is detected where that is above 0.5."""
    eraser = toy.eraser(width=WIDTH, latents=WIDTH, threshold=0.5, hookpoint="unet.block", **settings)
    with torch.no_grad():
        eraser.sae.encoder.weight.copy_(torch.eye(WIDTH))
        eraser.sae.b_dec.zero_()
    return eraser


def feature_map(rows: int, height: int = 3, width: int = 5) -> torch.Tensor:
    """Channel 3 numbers the patches; channels 0 to 2 are 0."""
    x = torch.zeros(rows, WIDTH, height, width)
    x[:, 3] = torch.arange(height * width).view(height, width) + 100.0
    return x


def at(timestep: float, rows: int) -> torch.Tensor:
    return torch.full((rows,), timestep)


def donors(seed: int, timestep: float, half: int, free: list[int], patches: int = 15) -> list[int]:
    args = (torch.tensor([seed]), torch.tensor([timestep]), torch.tensor([half]), patches)
    u = reference.patch_uniform(*args)[0]
    return [free[int(value * len(free))] for value in u.tolist()]


@pytest.mark.parametrize("packing", ["tensor", "tuple", "model_output"])
def test_the_detected_patch_takes_its_donor(packing):
    x = feature_map(1)
    x[0, 0, 1, 2] = 0.6  # patch 7 of a 3 x 5 grid
    x[0, 1, 0, 0] = 9.0  # another concept
    pipe = toy.EchoPipe(WIDTH, packing)
    with dials(padding=0).attach(pipe, ["Cats"], seed=5, layout=pipe.layout):
        out = pipe.unet(at(666.0, 1), x)
    assert type(out) is {"tensor": torch.Tensor, "tuple": tuple}.get(packing, type(out))
    out = out if packing == "tensor" else out[0]
    expected = x.clone().flatten(2)
    expected[:, :, 7] = expected[:, :, donors(5, 666.0, 0, [p for p in range(15) if p != 7])[7]]
    assert torch.equal(out, expected.view_as(x))


def test_padding_is_a_square_on_a_grid_that_is_none():
    x = feature_map(1)
    x[0, 0, 0, 3] = 1.0
    pipe = toy.EchoPipe(WIDTH)
    with dials(padding=1).attach(pipe, ["Cats"], keep_masks=True, layout=pipe.layout) as attached:
        out = pipe.unet(at(1.0, 1), x)[0]
    changed = (out != x).any(1)[0]
    square = torch.zeros(3, 5, dtype=torch.bool)
    square[0:2, 2:5] = True
    assert torch.equal(changed & ~square, torch.zeros_like(square))
    mask = attached.masks()[0]
    assert torch.equal(mask.replaced[0], square)
    assert mask.detected[0].nonzero().tolist() == [[0, 3]]
    step = attached.report().steps[0]
    assert (step.timestep, step.rows, step.patches) == (1.0, 1, 15)
    assert step.detected == pytest.approx(1 / 15) and step.replaced == pytest.approx(6 / 15)


def test_tokens_are_patches_too():
    x = feature_map(1, 3, 3)
    x[0, 0, 0, 0] = 1.0
    tokens = x.flatten(2).transpose(1, 2).contiguous()  # [1, 9, 4]
    pipe, eraser = toy.EchoPipe(WIDTH), dials(padding=1)
    with eraser.attach(pipe, ["Cats"], layout=pipe.layout):
        maps = pipe.unet(at(1.0, 1), x)[0]
        sequence = pipe.unet(at(1.0, 1), tokens)[0]
        with pytest.raises(ValueError, match="no square"):
            pipe.unet(at(1.0, 1), tokens[:, :8])
    assert torch.equal(sequence, maps.flatten(2).transpose(1, 2))


def test_halves_share_the_image_and_not_the_draws():
    x = feature_map(4)
    x[:, 0] = 1.0
    x[:, 0, 2] = 0.0  # the last row of the grid is free
    pipe = toy.EchoPipe(WIDTH, guided=True)
    with dials(padding=0).attach(pipe, ["Cats"], seed=[7, 8], layout=pipe.layout):
        out = pipe.unet(at(333.0, 4), x)[0][:, 3].flatten(1)
    free = list(range(10, 15))
    for row, (seed, half) in enumerate([(7, 0), (8, 0), (7, 1), (8, 1)]):
        drawn = donors(seed, 333.0, half, free)
        assert out[row, :10].tolist() == [100.0 + drawn[p] for p in range(10)]


def test_rows_cond_leaves_the_unconditional_half():
    x = feature_map(2)
    x[:, 0, 0, 0] = 1.0
    pipe = toy.EchoPipe(WIDTH, guided=True)
    with dials().attach(pipe, ["Cats"], rows="cond", layout=pipe.layout):
        out = pipe.unet(at(1.0, 2), x)[0]
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])
    with dials().attach(
        pipe, ["Cats"], rows="cond", layout=("cond",)
    ):  # the only half is the conditional one
        assert not torch.equal(pipe.unet(at(1.0, 2), x)[0][0], x[0])


def test_steps_are_a_window_of_the_schedule():
    x = feature_map(1)
    x[:, 0, 0, 0] = 1.0
    pipe = toy.EchoPipe(WIDTH)
    treated = []
    with dials().attach(pipe, ["Cats"], steps=(1, 3), layout=pipe.layout):
        for timestep in toy.TIMESTEPS:
            treated.append(not torch.equal(pipe.unet(at(timestep, 1), x)[0], x))
    assert treated == [False, True, True, False]
    with (
        dials().attach(pipe, ["Cats"], steps=(4, 9), layout=pipe.layout),
        pytest.raises(ValueError, match="begins after this call's 4 steps"),
    ):
        pipe.unet(at(1.0, 1), x)


def test_every_image_has_its_own_set():
    x = feature_map(3)
    x[:, 0, 0, 0] = x[:, 1, 2, 4] = 1.0
    pipe = toy.EchoPipe(WIDTH)
    with dials(padding=0).attach(pipe, [["Cats"], [], ["Dogs", "Cats"]], layout=pipe.layout):
        changed = (pipe.unet(at(1.0, 3), x)[0] != x).any(1)
    assert [row.nonzero().tolist() for row in changed] == [[[0, 0]], [], [[0, 0], [2, 4]]]


def test_two_concepts_may_share_a_latent_at_different_thresholds():
    eraser = dials(padding=0)
    first = torch.tensor([0])
    eraser.select = {
        name: Selection(first, torch.full((4, 1), threshold), name, "calibrated")
        for name, threshold in (("Cats", 0.5), ("Dogs", 2.0))
    }.__getitem__
    x = feature_map(2)
    x[:, 0, 0, 0] = 1.0
    pipe = toy.EchoPipe(WIDTH)
    with eraser.attach(pipe, [["Cats"], ["Dogs"]], layout=pipe.layout):
        out = pipe.unet(at(1.0, 2), x)[0]
    assert not torch.equal(out[0], x[0]) and torch.equal(out[1], x[1])


def test_an_image_is_the_same_in_any_batch():
    x = feature_map(3)
    x[:, 0, 1] = 1.0
    pipe, eraser = toy.EchoPipe(WIDTH, guided=False), dials()
    with eraser.attach(pipe, ["Cats"], seed=20, layout=pipe.layout):  # 20, 21, 22
        together = pipe.unet(at(666.0, 3), x)[0]
        again = pipe.unet(at(666.0, 3), x)[0]
    assert torch.equal(together, again)
    for i in range(3):
        with eraser.attach(pipe, ["Cats"], seed=20 + i, layout=pipe.layout):
            assert torch.equal(pipe.unet(at(666.0, 1), x[i : i + 1])[0][0], together[i])


def test_without_a_free_patch_the_report_says_what_happened():
    x = feature_map(2)
    x[0, 0] = 1.0
    pipe = toy.EchoPipe(WIDTH)
    with dials().attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        assert torch.equal(pipe.unet(at(1.0, 2), x)[0], x)
    step = attached.report().steps[0]
    assert (step.without_free, step.unchanged, step.replaced) == (1, 1, 0.0)
    assert "left unchanged: no bank" in str(attached.report())
    with dials(bank=True).attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        out = pipe.unet(at(300.0, 2), x)[0]
    assert set(out[0].unique().tolist()) <= {4.0, 5.0}  # the bank of the bin of timestep 333
    assert torch.equal(out[1], x[1])
    step = attached.report().steps[0]
    assert (step.without_free, step.unchanged, step.replaced) == (1, 0, 0.5)


def test_an_sae_of_the_update_looks_at_the_update():
    given, x = feature_map(1), feature_map(1)
    x[0, 0], given[0, 0] = 1.0, 1.0
    given[0, 0, 1, 1] = 0.0  # only here is the update above the threshold
    pipe = toy.EchoPipe(WIDTH)
    with dials(update=True, padding=0).attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        pipe.unet(at(1.0, 1), x, given)
    assert attached.report().steps[0].detected == pytest.approx(1 / 15)


def test_target_update_keeps_the_input_and_the_bits_elsewhere():
    torch.manual_seed(0)
    given, x = torch.randn(1, WIDTH, 3, 5), torch.randn(1, WIDTH, 3, 5)
    x[0, 0] = 0.0
    x[0, 0, 1, 2] = 1.0
    pipe = toy.EchoPipe(WIDTH)
    with dials(target="update", padding=0).attach(pipe, ["Cats"], seed=3, layout=pipe.layout):
        out = pipe.unet(at(1.0, 1), x, given)[0].flatten(2)
    donor = donors(3, 1.0, 0, [p for p in range(15) if p != 7])[7]
    flat, base = x.flatten(2), given.flatten(2)
    assert torch.equal(out[0, :, 7], base[0, :, 7] + (flat[0, :, donor] - base[0, :, donor]))
    others = [p for p in range(15) if p != 7]
    assert torch.equal(out[:, :, others], flat[:, :, others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_encoder_follows_the_activations(dtype):
    x = feature_map(1).to(dtype)
    x[0, 0, 0, 0] = 1.0
    pipe = toy.EchoPipe(WIDTH)
    with dials().attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        assert pipe.unet(at(1.0, 1), x)[0].dtype == dtype
    assert attached.report().detected == pytest.approx(1 / 15)


def test_lists_must_have_an_entry_per_image():
    pipe = toy.EchoPipe(WIDTH)
    for settings in ({"concepts": [["Cats"]] * 2}, {"concepts": ["Cats"], "seed": [1, 2]}):
        with (
            dials().attach(pipe, layout=pipe.layout, **settings),
            pytest.raises(ValueError, match="2 entries for 3 images"),
        ):
            pipe.unet(at(1.0, 3), feature_map(3))


def test_patches_changed_are_counted_for_each_image_over_calls_and_halves():
    x = feature_map(4)
    x[0, 0, 0, 0] = 1.0  # unconditional half of image 0
    x[2, 0, 1, 1:3] = 1.0  # its conditional half
    pipe = toy.EchoPipe(WIDTH, guided=True)
    with dials(padding=0).attach(pipe, ["Cats"], layout=pipe.layout) as attached:
        with pytest.raises(
            ValueError, match="patches_changed: expected calls of one number of images, got no call"
        ):
            attached.patches_changed()
        for timestep in (666.0, 333.0):
            pipe.unet(at(timestep, 4), x)
        assert attached.patches_changed().tolist() == [6, 0]
        pipe.unet(at(1.0, 2), x[:2])
        with pytest.raises(ValueError, match="got 1, 2; attach anew"):
            attached.patches_changed()
