"""`lbdt evaluate` as a user meets it: what is refused, what is printed, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lbdt import cli
from lbdt.evaluation import request
from lbdt.evaluation.report.write import read_values
from lbdt.evaluation.request import QUICK, SAMPLED, EvaluationRequest, EvaluationSubject
from tests import toy


def lbdt(*arguments: str):
    return CliRunner().invoke(cli.app, ["evaluate", "--device", "cpu", "--processes", "1", *arguments])


@pytest.fixture(autouse=True)
def threads():
    """The command sets torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    toy.pipeline(folder / "tokenizer").save_pretrained(folder / "model")
    toy.eraser(padding=1, source="random").save_pretrained(folder / "eraser", decoder=True)
    rows = [
        {"prompt": "a cat", "concept": "Cats", "style": "ink", "seed": 7},
        {"prompt": "a cat", "concept": "Cats", "seed": 8},
        {"prompt": "a dog in oil", "concept": "Dogs", "style": "oil", "seed": 9},
        {"prompt": "a dog in wax", "concept": "Dogs", "style": "wax", "seed": 9},
    ]
    (folder / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "flux"), "kinds: flux; EmojiCanvas has saeuron, saemnesia, gsae, sdxl, saeparate"),
        (("--concept", "Dragons"), "concepts: Dragons; EmojiCanvas knows Architectures, Bears"),
        (
            ("--seeds", "5,6", "--sweep-seeds", "6"),
            "other than those of the sweep; got [5, 6], and [6] of the sweep",
        ),
        (("--seed", "700000"), "other than those of the sweep"),
        (("--seeds", "5,5"), "each once"),
        (("--world", "rows.jsonl"), "--world rows.jsonl: expected --model and --eraser with it"),
        (("--world", "unlearncanvas"), "--world unlearncanvas: expected --model and --eraser with it"),
        (("--world", "x.jsonl", "--model", "m", "--eraser", "e"), "x.jsonl"),
        (("--device", "cuda:77"), "--device cuda:77: not usable here"),
        (("--steering", "sdxl=folder"), "expected --eraser with them"),
        (("--strengths", "sdxl=-1"), "expected --eraser with them"),
        (("--task", "style"), "expected --world unlearncanvas with them, got --world canvas"),
        (("--noise", "prompt"), "expected --world unlearncanvas with them"),
        (("--judged", "png"), "expected --world unlearncanvas with them"),
        (("--cra", "all"), "expected --world unlearncanvas with them"),
        (("--compared", "others"), "expected --world unlearncanvas with them"),
        (
            ("--world", "unlearncanvas", "--model", "m", "--eraser", "e", "--cra", "all"),
            "cra: expected one of named",
        ),
        (("--object-classifier", "f.pth"), "expected --world unlearncanvas with them"),
        (("--eraser", "/nowhere"), "/nowhere"),
    ],
    ids=[
        *("kind", "concept", "swept-seed", "default-swept-seed", "seed-twice", "file-without-model"),
        *("unlearncanvas-without-model", "no-file", "device", "steering-alone", "strengths-alone", "task"),
        *("noise", "judged", "cra", "compared", "cra-of-objects"),
        *("classifier", "eraser"),
    ],
)
def test_a_refusal_is_one_line_exit_code_1_and_leaves_nothing(tmp_path, arguments, message):
    failed = lbdt("--out", str(tmp_path / "out"), "--json", *arguments)
    assert failed.exit_code == 1 and failed.stdout == ""
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("lbdt: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "1", "--seeds", "1,2"), "give --seed or --seeds, not both"),
        (("--seeds", "1,two"), "expected numbers such as 1,2"),
        (("--seeds", "-5"), "from 0 to 2^63 - 1; got '-5'"),
        (("--seeds", str(2**63)), "from 0 to 2^63 - 1; got"),
        (("--seeds", ","), "expected numbers such as 1,2"),
        (("--seed", "-5"), "Invalid value for '--seed'"),
        (("--sweep-seeds", "1,-1"), "from 0 to 2^63 - 1; got '1,-1'"),
        (("--strengths", "a=x"), "expected finite numbers such as -1,-2.5"),
        (("--strengths", "a=-1,nan"), "expected finite numbers such as -1,-2.5"),
        (("--strengths", "a=-1e999"), "expected finite numbers such as -1,-2.5"),
        (("--strengths", "a="), "expected NAME=VALUE"),
        (("--guidance", "nan"), "Invalid value for '--guidance'"),
        (("--eraser", "a=1", "--eraser", "a=2"), "each name once"),
        (("--eraser", "=folder"), "expected NAME=VALUE"),
        (("--nudity", "mine"), "'saemnesia', 'mu-attack'"),
        (("--processes", "0"), "Invalid value for '--processes'"),
        (("--own", "0"), "Invalid value for '--own'"),
    ],
    ids=[
        *("seed-and-seeds", "seeds", "negative-seeds", "large-seeds", "no-seeds", "negative-seed"),
        *("negative-sweep-seed", "strengths", "nan-strength", "infinite-strength", "no-strength"),
        *("nan-guidance", "name-twice", "no-name", "nudity", "processes", "own"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message):
    failed = lbdt(*arguments)
    assert failed.exit_code == 2 and failed.stdout == ""
    assert message in " ".join(failed.stderr.replace("│", " ").split())


def contents(folder):
    """All files but those that show when and how quickly they were made."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name not in ("times.json", "report.html")}


def test_a_users_prompts_eraser_and_steering_and_only_json_on_stdout(folder, tmp_path, monkeypatch):
    """Its grid has gaps, its eraser knows more concepts, and its pipeline nothing judges."""
    command = [
        *("--world", str(folder / "my rows.jsonl"), "--model", str(folder / "model")),
        *("--eraser", f"mine={folder / 'eraser'}", "--steering", f"mine={folder / 'eraser'}"),
        *("--strengths", "mine=-1,-2", "--steps", "2", "--batch", "3", "--own", "1", "--others", "1"),
        *(
            "--quick",
            "--seed",
            "0",
            "--out",
            str(tmp_path / "out"),
            "--device",
            "cpu",
            "--processes",
            "1",
            "--json",
        ),
    ]
    failed = lbdt(*command)
    # Its folder has no steering.json, so without a judge there is no strength to take.
    assert failed.exit_code == 1 and "no strength" in failed.stderr
    steering = command.index("--steering")
    without = [*command[:steering], *command[steering + 4 :]]
    without[without.index("--out") + 1] = str(tmp_path / "other")
    done = subprocess.run(
        [sys.executable, "-m", "lbdt", "evaluate", *without],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    rows = values["kinds"]["mine"]["rows"]
    assert [row["method"] for row in rows] == ["base", "negative", "uce", "per"]
    assert {row["UA"] for row in rows} == {None}
    assert rows[3]["pictures"] >= 2 and rows[3]["replaced"]["mean"] > 0
    assert values["kinds"]["mine"]["rows"][2]["untouched"]["mean"] == 0
    assert "negative prompt of Cats: 'Cats'; UCE of Cats: 1 texts" in values["about"]["by text"]
    assert values["about"]["seeds"] == [0] and values["about"]["quick"] is True
    assert "'" + str(folder / "my rows.jsonl") + "'" in values["about"]["command"], "as one types it"
    assert read_values(tmp_path / "other") == values
    stored = json.loads((tmp_path / "other" / "values.json").read_text())
    assert "cost" not in stored and "date" not in stored["about"] and stored["kinds"] == values["kinds"]
    written = contents(tmp_path / "other")
    for name in ("values.json", "table.csv", "plots/ratio.svg"):
        (tmp_path / "other" / name).unlink()
    monkeypatch.setattr(sys, "argv", ["lbdt", "evaluate", *without])
    again = lbdt(*[word for word in without if word != "--json"])
    assert contents(tmp_path / "other") == written
    assert again.exit_code == 0 and again.stdout.splitlines()[-2].startswith("report ")
    assert str(tmp_path / "other" / "report.html") in again.stdout


def settings(world="canvas", **changes):
    given = dict.fromkeys(("own", "others", "vlm", "nudity"))
    given |= {"kinds": (), "concepts": (), "seeds": (), "sweep_seeds": (), "quick": False, "out": Path("out")}
    return EvaluationRequest(
        **given | {"subject": EvaluationSubject(world), "threads": 1, "device": "cpu"} | changes
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (settings(), SAMPLED),
        (settings(quick=True), QUICK),
        (settings("rows.jsonl", quick=True), QUICK),
        (settings(own=3), request.replace(SAMPLED, own=3)),
        (settings(quick=True, others=5), request.replace(QUICK, others=5)),
    ],
    ids=["canvas", "quick", "quick-prompts", "own", "quick-others"],
)
def test_the_design_of_a_command(given, expected):
    assert given.design() == expected


@pytest.mark.parametrize("world", ["unlearncanvas", "rows.jsonl"])
def test_other_worlds_score_the_whole_grid(world):
    design = settings(world).design()
    assert (design.own, design.others) == (None, None)


def test_steps_of_ones_own_have_no_shipped_artifact_judge():
    world = EvaluationSubject("canvas", steps=3, batch=7).load()
    assert {kind.steps for kind in world.kinds.values()} == {3} and world.batch == 7
    assert world.reference is None and EvaluationSubject("canvas", batch=7).load().reference is not None


def test_a_killed_process_is_told_in_one_line(tmp_path, monkeypatch):
    from torch import multiprocessing

    def killed(*arguments, **settings):
        raise multiprocessing.ProcessExitedException(
            "process 1 terminated with signal SIGKILL", 1, 1, 9, signal_name="SIGKILL"
        )

    monkeypatch.setattr(multiprocessing, "start_processes", killed)
    with pytest.raises(RuntimeError, match="SIGKILL.*too little memory for 2"):
        request.evaluate(settings(out=tmp_path), processes=2, command="")
