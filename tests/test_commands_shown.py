"""Every command line that a README or a `--help` text shows is run, in small, from a folder with its inputs alone.

`SMALL` has a row for each: what is appended to it, or put in place of its `...`. Words such as DIR_OR_HUB stand for
what `PUT` says. A line without a row, and a row without a line, fail.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from lbdt import cli
from lbdt.bench import shapes
from lbdt.editors import ConceptEraser, Steering
from lbdt.evaluation.worlds.unlearncanvas import OBJECTS, THEMES
from tests import toy
from tests.commands import groups_and_commands
from tests.evaluation.test_clip import tiny_clip
from tests.evaluation.test_nudity import RED, install
from tests.evaluation.test_unlearncanvas import LOOKS, THINGS, planted
from tests.evaluation.test_vlm import tiny_qwen
from tests.formats import fixtures
from tests.shown_commands import ELSEWHERE, INSTALLS, NO_COMMAND, PARSED, PUT, SCRIPTS, SMALL

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for path in sorted(ROOT.glob("**/*.md")) if not {".venv", "shared", "build"} & set(path.parts)]
PROGRAMS = (
    r"lbdt [a-z]+|torchrun|python -m|accelerate launch [^`]*-m|pip install|pytest|benchmarks/\w+\.sh|"
    r"\.ci/\w+(?![\w.])"
)


def normal(line: str) -> str:
    return shlex.join(shlex.split(line, comments=True)).replace("'...'", "...")


def blocks(page: Path) -> list[list[str]]:
    """The command lines of each bash block."""
    found = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [[line for each in block.splitlines() if (line := normal(each))] for block in found]


def spans(text: str) -> list[str]:
    return [normal(" ".join(found.split())) for found in re.findall(rf"`((?:{PROGRAMS})[^`]*)`", text)]


def helps() -> list[str]:
    """What the commands' `--help` is made of."""
    texts = []
    groups, commands = groups_and_commands()
    for command in (*groups.values(), *commands.values()):
        texts += [command.help or "", *(getattr(option, "help", None) or "" for option in command.params)]
    return texts


README, EVALUATION = blocks(ROOT / "README.md"), blocks(ROOT / "lbdt/evaluation/README.md")
INLINE = [
    span for page in PAGES for span in spans(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
]
SHOWN = dict.fromkeys(
    [line for page in PAGES for block in blocks(page) for line in block]
    + INLINE
    + [span for text in helps() for span in spans(text)]
)
IN_A_BLOCK = {line for block in (*README, *EVALUATION) for line in block}


def test_every_command_line_that_is_shown_is_in_the_table():
    rows = [*SMALL, *PARSED, *SCRIPTS, *ELSEWHERE, *INSTALLS, *NO_COMMAND]
    assert len(rows) == len(set(rows))
    assert sorted(set(SHOWN) - set(rows)) == [], "shown, but not run"
    assert sorted(set(rows) - set(SHOWN)) == [], "run, but not shown"
    assert all((ROOT / place).exists() for place in ELSEWHERE.values()) and len(README) == 3


def released(root: Path, eraser: ConceptEraser) -> None:
    """An eraser's SAE and means in the files that SAeUron publishes and writes."""
    folder, sizes = root / "SAeUron" / toy.HOOKPOINT, eraser.sae.config
    eraser.sae.save_pretrained(folder)
    config = fixtures.SAEURON | {"d_in": sizes.d_in, "num_latents": sizes.num_latents}
    (folder / "cfg.json").write_text(json.dumps(config))
    means = zip(eraser.concepts, eraser.dictionary.mean.half().unsqueeze(1).numpy(), strict=True)
    pickle_file = root / "cls_latents_dict_unet.up_blocks.1.attentions.1.pkl"
    pickle_file.write_bytes(pickle.dumps(dict(means)))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """What the words of `PUT` stand for: small models, and the files that a user has."""
    from diffusers import AutoencoderTiny

    root = tmp_path_factory.mktemp("models")
    pipe = toy.pipeline(root / "tokenizer")
    pipe.save_pretrained(root / "pipe")
    pipe = toy.pipeline(root / "tokenizer512", tokens=40)  # the published prompts, letter by letter
    channels = (8,) * 7  # each but the last doubles the side: 8 x 8 latents are 512 x 512 pixels
    counts = {"num_encoder_blocks": (1,) * 7, "num_decoder_blocks": (1,) * 7}
    pipe.register_modules(
        vae=AutoencoderTiny(
            encoder_block_out_channels=channels, decoder_block_out_channels=channels, **counts
        )
    )
    pipe.save_pretrained(root / "pipe512")
    eraser = toy.eraser(padding=1)
    eraser.save_pretrained(root / "known", decoder=True)
    Steering.from_eraser(eraser, strength=-1.0).save_settings(root / "known")
    planted(root / "style50_cls.pth", OBJECTS, THINGS)
    planted(root / "style50.pth", THEMES, LOOKS)
    Path(tiny_clip(root / "c")).rename(root / "clip")
    Path(tiny_qwen(root / "q")).rename(root / "qwen")
    released(root, eraser)
    rows = [
        {"prompt": f"a {name} {place}", "concept": concept, "style": None, "seed": seed}
        for seed, (name, concept) in enumerate((("cat", "Cats"), ("dog", "Dogs")))
        for place in ("on a sofa", "in a box")
    ]
    for number, row in enumerate(rows):
        row["seed"] = number
    (root / "jobs.jsonl").write_text('{"prompt": "An image of Cats."}\n{"prompt": "Trees", "concepts": []}\n')
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def home(models, tmp_path, monkeypatch) -> Path:
    """The working folder: links to the inputs, nothing else. Sizes of real hookpoints are small ones."""
    monkeypatch.setitem(shapes.SHAPES, "sd15-b1", shapes.QUICK["quick"])
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def words(line: str) -> list[str]:
    """As it is run: the row of `SMALL` in place of `...`, or at the end; `PUT`'s words."""
    shown = [PUT.get(word, word) for word in shlex.split(line)]
    more = shlex.split(SMALL[line])
    place = shown.index("...") if "..." in shown else len(shown)
    return [*shown[:place], *more, *shown[place + 1 :]]


def run(line: str) -> str:
    """Its output; a command of several processes is run by one, but where the launcher itself is tried."""
    given = words(line)
    return invoked(tuple(given[given.index("lbdt") + 1 :]))


@functools.cache
def invoked(given: tuple[str, ...]) -> str:
    """The same words are run once."""
    done = CliRunner().invoke(cli.app, list(given))
    assert done.exit_code == 0, f"lbdt {shlex.join(given)}: {done.output}"
    return done.stdout


@pytest.mark.parametrize(
    ("block", "written"),
    [
        pytest.param(README[1], ["erased.png"], id="published-sae"),
        pytest.param(README[2], ["dictionary/dictionary.json"], id="own-sae"),
        pytest.param(EVALUATION[0], ["evaluation/report.html"], id="evaluate"),
        pytest.param(EVALUATION[1], ["unlearncanvas/report.html", "mine/report.html"], id="other-worlds"),
    ],
)
def test_the_blocks(home, monkeypatch, block, written):
    """Each from its first line to its last, in one folder."""
    (home / "nudenet").mkdir()
    install(home / "nudenet", monkeypatch, RED)
    monkeypatch.syspath_prepend(home / "nudenet")
    invoked.cache_clear()
    for line in block:
        run(line)
    for name in written:
        assert (home / name).stat().st_size > (10_000 if name.endswith(".html") else 0)


@pytest.mark.parametrize("line", [line for line in SMALL if line not in IN_A_BLOCK])
def test_the_others(home, line):
    if line == "torchrun --nproc_per_node N -m lbdt collect ...":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words(line)[1:]]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        assert (home / "shared" / "manifest.json").is_file() or list((home / "shared").iterdir())
    else:
        assert run(line)


@pytest.mark.parametrize("line", PARSED)
def test_the_arguments_of_what_takes_long(tmp_path, monkeypatch, line):
    read = argparse.ArgumentParser.parse_args
    found = []

    def parse_args(self, given=None):
        found.append(read(self, given))
        raise SystemExit(0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    program, flag, module, *given = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [module, *given])
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0 and len(found) == 1, line


def test_the_arguments_of_the_commands_in_scripts(tmp_path, monkeypatch):
    """`VENV`'s python writes down what it is asked."""
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/usr/bin/env bash\nprintf "%q " "$@" >>{log}\necho >>{log}\n'
        'while (($#)); do [[ "$1" != --out ]] || mkdir -p "$(dirname "$2")"; shift; done\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("VENV", str(tmp_path))
    commands = typer.main.get_command(cli.app).commands
    for script in SCRIPTS:
        name, *given = shlex.split(script)
        log.write_text("")
        subprocess.run(
            [ROOT / name, *(tmp_path / word.lstrip("$/") for word in given or ["work"])],
            check=True,
            capture_output=True,
        )
        lines = [shlex.split(line) for line in log.read_text().splitlines()]
        asked = [line[line.index("lbdt") + 1 :] for line in lines if "lbdt" in line]
        assert len(asked) > 10
        for command, *options in asked:
            context = commands[command].make_context(command, list(options))
            assert not context.args


@pytest.mark.parametrize("line", INSTALLS)
def test_the_commands_that_install(tmp_path, line):
    """In a checkout of their own with one test, where there is nothing to install: `.ci/run` runs them as they are."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / line, tmp_path / line)
    (tmp_path / ".ci/setup").write_text("#!/usr/bin/env bash\ntouch installed\n")
    (tmp_path / ".ci/setup").chmod(0o755)
    (tmp_path / "test_one.py").write_text("def test_one():\n    assert True\n")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "venv/bin").mkdir(parents=True)
    for name, module in (("python", ""), ("lbdt", "-m lbdt ")):
        program = tmp_path / "venv/bin" / name
        program.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} {module}"$@"\n')
        program.chmod(0o755)
    more = ["--steps", "2"] if line == ".ci/demo" else []
    env = {**os.environ, "VENV": str(tmp_path / "venv"), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run([tmp_path / line, *more], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "installed").is_file()
    assert ("1 passed" in done.stdout) if line == ".ci/test" else (tmp_path / "erased.png").is_file()
