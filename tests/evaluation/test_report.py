"""Tables, CSV, the grid and the written folder of the report."""

import copy
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import evaluation
from lbdt.evaluation import published
from lbdt.evaluation.report import cells, grid, tables
from lbdt.evaluation.report.write import read_values, write
from tests.evaluation import sample_values as sample


@pytest.fixture(scope="module")
def values():
    return sample.values()


def read(values):
    return list(csv.DictReader(io.StringIO(tables.csv_text(values))))


def test_the_terminal_shows_means_intervals_and_the_better_method(values):
    lines = tables.lines(values)
    assert lines[0].split()[:4] == ["pipeline", "method", "pictures", "UA"]
    uce, steering, per = lines[3], lines[4], lines[6]
    assert steering.startswith("saeuron    steering (strength -5)") and "30.5 ± 3.0" in steering
    assert per.startswith("saeuron    PER (padding 1, nearest)")
    assert [text in per for text in ("9.0 ± 3.0*", "88.5 ± 3.0*")] == [True] * 2
    assert "95.0 ± 3.0*" in uce and "93.0 ± 3.0*" in uce, "the erased of pairs"
    assert "*" not in steering and "*" not in lines[1]
    assert any("both objects of a pair seen (kept)" in line for line in lines[25:])


def test_the_readme_table_has_four_pipelines_with_a_row_each_method(values):
    lines = tables.markdown(values)
    head = "| pipeline | method | pictures | UA | IRA | CRA | AR | AR others | GA | FD | clean | kept | pair gone"
    assert lines[0] == head + " | untouched |"
    rows = [line.removesuffix(" |").split(" | ") for line in lines[2:26]]
    assert [row[0].strip("| ") for row in rows] == [name for name in sample.KINDS for _ in range(6)]
    names = ["base", "negative prompt", "UCE", "steering (strength -5)", "PER without the gate", "PER"]
    assert [row[1].replace(" (padding 1, nearest)", "") for row in rows[:6]] == names
    assert rows[2][3] == "**95.0 ± 3.0**" and rows[5][6] == "**9.0 ± 3.0**"
    assert lines[26] == "" and len(lines) == 28 and "The base's row: its accuracies" in lines[27]


def test_the_base_s_row_has_its_accuracies(values):
    table = tables.main_table(values, tables.columns_of(values))
    shown = dict(zip(table.head, table.rows[0], strict=True))
    assert [shown[name] for name in ("IRA", "CRA", "clean", "kept")] == [
        *("99.1 ± 1.0", "97.4 ± 1.0", "95.3 ± 1.0", "90.2 ± 1.0"),
    ]
    assert [shown[name] for name in ("GA", "pair gone", "untouched")] == ["-", "-", "-"]
    assert not any(line == 0 for line, _ in table.marked)
    found = {row["metric"] for row in read(values) if (row["part"], row["method"]) == ("main", "base")}
    assert {"object seen", "both seen", "nothing seen", "style seen", "IRA"} <= found


def test_a_row_that_cannot_be_says_why_and_has_no_figures(values):
    table = tables.main_table(values, tables.columns_of(values))
    (row,) = [row for row in table.rows if row[0] == "sdxl" and row[1].startswith("negative")]
    assert row[1] == "negative prompt (no guidance: not applicable)" and set(row[2:]) == {""}
    assert not [
        r for r in read(values) if (r["kind"], r["part"], r["method"]) == ("sdxl", "main", "negative")
    ]


def test_the_readme_s_table_of_choices_has_every_method_but_the_base(values):
    lines = evaluation.choices_lines(values)
    assert lines[0].startswith("| pipeline | method | object gone (UA) | scene clean |")
    assert len(lines) == 2 + 5 * len(sample.KINDS)
    assert lines[3] == "| `saeuron` | UCE | 95.0 | 85.0 | 59.0 | 93.0 | 88.0 | 70.0 |"
    assert lines[-5] == f"| `sdxl` | negative prompt (no guidance: not applicable) |{'  |' * 6}"
    assert {line.count("|") for line in lines} == {9}


def test_figures_from_before_there_were_these_columns_are_shown_without_them(values):
    older = copy.deepcopy(values)
    for kind in older["kinds"].values():
        kind["rows"] = [
            {k: v for k, v in row.items() if k in ("method", "settings", "pictures", *tables.COLUMNS)}
            for row in kind["rows"]
            if row["method"] in ("base", "steering", "per")
        ]
    assert tables.columns_of(older) == tables.COLUMNS
    assert "accuracies" not in "".join(tables.markdown(older) + tables.lines(older))
    assert tables.main_table(older).rows[0][4] == "99.0 ± 3.0"


@pytest.mark.parametrize(
    ("steering", "per", "metric", "marked"),
    [
        pytest.param(90.0, 80.0, "UA", ["steering"], id="higher-is-better"),
        pytest.param(90.0, 80.0, "AR", ["per"], id="lower-is-better"),
        pytest.param(3.0, 2.5, "FD", ["per"], id="distance"),
        pytest.param(90.04, 90.0, "UA", [], id="equal-as-printed"),
        pytest.param(90.0, None, "UA", [], id="one-not-measured"),
    ],
)
def test_what_is_marked(steering, per, metric, marked):
    rows = [sample.row(method, 50, 50, 50, 50, 5) for method in ("steering", "per")]
    for row, value in zip(rows, (steering, per), strict=True):
        row[metric] = None if value is None else sample.estimate(value)
    found = tables.main_table({"kinds": {"k": {"rows": rows}}}, (metric,))
    assert [rows[line]["method"] for line, _ in sorted(found.marked)] == marked


@pytest.mark.parametrize(
    ("means", "metric", "best"),
    [
        ((50, 70, 60), "UA", 1),
        ((50, 70, 60), "AR", 0),
        ((50, 70, 70.04), "UA", None),
        ((70, 70, 50), "AR", 2),
        ((None, 70, None), "UA", None),
        ((None, 70, 60), "untouched", 1),
        ((50, 70, 60), "replaced", None),
        ((), "UA", None),
    ],
    ids=["high", "low", "tie-as-printed", "tie-of-others", "alone", "one-missing", "neither", "none"],
)
def test_the_best_of_several_means(means, metric, best):
    assert cells.best(means, metric) == best


def test_what_was_not_measured_is_a_dash_with_one_seed_there_is_no_interval():
    lines = tables.lines(sample.bare())
    assert lines[2].split() == "saeuron PER (padding 1) 780 90.0 95.0 - 8.0 - 69.2 -".split()
    assert "not measured" in lines[3] and "were not compared" in lines[4], "no note on the base's accuracies"
    assert tables.lines({"about": {}, "kinds": {}}) == ["no pipeline was evaluated"]


def test_the_verdict_counts_wins_losses_and_ties(values):
    changed = copy.deepcopy(values)
    changed["kinds"]["gsae"]["rows"][3]["AR"] = sample.estimate(1.0)
    changed["kinds"]["sdxl"]["rows"][3]["AR"] = changed["kinds"]["sdxl"]["rows"][5]["AR"]
    first, second = tables.verdict(changed)
    assert first.startswith(
        "artifact rate: PER is better than steering in 2 of 4 pipelines (saeuron 9.0 against 30.5,"
    )
    assert "steering is better in: gsae 11.0 against 1.0; no difference: sdxl 12.0 against 12.0" in first
    assert "in 4 of 4" in second


def test_an_interval_that_is_cut_at_100_keeps_its_longer_half():
    row = sample.row("per", 99, 50, 50, 5, 1.0)
    assert row["UA"]["high"] == 100.0
    assert tables.main_table({"kinds": {"k": {"rows": [row]}}}).rows[0][3] == "99.0 ± 3.0"


def test_the_csv_has_every_part_and_every_figure(values):
    rows = read(values)
    parts = {row["part"] for row in rows}
    assert parts == {
        *("main", "sweep", "padding", "sources", "avoid", "together", "per concept", "ratio", "activations")
    }
    one = [
        r for r in rows if (r["kind"], r["part"], r["method"], r["metric"]) == ("gsae", "main", "per", "UA")
    ]
    assert one == [
        {
            **{"kind": "gsae", "part": "main", "method": "per", "metric": "UA", "pictures": "780"},
            **{"settings": "padding=1;source=nearest", "mean": "91", "low": "88", "high": "94", "seeds": "3"},
        }
    ]
    chosen = {r["settings"] for r in rows if r["part"] == "sweep" and "chosen=True" in r["settings"]}
    assert chosen == {"strength=-5;chosen=True"}
    concept = next(r for r in rows if r["part"] == "per concept" and r["settings"] == "concept=Cats")
    assert (concept["metric"], concept["mean"]) == (
        "UA",
        f"{values['kinds']['saeuron']['per concept']['steering']['Cats']['UA']}",
    )
    assert not [r for r in rows if r["metric"] == "CLIP"]  # null: no line


def test_the_csv_is_the_same_whenever_and_wherever_it_was_measured(values):
    changed = copy.deepcopy(values)
    changed["about"] = {"date": "another", "device": {"name": "cuda"}}
    del changed["cost"]
    assert tables.csv_text(changed) == tables.csv_text(values)
    changed["kinds"]["saeuron"]["rows"][0]["UA"]["mean"] += 1e-9  # another order of the same sum
    assert tables.csv_text(changed) == tables.csv_text(values)


def test_the_csv_quotes_names():
    kind = {"per concept": {"per": {'A "big", red': {"UA": 1.0, "AR": None}}}}
    (row,) = read({"kinds": {"k,1": kind}})
    assert (row["kind"], row["settings"], row["mean"]) == ("k,1", 'concept=A "big", red', "1")


def test_the_published_table_shows_the_printed_figures_and_marks_the_corrected_ones():
    rows = tables.published_table().rows
    assert rows[3] == ["saemnesia", "PER", "91.37", "91.92", "97.97", "93.75 [*]", "15.5", "91.44"]
    assert rows[7] == ["sdxl", "PER", "94.31", "53.41 [*]", "-", "73.86", "8.0", "79.90"]
    assert sum("[*]" in text for row in rows for text in row) == 2
    assert len(tables.published_attack_table().rows) == 4
    assert len(tables.published_methods_table().rows) == len(published.METHODS)


def test_the_grid_has_a_row_a_concept_and_keeps_the_columns_apart(tmp_path):
    sample.pictures(tmp_path)
    colours = {"base": "red", "mask": "lime", "steering": "blue", "per": "white"}
    rows = [{"concept": "Cats", "style": None, "seed": 1}, {"concept": "X" * 60, "style": "S", "seed": None}]
    for part, colour in colours.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{part}.png")
        for row in rows:
            row[part] = f"{part}.png"
    rows[1]["per"] = "gone.png"
    whole = grid.compose(rows, tmp_path)
    assert whole.size == grid.size(2)
    middle = grid.GAP + grid.CAPTION + 64
    across = [grid.LABEL + 64 + column * (128 + grid.GAP) for column in range(4)]
    expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours.values()]
    assert [whole.getpixel((x, middle)) for x in across] == expected
    below = middle + 128 + grid.GAP + 30
    assert [whole.getpixel((x, below)) for x in across[:3]] == expected[:3]
    assert whole.getpixel((across[3], below)) == (228, 229, 231)


def test_the_grid_has_a_column_for_every_method_with_a_picture_and_names_what_stands_beside(tmp_path):
    for part in ("base", "uce"):
        Image.new("RGB", (8, 8), {"base": "red", "uce": "blue"}[part]).save(tmp_path / f"{part}.png")
    rows = [
        {
            "concept": "Cats",
            "beside": "Sea_Lions",
            "style": "S",
            "seed": 1,
            "base": "base.png",
            "uce": "uce.png",
        }
    ]
    assert list(grid.columns_of(rows)) == ["base", "mask", "uce", "steering", "per"]
    whole = grid.compose(rows, tmp_path)
    assert whole.size == grid.size(1, 5)
    middle = grid.GAP + grid.CAPTION + 64
    colours = [whole.getpixel((grid.LABEL + 64 + n * (128 + grid.GAP), middle)) for n in (0, 2)]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    alone = grid.compose([rows[0] | {"beside": None}], tmp_path)
    label = (0, grid.CAPTION, grid.LABEL, grid.CAPTION + 128)
    assert whole.crop(label).tobytes() != alone.crop(label).tobytes()


def test_a_damaged_picture_is_refused_before_anything_is_written(tmp_path, values):
    sample.pictures(tmp_path)
    (tmp_path / "pictures/per.png").write_bytes(b"no picture")
    only = {"about": {}, "kinds": {"k": {"grid": values["kinds"]["saeuron"]["grid"][:1]}}}
    with pytest.raises(ValueError, match="per.png: not a readable picture"):
        write(only, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


def test_the_folder_holds_what_is_returned(tmp_path, values):
    sample.pictures(tmp_path)
    small = {**values, "kinds": {"gsae": values["kinds"]["gsae"]}}
    files = write(small, tmp_path)
    assert {"values", "table", "report", "sweep", "tradeoff", "ratio", "grid gsae"} <= files.keys()
    assert files["grid gsae"] == tmp_path / "plots/grid-gsae.png" and files["sweep"].suffix == ".svg"
    assert read_values(tmp_path) == small
    lasting, times = (json.loads(files[name].read_text()) for name in ("values", "times"))
    assert times == {"date": small["about"]["date"], "cost": small["cost"]}
    assert lasting["kinds"] == small["kinds"] and set(lasting) == {"about", "kinds"}
    assert files["table"].read_text() == tables.csv_text(small)
    before = {name: path.read_bytes() for name, path in files.items()}
    assert {name: path.read_bytes() for name, path in write(small, tmp_path).items()} == before


def test_what_differs_from_run_to_run_is_in_a_file_of_its_own_and_in_the_report(tmp_path, values):
    """Of the same figures, measured at two times."""
    sample.pictures(tmp_path)
    first = {"about": values["about"], "kinds": {"gsae": values["kinds"]["gsae"]}, "cost": values["cost"]}
    again = copy.deepcopy(first)
    again["about"] |= {"date": "2030-01-01T00:00:00Z", "load_average_before": 9.5}
    again["cost"]["gsae"]["per"] = 7.75
    found = [{n: p.read_bytes() for n, p in write(each, tmp_path).items()} for each in (first, again)]
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"times", "report"}
    assert b"7.75" in found[1]["report"] and b"2030-01-01" in found[1]["report"]
    assert read_values(tmp_path) == again


def test_figures_of_a_folder_without_times_are_read_as_they_were_written(tmp_path, values):
    (tmp_path / "values.json").write_text(json.dumps(values))
    assert read_values(tmp_path) == values


def test_a_relative_folder_is_written_like_any_other(tmp_path, values, monkeypatch):
    sample.pictures(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    small = {"about": values["about"], "kinds": {"gsae": values["kinds"]["gsae"]}}
    pages = [write(small, folder)["report"].read_bytes() for folder in (Path("out"), tmp_path / "out")]
    assert pages[0] == pages[1] and b"not drawn" not in pages[0]


def test_a_figure_that_is_not_a_number_is_refused(tmp_path):
    broken = sample.bare()
    broken["kinds"]["saeuron"]["rows"][0]["UA"]["mean"] = float("nan")
    with pytest.raises(ValueError):
        write(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys; from lbdt.evaluation.report import tables, plots, write; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
