"""The README and the other documents: examples run, links lead somewhere, figures are those of the results."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import (
    attack,
    early_stop,
    evaluation,
    pipelines,
    screen_bounds,
    serving_table,
    train_vs_sparsify,
)
from lbdt import canvas
from lbdt.attack import AttackOutcome, summarise
from lbdt.bench import timing_table
from lbdt.evaluation.report import cells
from lbdt.evaluation.report.tables import csv_text
from lbdt.evaluation.report.write import read_values

ROOT = Path(__file__).resolve().parents[1]
README, MEASURED = ROOT / "README.md", ROOT / "benchmarks/README.md"
EVALUATION = ROOT / "lbdt/evaluation/README.md"
FOLDERS = ("*.md", "benchmarks/*.md", "kernels/*.md", "lbdt/**/*.md")
DOCUMENTS = [path for pattern in FOLDERS for path in sorted(ROOT.glob(pattern))]
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def examples(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


def run(example: str, path: Path) -> dict:
    values = {}
    exec(compile(example, str(path), "exec"), values)
    return values


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


def test_the_emojicanvas_example_erases_the_cat(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(examples(README)[0], README)
    (seen, styles) = canvas.classify([Image.open(tmp_path / "no-cat.png")])
    assert seen.nonzero()[:, 1].tolist() == [canvas.OBJECTS.index("Dogs")]
    assert canvas.STYLES[int(styles)] == "Sketch"
    assert "timestep" in capsys.readouterr().out


def test_the_stable_diffusion_example_runs_on_emojicanvas_s_files():
    example = examples(README)[1]
    for words, others in (
        ('"style50"', repr(str(canvas.WEIGHTS / "pipeline"))),
        ('"eraser"', repr(str(canvas.WEIGHTS / "eraser-saeuron"))),
        ("torch.float16", "torch.float32"),
        ('"cuda"', '"cpu"'),
        ("pipe(prompts)", "pipe(prompts, num_inference_steps=2)"),
    ):
        assert example.count(words) == 1, words
        example = example.replace(words, others)
    values = run(example, README)
    assert len(values["images"]) == len(values["prompts"]) == 3
    assert len(values["eraser"].report().steps) == 2


def test_the_steering_example_steers(capsys):
    run(examples(EVALUATION)[1], EVALUATION)
    assert "steering: rule saeuron, strength -5.0" in capsys.readouterr().out


def test_the_uce_example_makes_a_picture_and_leaves_the_weights():
    values = run(examples(EVALUATION)[0], EVALUATION)
    assert values["image"].size == (128, 128)
    fresh = canvas.load_pipeline().unet.state_dict()
    assert all(map(torch.equal, values["pipe"].unet.state_dict().values(), fresh.values()))


def test_every_example_is_run_above():
    assert {path: len(examples(path)) for path in DOCUMENTS if examples(path)} == {README: 2, EVALUATION: 2}


@every_document
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        name, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = path.parent / name if name else path
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_readme_links_to_every_document():
    linked = {(README.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", README.read_text())}
    hidden = {path for path in DOCUMENTS if "weights" not in path.parts} - linked - {README}
    assert hidden == set()


def test_its_table_is_that_of_the_linked_evaluation():
    text = " ".join(README.read_text().split())
    values = json.loads((evaluation.RESULTS / "values.json").read_text())
    lines = evaluation.short_lines(values)
    assert len(lines) == 2 + len(values["kinds"]) and "\n".join(lines) in README.read_text()
    for name in set(canvas.KINDS) - set(values["kinds"]):
        assert f"| `{name}`: " in README.read_text() and "not measured" in README.read_text()
    assert f"{evaluation.others_line(values)} of the pictures of other objects" in text
    rows = json.loads((MEASURED.parent / "results/cpu-amd-epyc-26-2.json").read_text())["rows"]
    rows = [row for row in rows if (row["op"], row["shape"], row["variant"]) == ("hook", "sd15-b1", "")]
    hook = {row["share"]: row["versions"] for row in rows}
    ours, theirs = (timing_table._ms(hook[0.1][version]["own_ms"]) for version in ("ours", "published"))
    least = f"{hook[0.0]['ours']['own_ms']:.2f}"
    assert (
        f"the hook takes {ours} ms a step, with none {least} ms, the published hooks' way {theirs} ms" in text
    )


def test_the_figures_of_the_four_pipelines_are_those_of_the_linked_results():
    text = MEASURED.read_text()
    result = json.loads((MEASURED.parent / "results/pipelines.json").read_text())
    assert all(line in text for line in pipelines.lines(result["pipelines"]))
    (name,) = re.findall(r"\]\((results/train-vs-sparsify[\w-]+\.json)\)", text)
    rows = json.loads((MEASURED.parent / name).read_text())["rows"]
    assert all(line in text for line in train_vs_sparsify.lines(rows)[: 2 + len(rows)])


def test_the_benchmark_figures_are_those_of_the_linked_result():
    result = json.loads((MEASURED.parent / "results/cpu-intel-xeon-processor-6-167.json").read_text())
    measured = {(row["op"], row["shape"], row["share"], row["variant"]): row for row in result["rows"]}
    for share in (0.0, 0.01, 0.1, 0.5, 1.0):
        row = measured["hook", "sd15-b1", share, ""]
        times = [
            timing_table._ms(row["versions"][version]["own_ms"])
            for version in ("published", "compiled", "ours")
        ]
        cells = [f"{share:.0%}", *times, f"{row['ratio']['published']:.3g}x", f"{row['times_the_floor']:.3g}"]
        assert f"| {' | '.join(cells)} |" in MEASURED.read_text()
    for key, baseline, label in (
        (("detect_patches", "sd15-b1", 0.1, ""), "literal", "`detect_patches`, 10 %"),
        (("encode_topk", "sd15-b1", None, ""), "literal", "`encode_topk`"),
        (
            ("replace_patches_", "sd15-b1", 0.1, "NCHW, random"),
            "reference",
            "`replace_patches_`, 10 %, random, NCHW",
        ),
        (("patch_uniform", "sd15-b1", None, ""), "literal", "`patch_uniform`"),
    ):
        row = measured[key]
        times = [timing_table._ms(row["versions"][version]["own_ms"]) for version in (baseline, "ours")]
        cells = [label, *times, f"{row['ratio'][baseline]:.3g}x", f"{row['times_the_floor']:.3g}"]
        assert f"| {' | '.join(cells)} |" in MEASURED.read_text(), label


def test_the_hook_s_figures_are_those_of_the_linked_result():
    result = json.loads((MEASURED.parent / "results/cpu-amd-epyc-26-2.json").read_text())
    text = MEASURED.read_text()
    assert f"commit `{result['commit'][:7]}`" in text
    for row in result["rows"]:
        case = ", ".join(part for part in (f"{row['share']:.0%}", row["variant"]) if part)
        ours = row["versions"]["ours"]
        if row["op"] == "detect_patches":
            times = [row["versions"][name]["own_ms"] for name in ("literal", "bfloat16", "int8", "ours")]
            cells = [timing_table._ms(ms) for ms in times]
            cells += [f"{row['ratio'][name]:.3g}x" for name in ("literal", "int8")]
            assert f"| {case} | {' | '.join(cells)} | {ours['allocated_bytes'] / 1e6:.1f} |" in text
            continue
        published = row["versions"]["published"]
        if row["shape"] == "host":
            assert f"{1000 * ours['own_ms']:.1f} microseconds" in text
            continue
        times = [timing_table._ms(ms) for ms in (published["own_ms"], ours["own_ms"], ours["own_cold_ms"])]
        assert f"| {case} | {' | '.join(times)} | {row['ratio']['published']:.3g}x |" in text


def test_the_erasure_figures_are_those_of_the_linked_evaluation():
    text = MEASURED.read_text()
    values = read_values(evaluation.RESULTS)
    about = values["about"]
    assert not about["dirty"]
    missing = [name for name in canvas.KINDS if name not in values["kinds"]]
    kinds = "".join(f" --kind {name}" for name in values["kinds"]) if missing else ""
    assert all(f"`{name}`: not measured" in text for name in missing)
    quick = " --quick" if about["quick"] else ""
    assert f"`lbdt evaluate{quick}{kinds}`, then `python -m benchmarks.evaluation" in " ".join(text.split())
    assert f"commit `{about['commit'][:7]}`, seeds {', '.join(map(str, about['seeds']))}" in text
    tables = [
        evaluation.main_lines(values),
        evaluation.style_lines(values),
        evaluation.sweep_lines(values),
        evaluation.inside_lines(values),
        evaluation.settings_lines(values, "padding"),
        evaluation.settings_lines(values, "sources"),
        evaluation.together_lines(values),
    ]
    for lines in tables:
        assert len(lines) > 4 and "\n".join(lines) in text
    assert (evaluation.RESULTS / "table.csv").read_text() == csv_text(values)


def test_per_beats_steering_in_the_linked_evaluation():
    """In artifact rate and in global average, for three pipelines or more."""
    values = json.loads((evaluation.RESULTS / "values.json").read_text())
    for metric in ("AR", "GA"):
        wins = 0
        for kind in values["kinds"].values():
            steering, per = (cells.mean_of(cells.main_row(kind, m), metric) for m in ("steering", "per"))
            wins += per < steering if metric == "AR" else per > steering
        assert wins >= 3, metric


def test_the_figures_of_the_attack_are_those_of_the_linked_result():
    result = json.loads((MEASURED.parent / "results/attack.json").read_text())
    lines = attack.lines(result["runs"])
    assert len(lines) == 6 and "\n".join(lines) in MEASURED.read_text()
    for run in result["runs"]:
        outcomes = [AttackOutcome.from_dict(outcome) for outcome in run["outcomes"]]
        assert summarise(outcomes).to_dict() == run["summary"]


def test_the_figures_of_the_gate_are_those_of_the_linked_result():
    result = json.loads((MEASURED.parent / "results/gate-cost.json").read_text())
    columns = {}
    for row in result["rows"]:
        own, more = row["own_ms"], f"({row['ratio'] - 1:+.1%})".replace("%", " %")
        columns.setdefault(row["share"], []).append(
            (f"{own['published']:.3f} ms", f"{own['gated']:.3f} ms {more}")
        )
    text = MEASURED.read_text().replace("**", "")
    assert len(columns) == 3
    for share, ((call, of_call), (run, over_run)) in columns.items():
        assert f"| {100 * share:.0f} % | {call} | {of_call} | {run} | {over_run} |" in text


def test_the_table_of_the_server_is_that_of_its_result():
    result = json.loads((MEASURED.parent / "results/serving.json").read_text())
    assert serving_table.table(result) in (ROOT / "lbdt/serving/README.md").read_text()


def test_the_table_of_candidates_is_that_of_the_linked_result():
    result = json.loads((MEASURED.parent / "results/early-stop.json").read_text())
    assert "\n".join(early_stop.lines(result["kinds"])) in MEASURED.read_text()
    result = json.loads((MEASURED.parent / "results/screen-bounds.json").read_text())
    assert "\n".join(screen_bounds.lines(result["kinds"])) in MEASURED.read_text()
