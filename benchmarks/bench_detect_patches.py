"""detect_patches and the literal version under pytest-benchmark: `pytest benchmarks`."""

import pytest
import torch

from benchmarks import shapes
from lbdt import ops


@pytest.mark.parametrize("version", ["ours", "literal"])
@pytest.mark.parametrize("share", [0.0, 0.1], ids=lambda share: f"{share:.0%} pass")
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_detect_patches(benchmark, name, share, version):
    arguments = shapes.detection(shapes.SHAPES[name], share)
    benchmark.group = f"detect_patches, {name}, {share:.0%} pass"
    with torch.inference_mode():
        mask = benchmark.pedantic(
            {"ours": ops.detect_patches, "literal": shapes.literal}[version],
            kwargs=arguments,
            rounds=10,
            warmup_rounds=2,
        )
        assert torch.equal(mask, ops.detect_patches(**arguments))
    assert mask.sum() == round(share * shapes.SHAPES[name].patches)
