"""Every command that writes, with everything that may go wrong meanwhile: `python -m benchmarks.faults`, in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import faults
from lbdt.cli import app

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/faults.json"
READING = {"concepts", "env"}
TRIED_ELSEWHERE = {
    "serve": "tests/serving/test_server.py",
    "app": "tests/app/test_page.py",
    "generate": "tests/serving/test_generate.py",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--moments", "2", "--jobs", "2", "--json", out]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert out.is_file(), done.stderr[-4000:]
    return json.loads(out.read_text())["commands"]


def test_every_command_that_writes_is_tried():
    commands = {command.name for command in app.registered_commands} - READING
    assert commands == {*faults.COMMANDS, *TRIED_ELSEWHERE}
    assert all((ROOT / place).is_file() for place in TRIED_ELSEWHERE.values())


@pytest.mark.parametrize("fault", faults.FAULTS)
@pytest.mark.parametrize("command", faults.COMMANDS)
def test_nothing_is_lost_or_mixed_and_the_same_command_goes_on(rows, command, fault):
    assert faults.good(rows[command][fault]), rows[command][fault]


@pytest.mark.parametrize("name", ["lost", "mixed", "untold", "resumed"])
def test_a_bad_cell_is_bad(name):
    cell = {"runs": 2, "lost": 0, "mixed": 0, "resumed": 2, "untold": 0}
    assert faults.good(cell) and not faults.good(cell | {name: 1})


def test_the_committed_result_is_of_every_command_and_good():
    result = json.loads(RESULT.read_text())
    assert result["moments"] == 10 and set(result["commands"]) == set(faults.COMMANDS)
    for cells in result["commands"].values():
        assert set(cells) == set(faults.FAULTS) and all(map(faults.good, cells.values()))
        assert cells["kill -9"]["runs"] == 10
