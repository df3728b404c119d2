"""`lbdt audit verify`."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lbdt import cli
from lbdt.serving.audit import AuditLog
from tests.serving.audits import KEY, lines, put, record, values, written


def verified(*arguments) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    done = CliRunner().invoke(cli.app, ["audit", "verify", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_a_folder_that_is_fine(tmp_path):
    first = written(tmp_path, 2)
    with AuditLog(tmp_path) as second:
        second.write([record(7, outcome="refused", reason="policy", image=None)])
    code, out, err = verified(tmp_path)
    assert (code, err) == (0, "")
    last = json.loads(lines(first)[-1])["hash"]
    assert out.splitlines() == [
        "2 files, 7 lines, 3 pictures: 2 protected, 1 refused",
        f"{first.name}: finished; last hash {last}",
        f"{second.path.name}: finished; last hash {second.last_hash}",
    ]


def test_a_killed_writer_s_file_is_fine_and_said_to_be_cut_off(tmp_path):
    path = written(tmp_path, 2)
    put(path, [*lines(path)[:2], lines(path)[2][:50]])
    code, out, err = verified(path)
    assert (code, err) == (0, "") and out.startswith("1 file, 2 lines, 1 pictures: 1 protected\n")
    assert (
        "open: no end line, its writer is at work or was killed; the last line is cut off after 50 bytes"
        in out
    )
    code, out, err = verified(path, "--strict")
    assert code == 1 and out == ""
    assert (
        err == f"lbdt: {path}: unfinished: it has no end line, and its last line is cut off after 50 bytes\n"
    )


def test_json_is_all_there_is_on_stdout(tmp_path):
    path = written(tmp_path, 2)
    code, out, err = verified(tmp_path, "--json")
    found = json.loads(out)
    assert (code, err, found["faults"], found["first"], found["pictures"]) == (0, "", 0, [], 2)
    assert found["files"][0]["last_hash"] == json.loads(lines(path)[-1])["hash"] and found["finished"]
    put(path, [*lines(path)[:2], *lines(path)[3:]])
    code, out, err = verified(tmp_path, "--json")
    found = json.loads(out)
    assert (code, found["faults"], found["lines"]) == (1, 1, 3)
    assert found["first"] == [
        {"file": str(path), "line": 3, "what": "end: says 2 pictures, got 1: lines are missing or put in"}
    ]
    assert err == f"lbdt: {path}, line 3: {found['first'][0]['what']}\n"


def test_the_first_twenty_faults_then_a_count(tmp_path):
    path = written(tmp_path, 25)
    path.write_bytes(path.read_bytes().replace(b'"seed":', b'"seed": '))
    code, out, err = verified(path)
    assert code == 1 and out == "" and len(err.splitlines()) == 21
    assert err.splitlines()[0].startswith(f"lbdt: {path}, line 2: the same values are spelt otherwise")
    assert err.splitlines()[-1] == "lbdt: 5 more faults"


def test_the_hash_that_is_expected(tmp_path):
    path = written(tmp_path, 2)
    assert verified(path, "--expect", json.loads(lines(path)[-1])["hash"])[0] == 0
    code, _, err = verified(path, "--expect", "0" * 64)
    assert (
        code == 1 and f"lbdt: {path}: expected the last hash to be 000000000000..., which no line has" in err
    )


def test_the_key_is_read_as_the_writer_reads_it(tmp_path):
    path = written(tmp_path / "audit", 2, key=KEY.hex().encode())
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    assert verified(path, "--key-file", tmp_path / "key")[0] == 0


def test_a_name_that_steers_the_terminal_is_escaped(tmp_path):
    path = written(tmp_path, 1)
    path = path.rename(tmp_path / "a\x1b[31m.jsonl")
    path.write_bytes(path.read_bytes()[:-9] + b"\x1b[31m\n")
    code, _, err = verified(tmp_path)
    assert code == 1 and "\x1b" not in err and "\\x1b" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param(
            ["none"],
            1,
            "lbdt: none: cannot be read (No such file or directory); expected an audit file",
            id="none",
        ),
        pytest.param(["keyed"], 1, "was written with a key; give that key (--key-file)", id="no-key"),
        pytest.param(
            ["keyed", "--key-file", "none"], 1, "lbdt: none: the key cannot be read", id="no-key-file"
        ),
        pytest.param(
            ["keyed", "--key-file", "short"], 1, "short: key: expected at least 16 bytes, got 3", id="short"
        ),
        pytest.param(
            ["keyed", "--expect", "xyz"],
            1,
            "expect: expected 64 lower-case hexadecimal digits, got 'xyz'",
            id="hash",
        ),
        pytest.param([], 2, "Missing argument 'FILE_OR_FOLDER'", id="no-argument"),
    ],
)
def test_what_it_refuses(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "keyed", key=KEY)
    (tmp_path / "short").write_bytes(b"abc")
    got, out, err = verified(*arguments)
    assert (got, out) == (code, "") and words in err
    assert code == 2 or len(err.splitlines()) == 1


def test_it_loads_nothing_heavy(tmp_path):
    path = written(tmp_path, 2)
    assert values(lines(path)[1])["n"] == 1
    code = (
        "import sys; from lbdt.cli import app; from typer.testing import CliRunner\n"
        f"assert CliRunner().invoke(app, ['audit', 'verify', {str(path)!r}]).exit_code == 0\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
