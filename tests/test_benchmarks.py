"""`lbdt bench`: its inputs, baselines, floors, checks and result; the scripts beside it; and the committed
results."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import gate_cost, pre_encoder_cost, sanitize
from lbdt.bench import baselines, cases, hardware, hook, runner, shapes, timing, timing_table
from lbdt.bench.measured_shares import MEASURED
from lbdt.bench.shapes import Place

ROOT = Path(__file__).resolve().parents[1]
QUICK = shapes.QUICK["quick"]
TINY = shapes.Shape("tiny", 1, 1, 10, 2, 5, latents=100, k=3, union=2)
RESULTS = [
    path
    for path in sorted((ROOT / "benchmarks/results").glob("*.json"))
    if json.loads(path.read_text()).get("benchmark") == runner.BENCHMARK
]


def check(result):
    assert result["command"].startswith("lbdt bench")
    assert {"lbdt", "torch", "triton", "python", "cuda", "driver"} <= set(result["versions"])
    assert result["device"]["name"] and result["threads"] >= 1 and result["date"]
    assert result["rows"] and {row["dtype"] for row in result["rows"]} == set(result["limits"])
    for row in result["rows"]:
        assert row["op"] in cases.OPS and row["shape"] in result["shapes"] and row["equal"] is True
        assert row["backend"] and row["floor"]["ms"] > 0 and row["floor"]["bytes"] > 0
        for name, version in row["versions"].items():
            ms = version["ms"]
            assert 0 < ms["least"] <= ms["p20"] <= ms["median"] <= ms["p80"] <= ms["most"]
            assert version["rounds"] >= 2 and version["allocated_bytes"] >= 0
            if name in row["ratio"]:
                assert row["ratio"][name] == pytest.approx(
                    version["own_ms"] / row["versions"]["ours"]["own_ms"]
                )
        assert set(row["versions"]) - {"ours", "bare"} == set(row["ratio"])


@pytest.fixture(scope="module")
def quick():
    """Every op at the small sizes."""
    options = runner.BenchOptions(quick=True, rounds=2, shares=(0.0, 0.1, 1.0), budget=0.1)
    return runner.run(options)


def test_a_quick_run_measures_every_op_against_its_baselines(quick):
    check(json.loads(json.dumps(quick)))
    assert quick["targets"] is None and quick["skipped"] == {}
    found = {(row["op"], row["share"], row["variant"]): row for row in quick["rows"]}
    assert {key[0] for key in found} == set(cases.OPS)
    assert [row["count"] for row in quick["rows"] if row["op"] == "detect_patches"] == [0, 13, 128, 0, 0]
    dense = 2 * 4 * QUICK.patches * QUICK.latents  # h and z, which the literal way has to hold
    for op, version in (("detect_patches", "literal"), ("hook", "published")):
        assert found[op, 0.0, ""]["versions"][version]["allocated_bytes"] >= dense
        assert found[op, 0.0, ""]["versions"]["ours"]["allocated_bytes"] < dense / 8
    wanted = {
        "detect_patches": {"literal", "compiled", "bfloat16", "int8"},
        "encode_topk": {"literal", "compiled"},
        "hook": {"published", "compiled"},
    }
    assert all(set(row["ratio"]) == wanted.get(row["op"], set(row["ratio"])) for row in quick["rows"])
    own = found["hook", 0.1, ""]["versions"]
    assert own["ours"]["own_ms"] == own["ours"]["ms"]["median"] - own["bare"]["ms"]["median"]


def test_cold_caches_are_timed_beside_warm_ones():
    options = runner.BenchOptions(quick=True, rounds=3, ops=["hook"], shares=[0.1], budget=0.1, cold=True)
    result = json.loads(json.dumps(runner.run(options)))
    check(result)
    assert options.command().split(" --threads")[0].endswith("--quick --cold")
    (row,) = result["rows"]
    for version in row["versions"].values():
        assert 0 < version["cold"]["least"] <= version["cold"]["median"] <= version["cold"]["most"]
        bare = row["versions"]["bare"]["cold"]["median"]
        assert version["own_cold_ms"] == version["cold"]["median"] - bare
    head = next(line for line in timing_table.lines(result) if line.startswith("| shape"))
    assert [cell.strip() for cell in head.split("|")].count("cold, ms") == len(row["ratio"]) + 1


def test_a_cold_call_finds_more_than_the_last_level_cache_overwritten():
    clock = timing.ColdCpuClock()
    before = int(clock._other[-1])
    assert clock._other.numel() == 4 * timing.last_level_cache() > 0
    calls = []
    assert clock(lambda: calls.append(int(clock._other[-1])), 3) > 0
    assert calls == [before + 1, before + 2, before + 3] and clock.repeats(1e-6) == 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (("48K", "1024K", "32768K"), 32 << 20),
        (("32K", "2M\n"), 2 << 20),
        (("512",), 512),
        (("many",), 64 << 20),
        ((), 64 << 20),
    ],
    ids=["kilobytes", "megabytes", "bytes", "no number", "none"],
)
def test_the_last_level_cache_is_the_largest_that_linux_names(tmp_path, sizes, expected):
    for at, size in enumerate(sizes):
        (tmp_path / f"index{at}").mkdir()
        (tmp_path / f"index{at}" / "size").write_text(size)
    assert timing.last_level_cache(tmp_path) == expected


def test_the_table_has_a_row_for_every_case_and_a_line_for_every_target(quick):
    wanted = [
        {"target": "so fast", "got": 2.0, "met": True},
        {"target": "so small", "got": 9.0, "met": False},
    ]
    lines = timing_table.lines(quick | {"targets": wanted, "skipped": {"hook": "no diffusers"}})
    assert sum(line.startswith("| quick ") for line in lines) == len(quick["rows"])
    assert [line for line in lines if line in cases.OPS] == list(cases.OPS)
    assert lines[-2:] == ["met: so fast, got 2", "MISSED: so small, got 9"]
    assert "left out: hook: no diffusers" in lines


def test_a_compiled_baseline_that_cannot_be_compiled_is_left_out_and_named(monkeypatch):
    def fails(**arguments):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(cases, "compiled", lambda function: fails)
    result = runner.run(
        runner.BenchOptions(quick=True, rounds=2, ops=["detect_patches"], shares=[0.1], budget=0.1)
    )
    check(result)
    assert result["skipped"] == {"detect_patches, compiled": "no compiler"}
    assert all("compiled" not in row["versions"] for row in result["rows"])


@pytest.mark.parametrize("op", cases.OPS)
def test_a_version_that_answers_otherwise_ends_the_run(op):
    plain = cases.PLAIN if op == "replace_patches_" else ""
    case = cases.build(cases.Spec(op, "quick", 0.1, plain, "float32"))
    other = next(name for name in case.versions if name != "ours")

    def spoiled():
        answer = case.versions[other]()
        if isinstance(answer, tuple):
            return tuple(torch.zeros_like(part) for part in answer)
        return torch.zeros_like(answer)

    with pytest.raises(cases.Mismatch, match=f"{op}, quick.*no time is shown"):
        case.check({"ours": case.versions["ours"], other: spoiled})


@pytest.mark.parametrize("name", ["quick", "canvas"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_inputs_have_the_chosen_share_above_the_threshold(name, inside):
    shape = (shapes.SHAPES | shapes.QUICK)[name]
    arguments = shapes.detection(shape, 0.25, inside)
    x = arguments["x"] if arguments["minus"] is None else arguments["x"] - arguments["minus"]
    assert (arguments["minus"] is not None) == shape.update
    h = torch.einsum("bdhw,ld->bhwl", x, arguments["weight"]).flatten(0, 2)
    above = (h[:, arguments["latents"]] > shapes.THRESHOLD).any(1)
    assert above.sum() == shape.patches // 4
    ranked = (h.topk(shape.k).indices == arguments["latents"][0]).any(1)
    assert torch.equal(ranked, above if inside else torch.zeros_like(above))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shares_are_exact_in_half_precision_too(dtype):
    place = Place(dtype=cases.DTYPES[dtype])
    for shape in (QUICK, shapes.SHAPES["canvas"]):
        mask = baselines.literal(**shapes.detection(shape, 0.1, place=place))
        assert mask.sum() == round(0.1 * shape.patches)


@torch.inference_mode()
@pytest.mark.parametrize("share", shapes.SHARES)
@pytest.mark.parametrize("name", ["quick", "canvas"])
def test_the_published_way_finds_and_writes_the_same_patches_as_ours(name, share):
    shape = (shapes.SHAPES | shapes.QUICK)[name]
    stand = hook.Stand(shape, share, Place())
    versions = stand.versions()
    assert versions["bare"]() is stand.x
    ours, published = versions["ours"](), versions["published"]()
    mask = baselines.literal(**stand.arguments)
    assert mask.sum() == round(share * shape.patches)
    grid = mask.view(shape.batch, shape.height, shape.grid_width)
    for image, y, x in grid.nonzero().tolist():  # by hand: a square of side 3 around each
        mask.view_as(grid)[image, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = True
    assert torch.equal(stand.published.mask, mask)
    assert torch.equal(cases.changed(stand.x, ours), mask)
    assert torch.equal(cases.changed(stand.x, published), mask)


def test_published_donors_are_free_patches_of_the_same_image():
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    mask = torch.tensor([[True, False, False, True], [False, False, False, False]])
    out = baselines.replace_in_turn(x, mask)
    assert torch.equal(out[1], x[1])
    before, after = x[0].flatten(1), out[0].flatten(1)
    assert torch.equal(after[:, 1:3], before[:, 1:3])
    for patch in (0, 3):
        assert any(torch.equal(after[:, patch], before[:, donor]) for donor in (1, 2))
    noise = baselines.replace_in_turn(x, torch.ones_like(mask))
    assert cases.changed(x, noise).all()


def test_the_floor_of_detection_counts_what_has_to_be_read_and_multiplied():
    limits = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
    none = runner.floor_of(*cases.detection_floor(TINY, 0, 4), limits)
    assert none == {"bytes": 480, "flops": 400, "ms": pytest.approx(480e-6), "bound": "memory"}
    some = runner.floor_of(*cases.detection_floor(TINY, 7, 4), limits)
    assert some == {"bytes": 4480, "flops": 14400, "ms": pytest.approx(0.0144), "bound": "product"}
    assert cases.detection_floor(TINY._replace(update=True), 0, 2)[0] == 2 * (2 * 100 + 20)


def test_the_floor_of_replacement_counts_donors_once():
    replaced = torch.tensor([[True] * 8 + [False] * 2])
    own = 2 * TINY.patches  # mask and flags
    # 8 written, and at most the 2 free ones read.
    assert cases.replacement_floor(TINY, replaced, 4, "random", False) == (40 * (8 + 2) + own, 0)
    assert cases.replacement_floor(TINY, ~replaced, 4, "mean", False) == (40 * (2 + 8) + own, 5 * 2 * 10)
    assert cases.replacement_floor(TINY, replaced, 4, "random", True) == (40 * 20 + own, 0)
    assert cases.replacement_floor(TINY, replaced | True, 4, "random", False)[0] == 40 * (10 + 10) + own


def test_peaks_see_a_buffer_and_not_what_was_there_before():
    kept = torch.ones(1 << 20)
    megabytes = 64
    peak = hardware.allocated_peak(lambda: torch.ones(megabytes << 18).sum() + kept[0])
    assert megabytes << 20 <= peak < (megabytes + 1) << 20
    resident = hardware.resident_peak(lambda: torch.ones(megabytes << 18).sum())
    assert resident is None or (megabytes - 2) << 20 <= resident < 2 * megabytes << 20


def test_a_slug_is_a_file_name():
    name = "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz"
    device = {"type": "cpu", "name": name, "cpu family": "6", "model": "106"}
    assert hardware.slug(device) == "cpu-intel-xeon-platinum-8370c-cpu-6-106"
    assert hardware.slug({"type": "cuda", "name": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    assert hardware.cpu()["name"]


def row(op, share, variant="", mb=0.0, floor=1.0, graph=None, attach=None, **ratio):
    ours = {"allocated_bytes": mb * 1e6} | ({} if graph is None else {"graph": graph})
    return {
        "op": op,
        "shape": "sd15-b1",
        "share": share,
        "variant": variant,
        "ratio": ratio,
        "times_the_floor": floor,
        "attach_bytes": attach,
        "versions": {"ours": ours},
    }


@pytest.mark.parametrize("vnni", [True, False])
def test_targets_are_missed_where_they_are_missed(monkeypatch, vnni):
    def met(absent, tenth, full, c, detect, mb, attach):
        rows = [
            row("detect_patches", 0.0, literal=detect, mb=mb),
            row("replace_patches_", 0.1, cases.PLAIN, reference=c),
            *(
                row("hook", share, attach=attach, published=x)
                for share, x in ((0.0, absent), (0.1, tenth), (1.0, full))
            ),
        ]
        return [t["met"] for t in runner.targets(rows, None, "cpu")]

    monkeypatch.setattr(hardware, "has_vnni", lambda: vnni)
    full = 4 if vnni else 1.4
    assert met(150, 15, full, 3, 100, 2.9, 32e6) == [True] * 7
    assert met(149, 14.9, full - 0.1, 2.9, 99, 3, 32e6 + 1) == [False] * 7
    assert runner.targets([row("hook", 0.5, published=9)], None, "cpu") == []


def test_targets_on_a_gpu():
    def met(floor, micros, ratio, percent):
        graph = {"error": "a sync"} if micros is None else {"warm": {"median": micros / 1e3}}
        rows = [
            row("detect_patches", 0.0, graph=graph),
            row("detect_patches", 1.0, floor=floor),
            row("hook", 0.0, published=ratio),
        ]
        step = {"present": {"percent_of_step": 2.5 * percent}, "absent": {"percent_of_step": percent}}
        return [t["met"] for t in runner.targets(rows, step, "cuda")]

    assert met(1.5, 14.9, 30, 0.19) == [True] * 5
    assert met(1.6, 15.1, 29, 0.21) == [False] * 5
    assert met(1.0, None, 30, 0.19)[3] is False


def test_a_unet_step_is_timed_with_the_hook_in_it():
    from lbdt.bench.unet import measure

    step = measure(torch.device("cpu"), quick=True, rounds=2, seed=0, budget=0.05)
    for name in ("present", "absent"):
        measured = MEASURED[f"saeuron, {name}"]
        assert step[name]["candidates"] == measured.candidates
        assert step[name]["share"] == pytest.approx(measured.detected, abs=1 / 128)
    assert step["present"]["step_ms"]["median"] > 0
    assert len(timing_table.lines({**_EMPTY, "unet": step})) >= 4


_EMPTY = {
    "versions": dict.fromkeys(("lbdt", "torch", "triton", "cuda", "driver"), ""),
    "device": {"name": "none"},
    "threads": 1,
    "load_average_before": 0.0,
    "commit": "",
    "dirty": False,
    "limits": {},
    "rows": [],
    "skipped": {},
    "targets": None,
}


def test_the_sanitizer_script_runs_every_op_here(capsys):
    names = ["patch_uniform", "replace_patches", "screened_patches"]
    assert sanitize.main(["--device", "cpu", *(word for name in names for word in ("--op", name))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == names


def test_the_gpu_script_is_shell():
    script = ROOT / "benchmarks/gpu.sh"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_complete(path):
    result = json.loads(path.read_text())
    check(result)
    assert not result["quick"] and result["targets"] and result["commit"]


def test_the_gate_is_timed_where_it_changes_nothing(tmp_path, capsys):
    gate_cost.main(
        ["--threads", "1", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path / "times.json")]
    )
    found = json.loads((tmp_path / "times.json").read_text())
    assert [(row["share"], row["over"]) for row in found["rows"]] == list(gate_cost.CASES)
    assert all(row["own_ms"]["gated"] > 0 and 0 < row["ratio"] < 10 for row in found["rows"])
    assert capsys.readouterr().out.count("without the gate") == len(gate_cost.CASES)


def test_a_pre_encoder_is_timed_where_nothing_is_detected(tmp_path, capsys):
    out = tmp_path / "times.json"
    pre_encoder_cost.main(
        ["--shape", "quick", "--threads", "1", "--rounds", "3", "--device", "cpu", "--out", str(out)]
    )
    found = json.loads(out.read_text())
    assert [row["latents"] for row in found["rows"]] == list(pre_encoder_cost.UNIONS)
    assert all(row["own_ms"]["with"] > 0 and row["ratio"] > 0 for row in found["rows"])
    assert capsys.readouterr().out.count("without a pre-encoder") == len(pre_encoder_cost.UNIONS)
