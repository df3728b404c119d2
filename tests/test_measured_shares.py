"""The measured shares of candidates: what they are of, and the cases of `lbdt bench` that have them."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import early_stop, screen_bounds
from lbdt.bench import baselines, runner, shapes
from lbdt.bench.measured_shares import MEASURED
from tests.test_benchmarks import row

ROOT = Path(__file__).resolve().parents[1]
QUICK = shapes.QUICK["quick"]


@pytest.mark.parametrize("met", [True, False])
def test_targets_of_measured_shares_of_many_latents_and_of_the_host(met):
    own = {"own_ms": 0.39 if met else 0.41}, {"own_ms": 0.024 if met else 0.026}
    rows = [
        row("hook", 0.69, "saeuron, absent", published=25 - (not met)),
        row("hook", 0.75, "saeuron, present", published=8 - (not met)),
        row("hook", 0.0, "U 137") | {"versions": {"ours": own[0]}},
        row("hook", 0.0) | {"shape": "host", "versions": {"ours": own[1]}},
    ]
    assert [target["met"] for target in runner.targets(rows, None, "cpu")] == [met] * 4


@pytest.mark.parametrize("case", MEASURED)
def test_a_measured_case_has_its_shares_and_is_refuted_as_late(case):
    measured, shape = MEASURED[case], QUICK
    arguments = shapes.detection(shape, 0.0, measured=measured)
    x = arguments["x"].flatten(2).transpose(1, 2).flatten(0, 1)
    h, own = x @ arguments["weight"].t(), arguments["latents"][0]
    above = h[:, own] > shapes.THRESHOLD
    assert int(above.sum()) == round(measured.candidates * shape.patches)
    assert int(baselines.literal(**arguments).sum()) == round(measured.detected * shape.patches)
    larger = (h[above] > h[above][:, [own]]).cumsum(1)
    refuted = larger[:, -1] >= shape.k
    read = ((larger[refuted] >= shape.k).int().argmax(1) + 1) / shape.latents
    limited = torch.tensor(measured.read).clamp(2.5 * shape.k / shape.latents, 0.5)
    assert 0.5 < float(read.mean() / limited.mean()) < 2


@pytest.mark.parametrize("case", MEASURED)
def test_the_measured_shares_are_those_of_the_linked_result(case):
    kind, name = case.split(", ")
    result = json.loads((ROOT / "benchmarks/results/early-stop.json").read_text())
    (row,) = [row for row in result["kinds"] if row["kind"] == kind]
    part = row[name]
    for key in ("candidates", "detected"):
        assert getattr(MEASURED[case], key) == round(part[key] / part["patches"], 3)
    assert MEASURED[case].read == tuple(round(read / row["latents"], 3) for read in part["read_tenths"])


def test_early_stop_reads_less_in_the_order_of_firing(tmp_path, capsys):
    out = tmp_path / "early.json"
    assert early_stop.main(["--kind", "saeuron", "--steps", "2", "--object", "Cats", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["kinds"]
    for name in ("present", "absent"):
        part = row[name]
        assert 0 < part["detected"] < part["candidates"] < part["patches"]
        numbered, mean, counts = part["mean_read"].values()
        # A candidate is refuted by k others at least, and at the end of the dictionary at the latest.
        assert row["k"] <= counts < numbered <= row["latents"] and mean < numbered
        assert row["k"] <= part["read_tenths"][0] < part["read_tenths"][-1] <= row["latents"]
    present, absent = (row[name]["detected"] / row[name]["patches"] for name in ("present", "absent"))
    assert present > 2 * absent
    assert "| saeuron | absent |" in capsys.readouterr().out


@pytest.mark.parametrize("module", [early_stop, screen_bounds], ids=lambda module: module.__name__)
def test_an_object_that_emojicanvas_has_not_is_refused_by_name(module, capsys):
    with pytest.raises(SystemExit) as refused:
        module.main(["--object", "Zebra"])
    assert refused.value.code == 2
    assert "--object: invalid choice: 'Zebra'" in (said := capsys.readouterr().err) and "Rabbits" in said


def test_bounds_around_the_pre_bias_leave_less_open_than_around_zero(tmp_path, capsys):
    out = tmp_path / "bounds.json"
    assert (
        screen_bounds.main(["--kind", "saeuron", "--steps", "2", "--object", "Cats", "--out", str(out)]) == 0
    )
    (row,) = json.loads(out.read_text())["kinds"]
    near, far = row["centres"]["b_dec"], row["centres"]["0"]
    assert 0 <= near["undecided"] < far["undecided"] < 1 and 0 < near["error"] < far["error"]
    assert "| saeuron | b_dec |" in capsys.readouterr().out
