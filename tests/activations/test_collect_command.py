"""`lbdt collect` on a tiny pipeline saved to a folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lbdt import cli
from lbdt.activations import Site
from lbdt.activations.stored import Stored
from lbdt.canvas.defaults import canvas_prompts
from lbdt.cli.sampling import parse_seeds, parse_timesteps
from tests import toy
from tests.repeats import repeats


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    toy.pipeline(root / "tokenizer").save_pretrained(root / "pipe")
    rows = ["prompt,concept,style,seed", *(f"a cat,{c},,{i}" for i, c in enumerate(["Cats", "", "Dogs"] * 2))]
    (root / "prompts.csv").write_text("\n".join(rows) + "\n")
    return ["--model", str(root / "pipe"), "--prompts", str(root / "prompts.csv")]


def arguments(inputs, out, *more):
    start = ["collect", "--out", str(out), "--site", toy.HOOKPOINT, "--device", "cpu"]
    return [*start, "--steps", "3", "--prompts-per-shard", "2", *inputs, *more]


def lbdt(inputs, out, *more):
    return CliRunner().invoke(cli.app, arguments(inputs, out, *more))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_table_and_what_was_there(inputs, tmp_path):
    more = ("--site", f"{toy.HOOKPOINT}:update", "--timesteps", "2", "--patches", "5", "--guidance", "4")
    first, again = (lbdt(inputs, tmp_path / "a", *more) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    for word in (f"{toy.HOOKPOINT}:output", f"{toy.HOOKPOINT}:update", "6 at 2 timesteps", "float16"):
        assert word in first.stdout
    assert "there already" not in first.output and "3, 3 of them there already" in again.stdout
    assert "3 shards of 6 prompts" in first.stderr and "1 process" in first.stdout


def test_the_model_s_folder_may_be_spelled_otherwise_when_a_run_goes_on(inputs, tmp_path, monkeypatch):
    assert lbdt(inputs, tmp_path / "a").exit_code == 0
    folder = Path(inputs[1])
    monkeypatch.chdir(folder.parent)
    again = lbdt(["--model", folder.name, *inputs[2:]], tmp_path / "a")
    assert again.exit_code == 0, again.output
    assert "3, 3 of them there already" in again.stdout


def test_json_is_all_there_is_on_stdout(inputs, tmp_path):
    done = lbdt(inputs, tmp_path / "a", "--json", "--dtype", "bfloat16", "--timesteps", "1,")
    assert done.exit_code == 0, done.output
    values, stored = json.loads(done.stdout), Stored(tmp_path / "a")
    site = Site(toy.HOOKPOINT)
    assert values["sites"] == [{"site": str(site), "patches": 16, "width": 32, "rows": 6 * 16}]
    assert (values["shards"], values["resumed"], values["timesteps"]) == (3, 0, [1])
    assert values["bytes"] == sum(p.stat().st_size for p in (tmp_path / "a" / "shards").iterdir())
    assert stored.concepts == ("Cats", "Dogs") and stored.labels()[0].tolist() == [0, -1, 1] * 2
    assert stored.settings["threads"] == 1 and stored.settings["model"].endswith("pipe")


def test_two_processes_of_a_launcher_write_the_same_files(inputs, tmp_path):
    assert lbdt(inputs, tmp_path / "one").exit_code == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "lbdt", *arguments(inputs, tmp_path / "two", "--json")]
    processes = [
        subprocess.Popen(
            command,
            env=launched | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert json.loads(outputs[0][0])["processes"] == 2 and outputs[1][0] == ""
    assert repeats(contents(tmp_path / "two"), contents(tmp_path / "one"))


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--site", "unet.nothing"), 1, "no module 'unet.nothing'"),
        (("--site", "unet"), 1, "hookpoint: expected a dotted name"),
        (("--timesteps", "9"), 1, "timesteps: expected a number of them in [1, 3], got 9"),
        (("--prompts", "/nowhere.csv"), 1, "/nowhere.csv: cannot be read"),
        (("--device", "cuda:77"), 1, "--device cuda:77: not usable here"),
        (("--timesteps", "many"), 2, "--timesteps: expected a number"),
        (("--canvas-seeds", "5"), 2, "--canvas-seeds: expected FIRST:END"),
        (("--prompts", "canvas"), 2, "EmojiCanvas's"),
        (("--dtype", "int8"), 2, "int8"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_failure_says_what_was_wrong_and_makes_nothing(inputs, tmp_path, more, code, message):
    failed = lbdt(inputs, tmp_path / "a", *more)
    assert failed.exit_code == code and message in " ".join(failed.stderr.split())
    assert not (tmp_path / "a").exists()


def test_prompts_of_the_canvas_carry_their_labels():
    prompts = canvas_prompts(parse_seeds("100:102"))
    assert len(prompts) == 280 == len({prompt.seed for prompt in prompts})
    assert all(prompt.concept in prompt.text for prompt in prompts)
    assert sum(prompt.style is None for prompt in prompts) == 40


def test_timesteps_are_a_number_or_a_list():
    assert [parse_timesteps(text) for text in (None, "7", "999,1", "7,")] == [None, 7, [999, 1], [7]]
