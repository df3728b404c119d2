"""The README's examples."""

import json
import re
from pathlib import Path

from PIL import Image

from benchmarks import attack, evaluation, pipelines
from lbdt import canvas
from lbdt.attack import Outcome, summarise
from lbdt.bench import table
from lbdt.evaluation.report import cells
from lbdt.evaluation.report.table import csv_text
from lbdt.evaluation.report.write import read_values

README = Path(__file__).resolve().parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_emojicanvas_example_erases_the_cat(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[0], str(README), "exec"), {})
    (objects, styles) = canvas.classify([Image.open(tmp_path / "no-cat.png")])
    assert canvas.OBJECTS[int(objects)] != "Cats" and canvas.STYLES[int(styles)] == "Sketch"
    assert "timestep" in capsys.readouterr().out


def test_the_steering_example_steers(capsys):
    exec(compile(EXAMPLES[2], str(README), "exec"), {})
    assert "steering: rule saeuron, strength -5.0" in capsys.readouterr().out


def test_every_example_is_python():
    assert len(EXAMPLES) == 3
    for example in EXAMPLES:
        compile(example, str(README), "exec")


def test_every_linked_file_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert (
        links and [link for link in links if "://" not in link and not (README.parent / link).exists()] == []
    )


def test_its_figures_of_the_four_pipelines_are_those_of_the_linked_results():
    text = README.read_text()
    result = json.loads((README.parent / "benchmarks/results/pipelines.json").read_text())
    assert all(line in text for line in pipelines.lines(result["pipelines"]))
    (name,) = re.findall(r"\]\((benchmarks/results/train-vs-sparsify[\w-]+\.json)\)", text)
    for row in json.loads((README.parent / name).read_text())["rows"]:
        times = {version: f"{1e3 * seconds:.0f}" for version, seconds in row["seconds"].items()}
        size = ", ".join(str(row["size"][key]) for key in ("d", "latents", "k", "rows"))
        cells = [size, f"{row['dead_share']:.0%}", times["sparsify"], times["ours"]]
        cells += [f"{row['speedup']:.2f}x", times["ours, bfloat16"]]
        assert f"| {' | '.join(cells)} |" in text


def test_its_benchmark_figures_are_those_of_the_linked_result():
    name = re.search(r"\]\((benchmarks/results/cpu[\w-]+\.json)\)", README.read_text())[1]
    result = json.loads((README.parent / name).read_text())
    measured = {(row["op"], row["shape"], row["share"], row["variant"]): row for row in result["rows"]}
    for share in (0.0, 0.01, 0.1, 0.5, 1.0):
        row = measured["hook", "sd15-b1", share, ""]
        times = [
            table._ms(row["versions"][version]["own_ms"]) for version in ("published", "compiled", "ours")
        ]
        cells = [f"{share:.0%}", *times, f"{row['ratio']['published']:.3g}x", f"{row['times_the_floor']:.3g}"]
        assert f"| {' | '.join(cells)} |" in README.read_text()
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
        times = [table._ms(row["versions"][version]["own_ms"]) for version in (baseline, "ours")]
        cells = [label, *times, f"{row['ratio'][baseline]:.3g}x", f"{row['times_the_floor']:.3g}"]
        assert f"| {' | '.join(cells)} |" in README.read_text(), label


def test_its_erasure_figures_are_those_of_the_linked_evaluation():
    text = README.read_text()
    values = read_values(evaluation.RESULTS)
    about = values["about"]
    assert list(values["kinds"]) == list(canvas.KINDS) and not about["dirty"] and not about["quick"]
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
    """At the strength chosen on other seeds, in artifact rate and in global average, for three pipelines or more."""
    values = json.loads((evaluation.RESULTS / "values.json").read_text())
    for metric in ("AR", "GA"):
        wins = 0
        for kind in values["kinds"].values():
            steering, per = (cells.mean_of(cells.main_row(kind, m), metric) for m in ("steering", "per"))
            wins += per < steering if metric == "AR" else per > steering
        assert wins >= 3, metric


def test_its_figures_of_the_attack_are_those_of_the_linked_result():
    result = json.loads((README.parent / "benchmarks/results/attack.json").read_text())
    lines = attack.lines(result["runs"])
    assert len(lines) == 6 and "\n".join(lines) in README.read_text()
    for run in result["runs"]:
        outcomes = [Outcome.from_dict(outcome) for outcome in run["outcomes"]]
        assert summarise(outcomes).to_dict() == run["summary"]
