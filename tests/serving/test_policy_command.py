"""`lbdt policy check`."""

from __future__ import annotations

import builtins
import json
import sys

import pytest
from typer.testing import CliRunner

from lbdt import cli
from lbdt.serving import EXAMPLE_POLICY
from tests import toy
from tests.serving.policies import ACME, HEAD, KNOWN, load, toml, write


def check(*arguments: str):
    return CliRunner().invoke(cli.app, ["policy", "check", *map(str, arguments)])


@pytest.fixture(scope="module")
def eraser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eraser")
    toy.eraser().save_pretrained(folder)
    return folder


def test_the_example(tmp_path):
    done = check(EXAMPLE_POLICY)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    policy = load(tmp_path, EXAMPLE_POLICY.read_bytes())
    assert lines[0] == f"{EXAMPLE_POLICY}: version 2026-11-30.1, SHA-256 {policy.digest}"
    assert (
        lines[1] == "unknown tenants: refused"
        and lines[2].split() == "tenant on failure concepts erased".split()
    )
    assert [line.split()[0] for line in lines[3:]] == ["acme", "bluebird", "in-house"]
    assert lines[4].split() == ["bluebird", "unprotected", "Human,", "Statues"]
    assert lines[5].split() == ["in-house", "refuse", "none"]


def test_as_json():
    values = json.loads(check(EXAMPLE_POLICY, "--json", "--kind", "sdxl").stdout)
    assert values["file"] == str(EXAMPLE_POLICY) and values["unknown_tenant"] is None
    assert len(values["digest"]) == 64 and values["version"] == "2026-11-30.1"
    assert values["tenants"][1] == {
        "tenant": "bluebird",
        "concepts": ["Human", "Statues"],
        "on_failure": "unprotected",
    }


def test_against_another_eraser(tmp_path, eraser):
    defaults = '[defaults]\nunknown_tenant = "acme"\n'
    done = check(write(tmp_path / "p.toml", HEAD + defaults + ACME), "--eraser", eraser)
    assert done.exit_code == 0 and "unknown tenants: as acme" in done.stdout, done.output
    failed = check(EXAMPLE_POLICY, "--eraser", eraser)
    assert failed.exit_code == 1 and failed.stdout == ""
    lines = failed.stderr.splitlines()
    assert lines[0] == f"lbdt: {EXAMPLE_POLICY}: refused, {len(lines) - 1} faults"
    assert sum("unknown concept" in line for line in lines) == len(lines) - 1 == 11
    assert all("expected one of the eraser's 3 concepts" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(HEAD, "tenants: missing", id="one-fault"),
        pytest.param(None, "no such file; expected a policy", id="no-file"),
        pytest.param('version = "\x1b[31m"', "not valid TOML", id="control-characters"),
    ],
)
def test_one_fault_is_one_line(tmp_path, content, said):
    path = tmp_path / "p\n.toml"
    if content is not None:
        write(path, content)
    failed = check(path)
    (line,) = failed.stderr.splitlines()
    assert failed.exit_code == 1 and line.startswith(f"lbdt: {tmp_path}/p\\n.toml: ") and said in line
    assert line.isprintable()


def test_names_do_not_steer_the_terminal(tmp_path):
    text = '[tenants."\\u001b[31m"]\nconcepts = ["\\u001b[31m"]\n'
    failed = check(write(tmp_path / "p.toml", HEAD + text))
    assert failed.exit_code == 1 and len(failed.stderr.splitlines()) == 3 and "\x1b" not in failed.stderr


@pytest.mark.parametrize("count", [0, 50, 51, 120])
def test_fifty_tenants_are_listed(tmp_path, count):
    tenants = {f"t{number}": {"concepts": [KNOWN[number % 20]]} for number in range(count)}
    path = write(tmp_path / "p.toml", toml({"schema": 1, "version": "1", "tenants": tenants}))
    done = check(path)
    lines = done.stdout.splitlines()[3:]
    assert done.exit_code == 0 and len(lines) == min(count, 50) + (count > 50)
    assert (lines[-1] if count > 50 else "") == (f"... and {count - 50} more" if count > 50 else "")
    assert len(json.loads(check(path, "--json").stdout)["tenants"]) == count


def test_without_pydantic(monkeypatch):
    """It is missing for the policy's file alone: typer may use it itself."""
    load_module = builtins.__import__

    def without(name, globals=None, *more):
        if name == "pydantic" and globals and globals["__name__"] == "lbdt.serving.policy_file":
            raise ModuleNotFoundError("No module named 'pydantic'")
        return load_module(name, globals, *more)

    for name in [name for name in sys.modules if name.startswith("lbdt.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("lbdt.serving.load_policy", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    failed = check(EXAMPLE_POLICY)
    assert failed.exit_code == 1
    assert failed.stderr == "lbdt: a policy needs pydantic: pip install lbdt[serve]\n"


@pytest.mark.parametrize("arguments", [[], [EXAMPLE_POLICY, "--kind", "none"], [EXAMPLE_POLICY, "more"]])
def test_bad_usage(arguments):
    assert check(*arguments).exit_code == 2
