"""Storage is not compute: the encoder follows the activations, always from the values that the SAE has in float32."""

import pytest
import torch

from lbdt import Steering
from tests import toy
from tests.repeats import repeats


@pytest.fixture
def pipe(tmp_path):
    return toy.pipeline(tmp_path)


def half_call(pipe):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return toy.images(pipe, steps=1)


def there_and_back(pipe):
    pipe.to(torch.bfloat16)
    toy.images(pipe, steps=1)
    pipe.to(torch.float32)


def double(pipe):
    pipe.unet.to(torch.float64)
    pipe.unet.to(torch.float32)


@pytest.mark.parametrize("editor", ["per", "bank", "released"])
@pytest.mark.parametrize("between", [half_call, double], ids=["autocast", "float64-and-back"])
def test_a_call_does_not_depend_on_the_dtype_of_earlier_ones(pipe, between, editor):
    made = toy.eraser(bank=editor == "bank")
    if editor == "released":
        made = Steering.from_eraser(made, strength=-2.0, error="released")
    with made.attach(pipe, ["Cats"]):
        fresh = toy.images(pipe)
    with made.attach(pipe, ["Cats"]):
        between(pipe)
        assert repeats(toy.images(pipe), fresh)


def test_weights_that_were_halved_meanwhile_leave_the_encoder_as_it_was(pipe):
    with toy.eraser(bank=True).attach(pipe, ["Cats"]):
        exact = toy.plan_of(pipe).weight.clone(), toy.plan_of(pipe).bank.clone()
        there_and_back(pipe)
        toy.images(pipe, steps=1)
        assert all(map(torch.equal, (toy.plan_of(pipe).weight, toy.plan_of(pipe).bank), exact))


def test_an_attachment_to_a_halved_pipeline_is_exact_when_it_is_widened(pipe):
    with toy.eraser().attach(pipe, ["Cats"]):
        exact = toy.plan_of(pipe).weight.clone()
    pipe.to(torch.bfloat16)
    with toy.eraser().attach(pipe, ["Cats"]):
        toy.images(pipe, steps=1)
        assert toy.plan_of(pipe).weight.dtype == torch.bfloat16
        pipe.to(torch.float32)
        toy.images(pipe, steps=1)
        assert torch.equal(toy.plan_of(pipe).weight, exact)


@pytest.mark.parametrize("first", ["attached", "cast"])
def test_fp8_storage_with_float32_compute_detects_with_the_exact_encoder(pipe, first):
    with toy.eraser().attach(pipe, ["Cats"]):
        exact = toy.plan_of(pipe).weight.clone()
    if first == "cast":
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        base = toy.images(pipe)
        with toy.eraser().attach(pipe, ["Cats"]) as handle:
            assert not torch.equal(toy.images(pipe), base)
            assert torch.equal(toy.plan_of(pipe).weight, exact) and handle.report().replaced > 0
        assert repeats(toy.images(pipe), base)
        return
    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        toy.images(pipe)
        assert torch.equal(toy.plan_of(pipe).weight, exact) and handle.report().replaced > 0


def sequential(pipe):
    import accelerate

    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def groups(pipe):
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


@pytest.mark.parametrize("offload", [sequential, groups], ids=["sequential", "groups"])
@pytest.mark.parametrize("first", ["attach", "offload"])
def test_weights_that_lie_elsewhere_between_calls(pipe, offload, first):
    base = toy.images(pipe)
    with toy.eraser().attach(pipe, ["Cats"]):
        wanted = toy.images(pipe)
    if first == "offload":
        offload(pipe)
        assert repeats(toy.images(pipe), base)
    with toy.eraser().attach(pipe, ["Cats"]):
        if first == "attach":
            offload(pipe)
        assert repeats(toy.images(pipe), wanted)
    assert repeats(toy.images(pipe), base)
