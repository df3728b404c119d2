"""A hooked block compiled by Inductor, as `torch.compile` is used: one graph, and what eager calls do.

The other tests of compiled UNets stop before Inductor, which takes most of the time and has demands of its own on ops.
"""

import pytest
import torch

from lbdt import int8_screen
from lbdt.bench.hook import TIMESTEP, Pipe, eraser
from lbdt.bench.shapes import Place, Shape, detection
from tests.backends import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="it compares with eager calls on the CPU")
SHAPE = Shape("tiny", 1, 2, 16, 4, 4, latents=64, k=4, union=3)


def outputs(settings, compiled, x):
    """Of three calls of a block that does nothing, with the eraser attached."""
    arguments = detection(SHAPE, 0.25)
    pipe = Pipe(SHAPE, Place())
    found = []
    with eraser(SHAPE, arguments, 0, **settings).attach(
        pipe, ["Concept"], seed=0, layout=pipe.layout
    ) as handle:
        unet = torch.compile(pipe.unet, fullgraph=True) if compiled else pipe.unet
        for further in range(3):
            time = torch.full((SHAPE.batch,), TIMESTEP - 20 * further)
            with torch.no_grad():
                found.append(unet(time, x, x + further / 8))
        report = str(handle.report())
    return torch.stack(found), report


@pytest.mark.parametrize("screened", [False, True], ids=["plain", "screened"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="no-gate"),
        pytest.param({"min_patches": 3}, id="gate"),
        pytest.param({"avoid": "known"}, id="known-concepts"),
        pytest.param({"source": "mean"}, id="mean"),
    ],
)
def test_a_compiled_block_does_what_an_eager_one_does(settings, screened, monkeypatch):
    monkeypatch.setattr(int8_screen, "_LEAST", 1 if screened else 1 << 60)
    x = detection(SHAPE, 0.25)["x"]
    torch._dynamo.reset()
    eager, report = outputs(settings, False, x)
    assert not torch.equal(eager[0], x)
    compiled, again = outputs(settings, True, x)
    assert torch.equal(compiled, eager) and again == report
