"""`lbdt attack` on a tiny pipeline saved to a folder, and on EmojiCanvas's prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lbdt import cli
from lbdt.attack.pairs import AttackRequest, _prompt
from tests import toy
from tests.repeats import repeats

ROOT = Path(__file__).resolve().parents[2]
PLAN = dict.fromkeys(("model", "eraser", "strength", "judge", "iterations", "timesteps"))
PLAN |= {
    "kind": "saeuron",
    "steer": False,
    "concepts": (),
    "styles": (),
    "tokens": 5,
    "check_every": 1,
    "search": "gradient",
}
PLAN |= {"quick": False, "steps": None, "guidance": None}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    toy.pipeline(root / "tokenizer").save_pretrained(root / "pipe")
    # The published prompt is too long for the toy's 16 tokens of one letter each.
    toy_prompt = root / "pipe" / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(toy_prompt.read_text())
    toy_prompt.write_text(json.dumps(settings | {"model_max_length": 40}))
    longer(root)
    toy.eraser(k=8).save_pretrained(root / "eraser", decoder=True)
    return ["--model", str(root / "pipe"), "--eraser", str(root / "eraser"), "--device", "cpu"]


def longer(root: Path) -> None:
    """Gives the saved text encoder 40 positions."""
    import torch
    from transformers import CLIPTextModel

    folder = root / "pipe" / "text_encoder"
    old = CLIPTextModel.from_pretrained(folder)
    old.config.max_position_embeddings = 40
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        CLIPTextModel(old.config).save_pretrained(folder)


def arguments(inputs, *more, judge="tests.attack.judges:drawing_lots"):
    search = ["--tokens", "2", "--iterations", "2", "--timesteps", "3", "--steps", "2", "--judge", judge]
    pairs = ["--concept", "Cats", "--concept", "Dogs", "--style", "A_B", "--style", "C"]
    return ["attack", *inputs, *search, *pairs, *more]


def lbdt(*given):
    return CliRunner().invoke(cli.app, list(given))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def values_of(done):
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_table_counts_the_pairs_that_ran(inputs, tmp_path):
    done = lbdt(*arguments(inputs, "--out", str(tmp_path / "a")))
    assert done.exit_code == 0, done.output
    values = values_of(lbdt(*arguments(inputs, "--out", str(tmp_path / "a"), "--json")))
    assert values["resumed"] == 4 and values["seconds_per_pair"] is None
    pairs = values["pairs"]
    texts = [pair["prompt"] for pair in pairs]
    assert texts[:2] == ["An image of Cats in A B style.", "An image of Cats in C style."] and len(pairs) == 4
    before = 25 * sum(pair["seen_before"] != pair["concept"] for pair in pairs)
    after = 25 * sum(pair["seen_after"] != pair["concept"] for pair in pairs)
    summary = values["summary"]
    assert (summary["before"], summary["after"], summary["effectiveness"]) == (before, after, before - after)
    assert set(values["concepts"]) == {"Cats", "Dogs"} and values["concepts"]["Cats"]["pairs"] == 2
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["all", "4", f"{before:.2f}", f"{after:.2f}", f"{before - after:.2f}"] in rows
    assert "published on UnlearnCanvas (another world" in done.stdout and "28.30  56.30" in done.stdout
    tried = [pair for pair in pairs if pair["prefix"]]
    kept = sum(pair["typable"] for pair in tried)
    assert f"typed, {kept} of the {len(tried)} attacked prompts" in done.stdout and tried
    assert "judged by what can be typed" in done.stdout and " *" not in done.stdout
    assert "attack:" in done.stderr and "there already" not in done.stdout


@pytest.mark.parametrize("method", ["per", "steering"])
def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(inputs, method):
    more = ("--method", method, *(["--strength", "-2"] if method == "steering" else []))
    first, again, other = (
        values_of(lbdt(*arguments(inputs, *more, "--json", "--seed", seed))) for seed in ("0", "0", "1")
    )
    assert repeats(first["pairs"], again["pairs"]) and first["summary"] == again["summary"]
    assert {p["seed"] for p in first["pairs"]}.isdisjoint({p["seed"] for p in other["pairs"]})
    assert first["method"] == method and any(pair["timesteps"] for pair in first["pairs"])


def test_a_killed_run_goes_on_where_it_was(inputs, tmp_path):
    whole = arguments(inputs, "--out", str(tmp_path / "whole"), "--json")
    expected = values_of(lbdt(*whole))
    files = contents(tmp_path / "whole")
    lost = sorted((tmp_path / "whole" / "pairs").iterdir())[1]
    lost.unlink()
    (tmp_path / "whole" / "pairs" / ".lbdt-half-written").write_text("{")
    again = values_of(lbdt(*whole))
    assert again["resumed"] == 3 and repeats(again["pairs"], expected["pairs"])
    assert repeats(contents(tmp_path / "whole"), files)


def test_two_processes_write_the_same_files(inputs, tmp_path):
    expected = values_of(lbdt(*arguments(inputs, "--out", str(tmp_path / "one"), "--json")))
    given = arguments(inputs, "--out", str(tmp_path / "two"), "--json")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lbdt", *given],
            env=os.environ | {"WORLD_SIZE": "2", "RANK": rank, "OMP_NUM_THREADS": "2"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=250) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert repeats(contents(tmp_path / "two"), contents(tmp_path / "one"))
    values = json.loads(outputs[0][0])
    assert repeats(values["pairs"], expected["pairs"]) and values["processes"] == 2 and outputs[1][0] == ""


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--concept", "cat"), 1, "did you mean 'Cats'"),
        (("--tokens", "40"), 1, "are more than the text encoder's 40"),
        (("--classifier", "style50.pth"), 2, "are of --world unlearncanvas"),
        (("--task", "style"), 2, "are of --world unlearncanvas"),
        (("--world", "unlearncanvas"), 2, "give --model, --eraser and"),
        (("--timesteps", "2000"), 1, "timesteps: expected 1 to 1000"),
        (("--judge", "tests.attack.judges:nobody"), 1, "--judge tests.attack.judges:nobody: not found"),
        (("--judge", "tests.attack.judges:NOT_CALLABLE"), 1, "expected a function, got int"),
        (("--eraser", "/nowhere"), 1, "/nowhere: no such folder"),
        (("--strength", "-1"), 2, "PER has no strength"),
        (("--strength", "nan", "--method", "steering"), 2, "Invalid value for '--strength'"),
        (("--guidance", "nan"), 2, "Invalid value for '--guidance'"),
        (("--seed", "-1"), 2, "Invalid value for '--seed'"),
        (("--seed", str(2**64)), 2, "Invalid value for '--seed'"),
        (("--style", "\udcff"), 1, "lone surrogate"),
        (("--out", "/dev/null"), 1, "--out /dev/null: is a file; give a folder"),
    ],
    ids=lambda value: value[0] + value[1][-12:] if isinstance(value, tuple) else "",
)
def test_a_failure_says_what_was_wrong_and_makes_nothing(inputs, tmp_path, more, code, message):
    failed = lbdt(*arguments(inputs, "--out", str(tmp_path / "a"), *more))
    assert failed.exit_code == code and message in " ".join(failed.stderr.split())
    assert not (tmp_path / "a").exists()


def test_a_folder_of_other_settings_is_refused(inputs, tmp_path):
    place = ("--out", str(tmp_path / "a"))
    assert lbdt(*arguments(inputs, *place)).exit_code == 0
    for more in (
        ("--iterations", "1"),
        ("--search", "random"),
        ("--position", "suffix"),
        ("--judged", "ids"),
        ("--seed", "1"),
        ("--method", "steering", "--strength", "-1"),
    ):
        failed = lbdt(*arguments(inputs, *place, *more))
        assert failed.exit_code == 1 and "of a run with other settings" in failed.stderr


def test_the_control_is_named_so(inputs):
    done = lbdt(*arguments(inputs, "--search", "random"))
    assert done.exit_code == 0 and "3 random prefixes" in done.stdout and "iterations" not in done.stdout


@pytest.mark.parametrize(("judged", "star"), [("ids", " *"), ("typed", "")])
def test_ids_that_cannot_be_typed_are_marked_where_they_were_run(inputs, judged, star):
    from lbdt.cli.attack import _table

    values = values_of(lbdt(*arguments(inputs, "--judged", judged, "--json")))
    assert values["attack"]["judged"] == judged
    broken = {"seen_before": "Trees", "seen_after": "Cats", "concept": "Cats", "prefix": [1]}
    pairs = [values["pairs"][0] | broken | {"typable": typable} for typable in (False, True)]
    told = [pair | {"attacked": text} for pair, text in zip(pairs, ("q\u0085x", "a b"), strict=True)]
    lines = _table(values | {"pairs": told})
    assert f"Cats      q\\x85x{star}" in lines and "Cats      a b" in lines
    assert ("* run by token ids" in "".join(lines)) == (judged == "ids")


def test_processes_without_a_folder_are_refused(inputs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "--out: several processes meet by files" in lbdt(*arguments(inputs)).stderr


@pytest.mark.parametrize("missing", ["--eraser", "--judge", "--concept"])
def test_a_pipeline_of_one_s_own_needs_the_rest(missing):
    given = {"--model": "m", "--eraser": "e", "--judge": "a:b", "--concept": "Cats"}
    del given[missing]
    failed = lbdt("attack", *(word for pair in given.items() for word in pair))
    assert failed.exit_code == 2 and "with --model" in " ".join(failed.stderr.split())


def test_the_prompts_of_the_canvas():
    from lbdt.canvas import OBJECTS, STYLES

    every = AttackRequest(**PLAN).prompts(OBJECTS, 3)
    assert len(every) == 120 == len({prompt.seed for prompt in every})
    assert all(prompt.style is not None for prompt in every)
    quick = AttackRequest(**(PLAN | {"quick": True}))
    assert set(quick.prompts(OBJECTS, 3)) < set(every) and len(quick.prompts(OBJECTS, 3)) == 8
    assert quick.settings().iterations == 20 and AttackRequest(**PLAN).settings().iterations == 40
    assert AttackRequest(**(PLAN | {"kind": "sdxl"})).settings().steps == 4
    twice = AttackRequest(**(PLAN | {"concepts": ("Cats", "Cats"), "styles": (STYLES[1],)})).prompts(
        OBJECTS, 3
    )
    assert [prompt.text for prompt in twice] == [f"An image of Cats in {STYLES[1]} style."]
    for change, message in (({"styles": ("Fog",)}, "--style Fog"), ({"concepts": ("Fog",)}, "--concept Fog")):
        with pytest.raises(ValueError, match=message):
            AttackRequest(**(PLAN | change)).prompts(OBJECTS, 3)


def test_a_start_seed_does_not_depend_on_the_other_pairs():
    assert _prompt("Cats", "Pop_Art", 4).text == "An image of Cats in Pop Art style."
    assert _prompt("Cats", None, 4).text == "An image of Cats."
    assert len({_prompt(c, s, n).seed for c in "ab" for s in ("x", None) for n in (0, 1)}) == 8
