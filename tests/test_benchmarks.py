"""The benchmark's own arithmetic, its inputs, and the result files."""

import json

import pytest
import torch

from benchmarks import detect_vs_literal, machine, shapes
from lbdt import ops

RESULTS = sorted(detect_vs_literal.RESULTS.glob("cpu-*.json"))


def check(result):
    assert result["benchmark"] == "detect_vs_literal" and result["dtype"] == "float32"
    assert result["command"].startswith("python -m benchmarks.detect_vs_literal")
    assert set(result["versions"]) == {"lbdt", "torch", "python", "mkl"}
    assert result["device"]["name"] and result["threads"] >= 1 and result["date"]
    assert set(result["sizes"]) == set(shapes.Shape._fields)
    assert [case["case"] for case in result["cases"]] == [case.name for case in detect_vs_literal.CASES]
    for case in result["cases"]:
        assert case["masks_equal"] is True
        for name in ("ours", "literal"):
            ms = case[name]["ms"]
            assert 0 < ms["least"] <= ms["p20"] <= ms["median"] <= ms["p80"] <= ms["most"]
            assert case[name]["allocated_bytes"] > 0
        assert case["ratio"] == pytest.approx(case["literal"]["ms"]["median"] / case["ours"]["ms"]["median"])
        assert case["floor"]["ms"] > 0 and case["floor"]["bytes"] > 0 and case["times_the_floor"] > 0


def test_a_quick_run_writes_a_complete_result(tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    assert detect_vs_literal.main(["--quick", "--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    check(result)
    assert result["targets"] is None
    assert result["sizes"] == shapes.QUICK._asdict()
    patches = shapes.QUICK.patches
    assert [case["detected"] for case in result["cases"]] == [0, 13, patches // 2, patches, 0, 0]
    for case in result["cases"]:
        dense = 2 * 4 * patches * shapes.QUICK.latents  # what the literal version has to hold
        assert case["literal"]["allocated_bytes"] >= dense
    none = result["cases"][0]["ours"]["allocated_bytes"]
    assert none < 4 * patches * shapes.QUICK.latents / 8
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in detect_vs_literal.CASES)


def test_different_masks_end_the_run_before_a_time_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "literal", lambda **arguments: ~ops.detect_patches(**arguments))
    out = tmp_path / "result.json"
    assert detect_vs_literal.main(["--quick", "--rounds", "2", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "the masks differ" in printed.err and "ms" not in printed.out and not out.exists()


@pytest.mark.parametrize("inside", [True, False])
def test_the_inputs_have_the_chosen_share_above_the_threshold(inside):
    arguments = shapes.detection(shapes.QUICK, 0.25, inside)
    h = torch.einsum("bdhw,ld->bhwl", arguments["x"], arguments["weight"]).flatten(0, 2)
    above = (h[:, arguments["latents"]] > 0).any(1)
    assert above.sum() == shapes.QUICK.patches // 4
    first = h.topk(shapes.QUICK.k).indices
    ranked = (first == arguments["latents"][0]).any(1)
    assert torch.equal(ranked, above if inside else torch.zeros_like(above))


def test_the_floor_counts_what_has_to_be_read_and_multiplied():
    limits = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
    shape = shapes.Shape(batch=1, width=10, height=2, grid_width=5, latents=100, k=3, union=2)
    none = detect_vs_literal._floor(shape, 0, limits)
    assert none == {"bytes": 480, "flops": 400, "ms": pytest.approx(480e-6), "bound": "memory"}
    some = detect_vs_literal._floor(shape, 7, limits)
    assert some == {"bytes": 4480, "flops": 14400, "ms": pytest.approx(0.0144), "bound": "product"}


def test_peaks_see_a_buffer_and_not_what_was_there_before():
    kept = torch.ones(1 << 20)
    megabytes = 64
    peak = machine.allocated_peak(lambda: torch.ones(megabytes << 18).sum() + kept[0])
    assert megabytes << 20 <= peak < (megabytes + 1) << 20
    resident = machine.resident_peak(lambda: torch.ones(megabytes << 18).sum())
    assert resident is None or (megabytes - 2) << 20 <= resident < 2 * megabytes << 20


def test_a_slug_is_a_file_name():
    device = {"name": "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "cpu family": "6", "model": "106"}
    assert machine.slug(device) == "intel-xeon-platinum-8370c-cpu-6-106"
    assert machine.cpu()["name"]


def test_targets_are_missed_where_they_are_missed():
    def case(ratio):
        return {"ratio": ratio, "ours": {"allocated_bytes": 31e6}}

    def met(*ratios):
        return [t["met"] for t in detect_vs_literal._targets([case(r) for r in ratios])]

    assert met(100, 3, 1, 1, 1, 1) == [True, True, True]
    assert met(99, 2.9, 1, 1, 1, 1) == [False, False, True]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_complete(path):
    result = json.loads(path.read_text())
    check(result)
    assert result["sizes"] == shapes.SD15._asdict() and result["targets"] and result["commit"]
