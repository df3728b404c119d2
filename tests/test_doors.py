"""Bad values that can be seen at the start: of every option, of --out, of the environment; and odd terminals."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lbdt import cli
from lbdt.cli import options
from lbdt.runs import writable
from tests import toy
from tests.commands import groups_and_commands

_, COMMANDS = groups_and_commands()
BAD_INTEGERS = (
    "-9223372036854775809",
    "9223372036854775808",
    "18446744073709551617",
    "1e20",
    "nan",
    "inf",
    "",
    "0x1",
)
BAD_NUMBERS = ("nan", "-nan", "inf", "-inf", "1e400", "1e300", "-1e300", "", "one")
POSITIVE = ("0", "-1")


def numeric():
    """(command, option, whole or not) of every option of every command that is a number."""
    for name, command in COMMANDS.items():
        hints = typing.get_type_hints(command.callback)
        for option in command.params:
            types = {hints[option.name], *typing.get_args(hints[option.name])}
            types |= {part for inner in types for part in typing.get_args(inner)}
            if types & {int, float}:
                flag = max(option.opts, key=len)
                yield pytest.param(command, flag, int in types, id=f"{name}{flag}")


def refused(command, flag: str, value: str) -> bool:
    """Whether the parser alone says no, before the command begins. An attached value, as it may begin with a dash."""
    try:
        command.make_context("lbdt", [f"{flag}={value}"], resilient_parsing=False).close()
    except Exception as error:
        # The other, required options are missing: that is said only after the values have been read.
        return flag in str(
            getattr(error, "param_hint", "") or getattr(error, "param", None) and error.param.opts
        )
    return False


@pytest.mark.parametrize(("command", "flag", "whole"), list(numeric()))
def test_every_number_has_its_range_checked_by_the_parser(command, flag, whole):
    for value in BAD_INTEGERS if whole else BAD_NUMBERS:
        assert refused(command, flag, value), value


def test_numbers_are_found_at_all():
    found = {param.id for param in numeric()}
    wanted = (
        "erase--guidance",
        "train--lr",
        "evaluate--seed",
        "assemble--padding",
        "bench--share",
        "attack--tokens",
    )
    assert {*wanted} <= found and len(found) > 60


@pytest.mark.parametrize(
    "flag",
    ["--steps", "--threads", "--tokens", "--rows", "--candidates", "--processes", "--patches", "--lr", "--k"],
)
def test_counts_are_positive(flag):
    having = [command for command in COMMANDS.values() if any(flag in param.opts for param in command.params)]
    assert having and all(refused(command, flag, value) for command in having for value in POSITIVE)


def test_no_command_begins_more_threads_than_a_machine_has():
    having = [command for command in COMMANDS.values() if any("--threads" in p.opts for p in command.params)]
    assert having and all(refused(command, "--threads", "100000") for command in having)


def lbdt(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["erase", "a", "--concept", "Cats", "--guidance", "nan"],
        ["erase", "a", "--concept", "Cats", "--padding", str(2**63)],
        ["erase", "a", "--concept", "Cats", "--seed", "-1"],
        ["collect", "--site", "unet.mid_block", "--out", "x", "--timesteps", "1,,2"],
        ["collect", "--site", "unet.mid_block", "--out", "x", "--timesteps", ","],
        ["collect", "--site", "unet.mid_block", "--out", "x", "--timesteps", "0"],
        ["collect", "--site", "unet.mid_block", "--out", "x", "--timesteps", "-1,5"],
        ["collect", "--site", "unet.mid_block", "--out", "x", "--canvas-seeds", "0:100000000000000000000"],
        ["collect", "--site", "unet.mid_block", "--out", "x", "--canvas-seeds", "5:5"],
        ["bench", "--share", "nan"],
        ["score", "--sae", "x", "--site", "y", "--out", "z", "--percentile", "100"],
        ["score", "--sae", "x", "--site", "y", "--out", "z", "--false-positive", "0"],
    ],
    ids=" ".join,
)
def test_exit_code_2(arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert lbdt(*arguments).exit_code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:77", "", "cpu:x"])
def test_a_device_that_is_not_usable_is_refused_before_models_are_read(device, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    failed = lbdt(
        "erase", "a", "--concept", "Cats", "--model", "/nowhere", "--eraser", "/nowhere", "--device", device
    )
    assert failed.exit_code == 1 and f"lbdt: --device {device}: not usable here" in failed.stderr


@pytest.mark.parametrize("name", ["LBDT_BACKEND", "LBDT_JIT", "LBDT_BUILD_CUDA", "LBDT_BUILD"])
@pytest.mark.parametrize(
    "command", [["env"], ["concepts"], ["erase", "a", "--concept", "Cats"]], ids=lambda c: c[0]
)
def test_an_environment_variable_of_nonsense_is_refused_at_the_start(name, command, monkeypatch):
    monkeypatch.setenv(name, "nonsense")
    failed = lbdt(*command)
    assert failed.exit_code == 1 and failed.stderr.startswith(f"lbdt: {name}: expected ")
    assert "got 'nonsense'" in failed.stderr and failed.stdout == ""
    monkeypatch.setenv(name, "")
    assert lbdt("env", "--json").exit_code == 0


def test_in_python_a_backend_of_nonsense_is_refused_at_first_use(monkeypatch):
    from lbdt import ops
    from lbdt.ops import _dispatch

    monkeypatch.setenv("LBDT_BACKEND", "nonsense")
    _dispatch.of_the_environment.cache_clear()  # as in a process that has not called an op
    with pytest.raises(ValueError, match="LBDT_BACKEND: unknown backend 'nonsense'"):
        ops.patch_uniform(*(toy.torch.zeros(1, dtype=toy.torch.int64) for _ in range(3)), 4)


# The door of --out.

WORK = {
    "erase": ["a", "--concept", "Cats", "--device", "cpu"],
    "bench": ["--quick", "--device", "cpu"],
    "collect": ["--site", "unet.mid_block.attentions.0"],
    "train": ["--recipe", "saeuron", "--activations", "/nowhere", "--device", "cpu"],
    "score": ["--sae", "/nowhere", "--site", "unet.mid_block.attentions.0", "--device", "cpu"],
    "assemble": [
        "--sae",
        "/nowhere",
        "--dictionary",
        "/nowhere",
        "--hookpoint",
        "unet.mid_block.attentions.0",
    ],
    "convert": ["/nowhere", "--from", "saeuron"],
    "evaluate": ["--device", "cpu", "--processes", "1"],
    "attack": ["--device", "cpu"],
    "generate": ["/nowhere", "--device", "cpu"],
}
FILES = ("erase", "bench")


def test_every_command_with_out_is_tried():
    having = {name for name, command in COMMANDS.items() if any("--out" in p.opts for p in command.params)}
    assert having == set(WORK)


@pytest.mark.parametrize("command", WORK)
@pytest.mark.parametrize(
    "fault",
    ["full", "read-only", "forbidden", "quota", "file-in-the-way", "wrong-kind", "long", "loop", "no-files"],
)
def test_an_impossible_out_is_refused_before_any_work(command, fault, tmp_path, monkeypatch):
    if command == "evaluate":
        monkeypatch.setattr("lbdt.evaluation.request._check_packages", lambda request: None)
    name = "out.png" if command in FILES else "out"
    place, why = tmp_path / "new" / name, ""
    numbers = {
        "full": errno.ENOSPC,
        "read-only": errno.EROFS,
        "forbidden": errno.EACCES,
        "quota": errno.EDQUOT,
    }
    if fault in numbers:
        why = writable._WORDS[numbers[fault]][0]
        # As root, who runs the tests in many places, may write anywhere.
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: fail(numbers[fault]))
    elif fault == "file-in-the-way":
        (tmp_path / "new").write_text("")
        why = "a file is in the way of a folder"
    elif fault == "wrong-kind":
        place.parent.mkdir()
        place.mkdir() if command in FILES else place.write_text("")
        why = "is a folder; give the" if command in FILES else "is a file; give a folder"
    elif fault == "long":
        place, why = tmp_path / ("n" * 300 + ".png"), "the name is too long"
    elif fault == "loop":
        (tmp_path / "loop").symlink_to("loop")
        place, why = tmp_path / "loop" / name, "links lead in a circle"
    else:
        place, why = Path("/proc/nowhere") / name, "no such folder, or none that takes files"
    before = sorted(tmp_path.rglob("*"))
    failed = lbdt(command, *WORK[command], "--out", str(place))
    assert failed.exit_code == 1, failed.output
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("lbdt: ")]
    assert f"--out {place}: " in line and why in line and "Errno" not in line
    assert sorted(tmp_path.rglob("*")) == before


def fail(number: int):
    raise OSError(number, os.strerror(number))


def test_a_place_that_is_fine_is_left_as_it_was(tmp_path):
    (tmp_path / "old.png").write_text("old")
    writable.check_out(tmp_path / "old.png", "picture")
    writable.check_out(tmp_path / "a" / "b.png", "picture")
    writable.check_out_folder(tmp_path / "a" / "b")
    writable.check_out_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


def test_a_device_needs_no_folder():
    writable.check_out(Path("/dev/null"), "result")


@pytest.mark.parametrize("number", sorted(writable._WORDS))
def test_every_oserror_is_worded(number):
    error = OSError(number, os.strerror(number), "there")
    reason, _, remedy = writable.unwritable(error).partition("; ")
    assert reason and remedy and "Errno" not in writable.worded(error) and "there" in writable.worded(error)


# Output.


def test_json_holds_no_nan():
    values = {"a": float("nan"), "b": [float("inf"), 1.5, ({"c": -float("inf")},)]}
    assert options._strict(values) == {"a": None, "b": [None, 1.5, [{"c": None}]]}


def process(*arguments: str, **about):
    """The command in a process of its own."""
    environment = os.environ | about.pop("env", {})
    return subprocess.Popen([sys.executable, "-m", "lbdt", *arguments], env=environment, text=True, **about)


CONCEPTS = "import sys; from lbdt.cli.options import reported, print_result\n"


def script(body: str, **about):
    """A command of `body`, run as the command line runs its own."""
    code = f"{CONCEPTS}@reported\ndef command():\n    {body}\nimport typer\ntyper.run(command)"
    environment = os.environ | about.pop("env", {})
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, **about)


@pytest.mark.parametrize(
    "env",
    [
        {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1", "COLUMNS": "1", "NO_COLOR": "1", "TERM": "dumb"},
        {"PYTHONIOENCODING": "utf-8"},
    ],
    ids=["ascii", "latin-1-one-column", "utf-8"],
)
def test_names_that_the_terminal_cannot_show_are_escaped(env):
    done = script(r"print_result({}, ['Käfer \u2603 \udcff'], False)", env=env)
    assert done.returncode == 0 and done.stderr == b"" and b"K" in done.stdout
    failed = script(r"raise ValueError('Käfer \u2603 \udcff')", env=env)
    assert (
        failed.returncode == 1 and failed.stderr.startswith(b"lbdt: K") and b"Traceback" not in failed.stderr
    )


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise KeyError('no such name')", 1, "lbdt: no such name\n"),
        ("[][1]", 1, "lbdt: list index out of range\n"),
        ("assert False, 'impossible'", 1, "lbdt: impossible\n"),
        ("1 / 0", 1, "lbdt: division by zero\n"),
        ("raise MemoryError", 1, "lbdt: MemoryError\n"),
        ("open('/nowhere/x')", 1, "lbdt: /nowhere/x: No such file or directory\n"),
        ("raise KeyboardInterrupt", 130, "lbdt: interrupted\n"),
    ],
    ids=["key", "index", "assertion", "arithmetic", "memory", "file", "interrupt"],
)
def test_whatever_fails_is_one_line(body, code, said):
    done = script(body)
    assert (done.returncode, done.stderr.decode(), done.stdout) == (code, said, b"")


def test_a_reader_that_has_gone_is_no_failure():
    reader, writer = os.pipe()
    os.close(reader)
    done = process("env", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.communicate()[1] == "" and done.returncode == 0


def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = process("env", "--json", stdout=full, stderr=subprocess.PIPE)
        said = done.communicate()[1]
    assert done.returncode == 1 and said == (
        "lbdt: stdout cannot be written: the disk is full; make room there, or write to another disk\n"
    )


def test_closed_streams_and_no_home(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    lbdt = f"{sys.executable} -m lbdt"
    done = subprocess.run(
        ["sh", "-c", f"{lbdt} env --json > env.json <&- 2>&-; echo $?; {lbdt} concepts <&- >&-; echo $?"],
        cwd=tmp_path,
        env=environment | {"TMPDIR": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.split(), done.stderr) == (["0", "0"], "")
    assert json.loads((tmp_path / "env.json").read_text())["lbdt"]


def test_in_a_deleted_folder(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    failed = lbdt("env")
    assert failed.exit_code == 1 and failed.stderr == (
        "lbdt: the current folder has been deleted; cd to one that is there\n"
    )


def test_an_interrupted_command_ends_with_130_and_one_line(tmp_path):
    done = process(
        *("bench", "--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "x.json")),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    said = ""
    while "bench" not in said:  # its progress bar
        more = done.stderr.read(1)
        assert more, said
        said += more
    done.send_signal(signal.SIGINT)
    printed, rest = done.communicate()
    assert done.returncode == 130 and printed == "" and not list(tmp_path.iterdir())
    assert "Traceback" not in rest and rest.splitlines()[-1] == "lbdt: interrupted"


def test_an_interruption_inside_of_generated_code_ends_alike(tmp_path):
    """torch compiles by `exec` of text."""
    (tmp_path / "interrupted.py").write_text(
        "import typer\nfrom lbdt.cli.options import reported\n\n\n"
        "def command() -> None:\n    exec('raise KeyboardInterrupt')\n\n\ntyper.run(reported(command))\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "lbdt: interrupted\n")
