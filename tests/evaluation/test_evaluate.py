"""Whole evaluations: on the toy pipeline, and on EmojiCanvas by one and by two processes."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from lbdt.cli.evaluate import _table
from lbdt.evaluation.jobs import Design
from lbdt.evaluation.report.cells import BASE, EXTRA, METHODS, main_row
from lbdt.evaluation.report.tables import csv_text, main_table
from lbdt.evaluation.request import EvaluationRequest, EvaluationSubject, evaluate
from lbdt.evaluation.values import NO_GUIDANCE, kind_values, measured_cost
from lbdt.evaluation.worlds.canvas_judges import unedited_features
from lbdt.runs.processes import Processes
from tests import toy
from tests.evaluation import small
from tests.repeats import MISALIGNED, repeats

PROTOCOL = ("UA", "IRA", "CRA", "AR", "AR others", "GA", "FD", "CLIP", "replaced")
METRICS = (*PROTOCOL, *EXTRA)
TINY = Design(
    own=2,
    others=2,
    pairs=1,
    empty=1,
    sweep_own=1,
    sweep_others=1,
    ablation_own=1,
    ablation_others=2,
    counts=(1, 2),
)


@pytest.fixture(autouse=True)
def threads():
    """The command sets torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


def evaluated(pipe, folder, judge="judge", design=TINY, kinds=None, **changes):
    """Evaluation, strengths, values of the kind "toy"."""
    judge = small.Judge() if judge == "judge" else judge
    kinds = kinds or {"toy": small.kind(strengths=(-1.0, -4.0))}
    world = small.world(judge=judge, pipeline=lambda device: pipe, kinds=kinds)
    found = small.evaluation(folder, world, design=design, **changes)
    strengths = found.run()
    return found, strengths, kind_values(found, "toy", strengths["toy"])


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *evaluated(pipe, folder)


def check_estimate(value, seeds):
    assert value is None or set(value) == {"mean", "low", "high", "seeds"}
    if value is not None:
        assert math.isfinite(value["mean"]) and value["seeds"] == seeds
        assert (value["low"] is None) == (seeds == 1)


def check_row(row, seeds, method=None):
    metrics = (*PROTOCOL, *(BASE.values() if row["method"] == "base" else EXTRA))
    assert set(metrics) | {"method", "settings", "pictures"} <= set(row) and row["pictures"] > 0
    assert method is None or row["method"] == method
    for metric in metrics:
        check_estimate(row[metric], seeds)


def test_values_have_every_part(whole):
    _, _, strengths, values = whole
    assert set(values) == {
        *(
            "sampling",
            "rows",
            "sweep",
            "padding",
            "sources",
            "avoid",
            "together",
            "per concept",
            "AR per style",
            "ratio",
            "activations",
        ),
        "grid",
    }
    json.dumps(values, allow_nan=False)
    assert values["sampling"] == {"steps": 2, "guidance": 1.0}
    base, negative, *edited = values["rows"]
    assert negative == {"method": "negative", "settings": {}, "note": NO_GUIDANCE}
    for row, method in zip((base, *edited), ("base", "uce", "steering", "by class", "per"), strict=True):
        check_row(row, 2, method)
    assert edited[1]["settings"] == {"strength": strengths["toy"]}
    assert set(edited[2]["classes"]) == set(toy.CONCEPTS) and edited[2]["settings"] == {}
    assert edited[3]["settings"] == {"padding": 1, "source": "random"}
    for row in values["sweep"]:
        check_row(row, 1)
    assert [row["chosen"] for row in values["sweep"]].count(True) == 1
    assert [row["method"] for row in values["sweep"]] == ["steering", "steering", "per"]
    for row in (*values["padding"], *values["sources"], *values["avoid"]):
        check_row(row, 1, "per")
    assert [row["settings"]["padding"] for row in values["padding"]] == [0, 1, 2, 3]
    assert [row["settings"]["source"] for row in values["sources"]] == ["random", "nearest", "mean", "row"]
    assert [row["settings"]["avoid"] for row in values["avoid"]] == ["known"]
    found = [(row["method"], row["order"], row["erased"]) for row in values["together"]]
    assert found == [
        ("steering", "at once", ["Dogs"]),
        ("steering", "at once", ["Dogs", "Cats"]),
        ("per", "at once", ["Dogs"]),
        ("per", "at once", ["Dogs", "Cats"]),
        ("steering", "one after another", ["Dogs", "Cats"]),
        ("per", "one after another", ["Dogs", "Cats"]),
    ]
    for row in values["together"]:
        for metric in ("UA", "RA", "CRA"):
            check_estimate(row[metric], 1)
    for method in ("uce", "steering", "by class", "per"):
        assert set(values["per concept"][method]) == set(toy.CONCEPTS)
        assert {"UA", "IRA", "CRA", "AR"} == set(values["per concept"][method]["Cats"])
        assert set(values["AR per style"][method]) == {*small.STYLES, "none"}
        assert f"toy,per style,{method},style=none,,AR," in csv_text({"kinds": {"toy": values}})
    assert [row["method"] for row in values["activations"]] == ["base", "steering", "steering", "per"]


def test_what_is_measured_of_the_toy_pipeline_is_what_its_judge_says(whole):
    """Read from the folder by hand: UA of PER."""
    from PIL import Image

    _, found, _, values = whole
    series = found.plans["toy"].scored(None)[-1]
    files = found.files(series)
    by_seed = []
    row = main_row(values, "per")
    for seed in (1, 2):
        by_concept = {name: [] for name in toy.CONCEPTS}
        for index, batch in enumerate(series.batches(files.size)):
            for job, name in zip(batch, files.names(index), strict=True):
                if job in found.plans["toy"].scored_jobs[seed] and job.own:
                    with Image.open(files.folder / name) as picture:
                        seen = small.Judge()([picture.convert("RGB")]).objects[0].tolist()
                    by_concept[job.prompt.concept].append(not seen[toy.CONCEPTS.index(job.prompt.concept)])
        assert {len(missed) for missed in by_concept.values()} == {2}
        by_seed.append(sum(100 * sum(missed) / 2 for missed in by_concept.values()) / 3)
    assert row["UA"]["mean"] == pytest.approx(sum(by_seed) / 2)


def test_shares_of_patches_by_timestep_grow_with_the_padding(whole):
    _, _, _, values = whole
    assert list(values["ratio"]) == ["0", "1", "2", "3"]
    for steps in values["ratio"].values():
        assert [step["timestep"] for step in steps] == sorted({s["timestep"] for s in steps}, reverse=True)
        assert len(steps) == 2 and all(0 <= s["detected"] <= 1 and 0 <= s["replaced"] <= 1 for s in steps)
    first = values["ratio"]["0"]
    assert all(0 < step["detected"] == step["replaced"] < 1 for step in first)


def test_the_grid_names_pictures_that_are_there_of_different_concepts(whole):
    folder, _, _, values = whole
    assert [row["concept"] for row in values["grid"]] == [*toy.CONCEPTS, *toy.CONCEPTS[:2]]
    assert [row["beside"] for row in values["grid"][:3]] == [None] * 3
    assert all(row["beside"] not in (None, row["concept"]) for row in values["grid"][3:])
    for row in values["grid"]:
        for name in ("base", "uce", "steering", "per", "mask"):
            assert (folder / row[name]).is_file() and str(row["seed"]) in row[name]


def test_the_strength_is_the_best_of_the_sweep(whole):
    _, found, strengths, values = whole
    means = {}
    for row in values["sweep"][:2]:
        means[row["settings"]["strength"]] = sum(row[name]["mean"] for name in ("UA", "IRA", "CRA")) / 3
    best = max(means.values())
    assert strengths == {"toy": max(s for s, mean in means.items() if mean == best)}
    assert found.strength("toy") == strengths["toy"]


def test_again_in_the_same_folder_nothing_is_made_or_judged_and_the_table_is_the_same(whole, pipe, capfd):
    folder, _, _, values = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if "masks" not in str(path)}
    judge = small.Judge()
    _, _, again = evaluated(pipe, folder, judge, progress=True)
    assert capfd.readouterr().err == "", "no progress"
    assert judge.calls == 0 and repeats(again, values)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if "masks" not in str(path)}
    assert after == before
    tables = [csv_text({"about": {}, "kinds": {"toy": each}}) for each in (values, again)]
    assert repeats(tables[0], tables[1]) and len(tables[0].splitlines()) > 100


def test_without_a_judge_nothing_is_classified_and_the_baseline_is_as_it_comes(pipe, tmp_path):
    found, strengths, values = evaluated(pipe, tmp_path, None, seeds=(1,))
    assert strengths == {"toy": None} and main_row(values, "steering")["settings"] == {}
    for row in (*values["rows"], *values["sweep"], *values["padding"]):
        if "note" not in row:
            expected = {"replaced"} if row["method"] == "base" else {"replaced", "untouched"}
            assert {name for name in METRICS if row.get(name) is not None} == expected
    assert main_row(values, "per")["replaced"]["mean"] > 0
    assert {row[name] for row in values["together"] for name in ("UA", "RA", "CRA")} == {None}
    assert not any(row["chosen"] for row in values["sweep"])
    about = found.about()
    assert (about["judge"], about["features"], about["artifacts"]) == (None, None, None)
    assert csv_text({"about": {}, "kinds": {"toy": values}})


def test_without_a_reference_the_artifact_judge_is_fitted_on_the_base(whole):
    _, found, _, values = whole
    assert (
        found.world.reference is None
        and "the unedited pictures of the same prompts" in found.about()["artifacts"]
    )
    assert values["rows"][0]["AR"]["mean"] <= 50 and main_row(values, "per")["AR"] is not None
    judge = found._fitted("toy")
    assert judge.mean.shape == (12,)


def test_too_few_unedited_pictures_make_no_artifact_judge(pipe, tmp_path):
    design = Design(
        own=1, others=1, pairs=1, empty=1, sweep_own=1, ablation_own=1, ablation_others=0, counts=()
    )
    _, _, values = evaluated(pipe, tmp_path, design=design, seeds=(1,), concepts=("Cats",))
    assert {row.get("AR") for row in values["rows"]} == {None} and values["together"] == []
    assert {row["IRA"] for row in values["padding"]} == {None}


def test_only_the_asked_concepts_are_erased_each_once(pipe, tmp_path):
    found, _, values = evaluated(pipe, tmp_path, seeds=(1,), concepts=("Trees", "Cats", "Trees"))
    assert set(values["per concept"]["per"]) == {"Trees", "Cats"}
    assert [row["erased"] for row in values["together"] if row["method"] == "per"] == [
        ["Cats"],
        ["Cats", "Trees"],
        ["Cats", "Trees"],
    ]
    assert found.about()["design"].startswith("each of 2 concepts erased")
    assert [(row["concept"], row["beside"] is None) for row in values["grid"]] == [
        *(("Trees", True), ("Cats", True)),
        *(("Trees", False), ("Cats", False)),
    ]


def test_a_baseline_that_has_no_strength_of_its_own_is_swept(pipe, tmp_path):
    def given(*, strength):
        return small.steering(strength)

    kinds = {"toy": small.kind(steering=given, strengths=(-2.0,))}
    _, strengths, values = evaluated(pipe, tmp_path, kinds=kinds, seeds=(1,))
    assert strengths == {"toy": -2.0} and main_row(values, "steering")["settings"] == {"strength": -2.0}


def test_without_sweep_seeds_or_a_baseline(pipe, tmp_path):
    kinds = {"toy": small.kind(steering=None)}
    _, strengths, values = evaluated(pipe, tmp_path, kinds=kinds, seeds=(1,), sweep_seeds=())
    assert strengths == {"toy": None} and (values["sweep"], values["activations"]) == ([], [])
    assert [row["method"] for row in values["rows"]] == ["base", "negative", "uce", "per"]
    assert set(values["per concept"]) == {"uce", "per"}


def test_with_guidance_and_a_gate_every_method_has_a_row_of_the_same_pictures(pipe, tmp_path):
    kinds = {"toy": small.kind(guidance=3.0, per=small.gated, strengths=(-1.0, -4.0))}
    found, _, values = evaluated(pipe, tmp_path, kinds=kinds, seeds=(1,))
    assert [row["method"] for row in values["rows"]] == list(METHODS)
    assert len({row["pictures"] for row in values["rows"][1:]}) == 1
    for row in values["rows"]:
        check_row(row, 1)
    rows = {row["method"]: row for row in values["rows"]}
    assert rows["ungated"]["settings"] == {"padding": 1, "source": "random", "min_patches": 1}
    assert rows["negative"]["untouched"]["mean"] == rows["uce"]["untouched"]["mean"] == 0
    assert rows["per"]["untouched"]["mean"] == 100 > rows["ungated"]["untouched"]["mean"]
    shown = [row[1] for row in main_table({"kinds": {"toy": values}}).rows]
    assert shown[1:3] == ["negative prompt", "UCE"] and shown[5].startswith("PER without the gate (padding 1")
    about = found.about()
    assert "every eraser has one" in about["gate"] and "negative prompt of Cats: 'Cats'" in about["by text"]


def test_kinds_of_one_sampling_share_what_has_no_sae(pipe, tmp_path):
    kinds = {name: small.kind(name, guidance=3.0) for name in ("toy", "other")}
    found, _, _ = evaluated(pipe, tmp_path, kinds=kinds, seeds=(1,), sweep_seeds=(), concepts=("Cats",))
    folders = {folder.name for folder in tmp_path.iterdir()}
    assert folders >= {"base-2-3.0", "negative-2-3.0", "uce-2-3.0", "toy", "other"}
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {
        "scored",
        "ablation",
        "together-1-at-once",
    }
    assert "toy, other: the eraser has none" in found.about()["gate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("mine",)}, "kinds: mine; small has toy"),
        ({"kinds": ()}, "kinds: none given"),
        ({"concepts": ("Cats", "Bears")}, "concepts: Bears; small knows Cats, Dogs, Trees"),
        ({"concepts": ()}, "concepts: none given"),
        ({"seeds": (1, 9)}, r"other than those of the sweep; got \[1, 9\], and \[9\]"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": ()}, "expected some"),
    ],
    ids=["kind", "no-kind", "concept", "no-concept", "swept-seed", "seed-twice", "no-seed"],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small.evaluation(tmp_path, small.world(tmp_path), **changes)
    assert not any(tmp_path.iterdir())


def test_an_eraser_that_does_not_know_a_concept_is_refused(tmp_path):
    world = small.world(tmp_path, objects=(*toy.CONCEPTS, "Bears"))
    with pytest.raises(ValueError, match="kind toy: its eraser does not know Bears"):
        small.evaluation(tmp_path, world)


def test_features_of_unedited_pictures_are_made_once(pipe, tmp_path):
    judge = small.Judge()
    world = small.world(judge=judge, pipeline=lambda device: pipe)
    prompts = [prompt for seed in (4, 5) for prompt in world.prompts(seed)]
    first, again = (
        unedited_features(world, "toy", prompts, tmp_path, small.CPU, judge, Processes()) for _ in range(2)
    )
    assert first.shape == (18, 12) and (first == again).all() and judge.pictures == 18


def test_the_cost_is_of_every_method(whole):
    _, found, strengths, _ = whole
    cost = measured_cost(found, "toy", strengths["toy"], rounds=1, pictures=2)
    assert cost.pop("unit") == "seconds a picture" and set(cost) == {
        *("base", "uce", "steering", "by class", "per")
    }
    assert all(value > 0 for value in cost.values())


def canvas(folder, **changes):
    settings = {
        "subject": EvaluationSubject("canvas"),
        "kinds": ("sdxl",),
        "concepts": ("Cats", "Towers"),
        "seeds": (500,),
        "sweep_seeds": (),
        "quick": True,
        "own": 1,
        "others": 2,
        "out": folder,
        "threads": 1,
        "device": "cpu",
        "vlm": None,
        "nudity": None,
    }
    return EvaluationRequest(**settings | changes)


def test_emojicanvas_by_two_processes_is_that_by_one(tmp_path, capfd):
    folders = [tmp_path / name for name in ("two", "one")]
    values = [
        evaluate(canvas(folder), processes=count, command="lbdt evaluate")
        for folder, count in zip(folders, (2, 1), strict=True)
    ]
    lines = _table(values[0], folders[0])
    assert any(str(folders[0] / "table.csv") in line for line in lines)
    assert "picture" in capfd.readouterr().err
    tables = [(folder / "table.csv").read_bytes() for folder in folders]
    if MISALIGNED:  # a Frechet distance is a small difference of large sums
        tables = [
            b"".join(line for line in table.splitlines(True) if b",FD," not in line) for table in tables
        ]
    assert repeats(tables[0], tables[1])
    for each, processes in zip(values, (2, 1), strict=True):
        assert set(each) == {"about", "kinds", "cost"} and each["about"]["processes"] == processes
        named = {"world", "seeds", "sweep seeds", "judge", "features", "artifacts", "design", "quick"}
        assert named | {"command"} <= set(each["about"])
        assert {"base", "uce", "steering", "per", "unit"} <= set(each["cost"]["sdxl"])
    rows = [each["kinds"]["sdxl"]["rows"] for each in values]
    dropped = {"FD"} if MISALIGNED else set()
    compared = [[{k: v for k, v in row.items() if k not in dropped} for row in part] for part in rows]
    # Beside the rows are histograms, and what lies on the edge of a bin may be counted in the next.
    assert repeats(*compared) and (MISALIGNED or values[0]["kinds"] == values[1]["kinds"])
    assert values[0]["kinds"] == json.loads((folders[0] / "values.json").read_text())["kinds"]
    rows = {row["method"]: row for row in rows[0]}
    assert rows.pop("negative")["note"] == NO_GUIDANCE
    for method, row in rows.items():
        check_row(row, 1, method)
    assert rows["base"]["UA"]["mean"] == 0 and rows["per"]["UA"]["mean"] >= 50
    assert rows["per"]["AR"]["mean"] is not None and "other unedited" in values[0]["about"]["artifacts"]
    assert {row["kind"] for row in csv.DictReader(tables[0].decode().splitlines())} == {"sdxl"}
    assert (folders[0] / "report.html").stat().st_size > 10_000
