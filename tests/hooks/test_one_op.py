"""An eraser's hook by `erase_step` and by the five ops that it stands for: the same bits, reports and masks."""

import json

import pytest
import torch

from lbdt import ops
from lbdt.hooks import erase_plan
from tests import toy
from tests.backends import DEVICE, HAS_CPP, HAS_TRITON
from tests.hooks.test_gate_over_calls import with_run_gate
from tests.repeats import repeats

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="it takes CPU tensors"),
    pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler"),
]
GUIDED = ("uncond", "cond")


@pytest.fixture
def used(monkeypatch):
    """The calls of the one op."""
    calls = []
    run = erase_plan.erase_step_or_none

    def counted(*arguments):
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(erase_plan, "erase_step_or_none", counted)
    return calls


def apart(monkeypatch):
    """From here on by the five ops."""
    monkeypatch.setattr(erase_plan, "serves", lambda *given: False)


def feature_maps(batch, tokens, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    # Whole numbers, so that it matters nowhere in which order they are added.
    x, given = (torch.randint(-2, 3, (batch, toy.WIDTH, 3, 5), generator=g).to(dtype) for _ in range(2))
    x[:, 0] += torch.arange(15.0).view(3, 5).to(dtype) * 8
    if tokens:
        return [t.flatten(2).transpose(1, 2).contiguous()[:, :9] for t in (x, given)]
    return [x, given]


def whole(eraser):
    """The eraser, with whole numbers in its SAE."""
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        eraser.sae.encoder.weight.copy_(torch.randint(-1, 2, eraser.sae.encoder.weight.shape, generator=g))
        eraser.sae.encoder.bias.zero_()
        eraser.sae.b_dec.zero_()
    return eraser


def ran(eraser, layout, attach, batches, tokens=False, dtype=torch.float32):
    """What an attached eraser makes of a call at each timestep, and what it keeps of it."""
    pipe = toy.EchoPipe(toy.WIDTH)
    pipe.layout = layout
    out = []
    with eraser.attach(
        pipe, **{"concepts": ["Cats", "Dogs"], **attach}, layout=layout, keep_masks=True
    ) as handle:
        for place, (timestep, batch) in enumerate(zip(toy.TIMESTEPS, batches, strict=True)):
            x, given = feature_maps(batch, tokens, dtype, place)
            timesteps = torch.full((batch,), float(timestep))
            with torch.inference_mode():
                out.append(pipe.unet(timesteps, x, given)[0].clone())
        report, masks = handle.report().to_dict(), handle.masks()
    return out, report, [(m.timestep, m.detected, m.replaced) for m in masks]


ROWS = [
    pytest.param({"padding": 0}, {}, {}, id="plain"),
    pytest.param({"k": 6, "threshold": 1.0, "padding": 2}, {}, {}, id="ranked"),
    pytest.param({"k": 30, "source": "row", "avoid": "known", "bank": True}, {}, {}, id="avoid-bank"),
    pytest.param({"padding": 9, "bank": True}, {}, {}, id="all-from-the-bank"),
    pytest.param({"update": True, "source": "mean", "k": 20}, {}, {}, id="update"),
    pytest.param({"source": "nearest", "k": 20}, {"rows": "cond", "steps": (1, 3)}, {}, id="cond-window"),
    pytest.param({"min_patches": 9}, {"rows": "cond"}, {}, id="gate"),
    pytest.param({"min_patches": 2, "k": 20}, {}, {"layout": ("cond",)}, id="gate-alone"),
    pytest.param(
        {"k": 20}, {}, {"layout": ("uncond", "image", "cond"), "batches": (6,) * 4}, id="three-branches"
    ),
    pytest.param({"k": 20}, {"concepts": [["Cats"], []], "seed": [3, 9]}, {}, id="sets-and-seeds"),
    pytest.param(
        {"k": 20, "padding": 0}, {}, {"dtype": torch.bfloat16, "batches": (4, 2, 6, 4)}, id="bfloat16"
    ),
    pytest.param({"k": 20, "source": "mean"}, {}, {"tokens": True}, id="tokens"),
    pytest.param({"run": 44}, {}, {}, id="run"),
    pytest.param({"k": 20, "run": 5}, {}, {"batches": (4, 8, 8, 200)}, id="run-other-images"),
    pytest.param({"k": 20, "run": 5}, {"steps": (0, 2)}, {"layout": ("cond",)}, id="run-window-alone"),
]


@pytest.mark.parametrize(("settings", "attach", "call"), ROWS)
def test_it_does_what_the_five_ops_do(settings, attach, call, used, monkeypatch):
    settings, call = {**settings}, {"layout": GUIDED, "batches": (4,) * 4} | call
    least = settings.pop("run", None)
    eraser = whole(toy.eraser(hookpoint="unet.block", **settings))
    if least is not None:
        eraser = with_run_gate(eraser, least)
    out, report, masks = ran(eraser, attach=attach, **call)
    assert len(used) == 4
    apart(monkeypatch)
    with ops.use_backend("auto"):
        expected, wanted, where = ran(eraser, attach=attach, **call)
    assert len(used) == 4
    assert all(map(torch.equal, out, expected)) and report == wanted
    for got, mask in zip(masks, where, strict=True):
        assert got[0] == mask[0] and all(map(torch.equal, got[1:], mask[1:]))
    assert any(bool(mask[1].any()) for mask in where), "nothing was detected"


LAUNCHED = [
    row for row in ROWS if row.id in ("ranked", "avoid-bank", "gate", "sets-and-seeds", "tokens", "run")
]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("settings", "attach", "call"), LAUNCHED)
def test_its_launches_do_what_the_five_ops_do(settings, attach, call, used, monkeypatch):
    with ops.use_backend("triton"):
        test_it_does_what_the_five_ops_do(settings, attach, call, used, monkeypatch)


@pytest.mark.parametrize("run", [False, True], ids=["no-gate", "run"])
@pytest.mark.parametrize("one", [True, False], ids=["one-op", "five-ops"])
def test_a_call_without_rows_passes(run, one, monkeypatch):
    eraser = toy.eraser(hookpoint="unet.block")
    if not one:
        apart(monkeypatch)
    pipe = toy.EchoPipe(toy.WIDTH)
    with (with_run_gate(eraser, 44) if run else eraser).attach(pipe, ["Cats"], layout=GUIDED):
        x = torch.zeros(0, toy.WIDTH, 4, 4)
        assert pipe.unet(torch.zeros(0), x, x)[0].shape == x.shape


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("toy"))


def test_the_same_pictures_and_reports(pipe, used, monkeypatch):
    eraser = toy.eraser(k=8, threshold=0.05, avoid="known", bank=True)
    made = []
    for _ in range(2):
        with eraser.attach(pipe, [["Cats"], ["Dogs"]], seed=[1, 2], rows="cond") as handle:
            made.append((toy.images(pipe, steps=2), json.dumps(handle.report().to_dict())))
        apart(monkeypatch)
    assert len(used) == 2 and repeats(made[0][0], made[1][0]) and repeats(made[0][1], made[1][1])


@pytest.mark.parametrize("packing", ["tensor", "tuple", "output"])
def test_what_is_left_is_the_blocks_own_output(packing):
    pipe = toy.EchoPipe(toy.WIDTH, packing)
    x = torch.randn(2, toy.WIDTH, 3, 5)
    whole = pipe.unet.block(x, x)
    pipe.unet.block.forward = lambda hidden_states, output: whole
    with toy.eraser(hookpoint="unet.block", threshold=1e9).attach(
        pipe, ["Cats"], layout=pipe.layout
    ) as handle:
        assert pipe.unet(torch.ones(2), x) is whole
    assert handle.report().steps[0].rows == 2


def test_what_is_changed_is_a_copy():
    pipe = toy.EchoPipe(toy.WIDTH)
    x = torch.randn(2, toy.WIDTH, 3, 5)
    before = x.clone()
    with toy.eraser(hookpoint="unet.block").attach(pipe, ["Cats"], layout=pipe.layout):
        (out,) = pipe.unet(torch.ones(2), x)
    assert torch.equal(x, before) and not torch.equal(out, x)


def test_compiled_code_gets_a_tensor_of_its_own(used):
    pipe = toy.EchoPipe(toy.WIDTH)
    x = torch.randn(2, toy.WIDTH, 3, 5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with toy.eraser(hookpoint="unet.block", threshold=1e9).attach(
        pipe, ["Cats"], layout=pipe.layout
    ) as handle:
        unet = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            (out,) = unet(torch.ones(2), x)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr() and not used
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert handle.report().steps[0].rows == 2


@pytest.mark.parametrize(
    ("settings", "dtype"), [({"target": "update"}, torch.float32), ({}, torch.float64)], ids=str
)
def test_other_calls_take_the_five_ops(settings, dtype, used):
    pipe = toy.EchoPipe(toy.WIDTH)
    with toy.eraser(hookpoint="unet.block", **settings).attach(pipe, ["Cats"], layout=pipe.layout):
        pipe.unet(torch.ones(2), torch.randn(2, toy.WIDTH, 4, 4, dtype=dtype))
    assert not used


def test_a_mask_of_another_block_takes_the_five_ops(pipe, used):
    with toy.eraser(detect_at=toy.DETECT_AT).attach(pipe, ["Cats"]):
        toy.images(pipe, steps=1)
    assert not used


def test_a_gradient_goes_through_the_five_ops(used):
    pipe = toy.EchoPipe(toy.WIDTH)
    x = torch.randn(2, toy.WIDTH, 4, 4, requires_grad=True)
    with toy.eraser(hookpoint="unet.block").attach(pipe, ["Cats"], layout=pipe.layout):
        pipe.unet(torch.ones(2), x)[0].sum().backward()
    assert x.grad is not None and not used


def test_a_backend_that_is_forced_is_the_one(used):
    pipe = toy.EchoPipe(toy.WIDTH)
    x = torch.randn(2, toy.WIDTH, 4, 4)
    with toy.eraser(hookpoint="unet.block").attach(pipe, ["Cats"], layout=pipe.layout):
        with ops.use_backend("reference"):
            pipe.unet(torch.ones(2), x)
        assert not used
        with ops.use_backend("cpp"):
            pipe.unet(torch.ones(2), x)
        assert len(used) == 1
        with ops.use_backend("triton"), pytest.raises(ValueError, match="backend 'triton' cannot serve"):
            pipe.unet(torch.ones(2), x.double())


def test_timesteps_of_another_dtype_are_refused_in_words(used):
    pipe = toy.EchoPipe(toy.WIDTH)
    with toy.eraser(hookpoint="unet.block").attach(pipe, ["Cats"], layout=pipe.layout) as handle:
        with pytest.raises(TypeError, match="timesteps: expected dtype"):
            pipe.unet(torch.ones(2, dtype=torch.int16), torch.randn(2, toy.WIDTH, 4, 4))
    assert used and handle.report().steps == ()
