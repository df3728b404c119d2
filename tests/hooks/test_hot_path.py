"""No host sync and no shape that depends on data between the UNet's timestep and the hooked block's output."""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from tests import toy
from tests.backends import DEVICE

SETTINGS = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"k": 4, "threshold": 0.05}, {}, id="rank-test"),
    pytest.param({"source": "mean", "bank": True}, {"keep_masks": True}, id="mean-bank-masks"),
    pytest.param({"source": "row", "avoid": "known", "k": 4, "threshold": 0.05}, {}, id="row-avoid-known"),
    pytest.param(
        {"source": "nearest", "update": True}, {"rows": "cond", "steps": (1, 3)}, id="update-window"
    ),
]
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")


def pipe_on(device: torch.device, settings: dict):
    pipe = toy.EchoPipe(toy.WIDTH, guided=True)
    pipe.unet.to(device)
    eraser = toy.eraser(hookpoint="unet.block", **settings)
    return pipe, eraser


def arguments(seed: int, timestep: int, device: torch.device):
    generator = torch.Generator().manual_seed(seed)
    output, given = (torch.randn(4, toy.WIDTH, 4, 5, generator=generator) for _ in range(2))
    return [torch.full((4,), timestep, device=device), output.to(device), given.to(device)]


@pytest.mark.parametrize(("settings", "attach"), SETTINGS)
def test_it_runs_on_tensors_without_values(settings, attach):
    """Under fake tensors an op that would look at a value, or shape its output by one, raises."""
    pipe, eraser = pipe_on(torch.device("cpu"), settings)
    with eraser.attach(pipe, ["Cats", "Dogs"], layout=pipe.layout, **attach) as attached:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = [mode.from_tensor(tensor) for tensor in arguments(0, 666, torch.device("cpu"))]
            (out,) = pipe.unet(*given)
        assert tuple(out.shape) == (4, toy.WIDTH, 4, 5)
        assert attached.report().steps == ()


def test_tensors_without_values_refuse_what_the_test_above_would_find():
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(3))
        with pytest.raises(DynamicOutputShapeException):
            fake.nonzero()
        with pytest.raises(DataDependentOutputException):
            fake.sum().item()


@on_gpu
@pytest.mark.parametrize(("settings", "attach"), SETTINGS)
def test_no_host_sync(settings, attach):
    pipe, eraser = pipe_on(DEVICE, settings)
    attach = {
        name: value for name, value in attach.items() if name != "steps"
    }  # the schedule lies on the host
    with eraser.attach(pipe, ["Cats", "Dogs"], layout=pipe.layout, **attach) as attached:
        given = arguments(0, 666, DEVICE)
        (expected,) = pipe.unet(*given)  # compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            (out,) = pipe.unet(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, expected) and len(attached.report().steps) == 1


@on_gpu
@pytest.mark.parametrize(("settings", "attach"), SETTINGS[:4])
def test_a_cuda_graph_replays_the_hook(settings, attach):
    pipe, eraser = pipe_on(DEVICE, settings)
    with eraser.attach(pipe, ["Cats"], layout=pipe.layout, **attach) as attached, torch.no_grad():
        given = arguments(0, 666, DEVICE)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            pipe.unet(*given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (captured,) = pipe.unet(*given)
        for seed, timestep in ((1, 999), (2, 333), (3, 1)):
            fresh = arguments(seed, timestep, DEVICE)
            for old, new in zip(given, fresh, strict=True):
                old.copy_(new)
            graph.replay()
            replayed = captured.clone()
            (eager,) = pipe.unet(*fresh)
            assert torch.equal(replayed, eager)
        steps = {step.timestep: step for step in attached.report().steps}
        assert {999.0, 333.0, 1.0} <= set(steps)
        assert all(steps[time].rows == 8 for time in (999.0, 333.0, 1.0)), "replayed and eager rows"
