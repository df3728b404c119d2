"""What an installation holds, and what an import costs."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
in_checkout = pytest.mark.skipif(not TRACKED, reason="needs the git checkout")


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, target: Path, command: str, mode: str) -> None:
    """setuptools' own build backend, without isolation and thus without network."""
    done = subprocess.run(
        [sys.executable, "-c", f"import setuptools.build_meta as b; b.build_{command}({str(target)!r})"],
        cwd=source,
        env=os.environ | {"LBDT_BUILD": mode},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Folder with a wheel and a source archive, built without C++ from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("package")
    for name in TRACKED:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    for command in ("wheel", "sdist"):
        build(folder / "source", folder, command, mode="0")
    return folder


def in_wheel(folder: Path) -> set[str]:
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


@in_checkout
def test_the_wheel_holds_the_package_and_its_weights_and_nothing_else(archives):
    present = {name for name in TRACKED if (ROOT / name).is_file()}
    expected = {name for name in present if name.startswith("lbdt/")}
    kernels = {name for name in present if name.startswith("kernels/triton/")}
    expected |= {f"lbdt/kernels/{Path(name).name}" for name in kernels}
    assert kernels and any(name.endswith(".safetensors") for name in expected)
    assert in_wheel(archives) == expected


@in_checkout
def test_the_source_archive_holds_what_a_build_needs(archives):
    with tarfile.open(next(archives.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name for name in TRACKED if name.startswith(("lbdt/", "csrc/", ".ci/"))} <= held
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", ".ci/constraints.txt"} <= held


@in_checkout
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="no C++ compiler")
def test_the_source_archive_builds_the_extension_in_a_wheel_and_in_place(archives, tmp_path, monkeypatch):
    with tarfile.open(next(archives.glob("*.tar.gz"))) as sdist:
        sdist.extractall(tmp_path, filter="data")
    source = next(tmp_path.glob("lbdt-*"))
    # Appended, so that it wins: the build in the repository says what the optimiser makes of the same files. What was
    # compiled for the first build is taken for the second.
    compiler = tmp_path / "g++"
    compiler.write_text(f'''#!/usr/bin/env bash
set -e
object="${{!#}}"
kept="{tmp_path}/kept-$(printf "%s\\n" "${{@:1:$#-1}}" | cksum | tr " " -)"
if [[ "$object" != *.o ]]; then exec {shutil.which("g++") or shutil.which("c++")} "$@" -O0; fi
[[ -e "$kept" ]] || {{ {shutil.which("g++") or shutil.which("c++")} "$@" -O0 && cp "$object" "$kept"; }}
cp "$kept" "$object"
''')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    (tmp_path / "editable").mkdir()
    build(source, tmp_path / "editable", "editable", mode="1")
    in_place = source / "lbdt/_C.abi3.so"
    assert in_place.read_bytes()[:4] == b"\x7fELF"
    in_place.unlink()
    build(source, tmp_path, "wheel", mode="1")
    assert in_wheel(tmp_path) - in_wheel(archives) == {"lbdt/_C.abi3.so"}
    assert in_wheel(archives) <= in_wheel(tmp_path)
    assert "-cp311-abi3-" in next(tmp_path.glob("*.whl")).name


# CPU time, not wall time: the machine may be running other things.
def test_import_is_inert_and_quick():
    heavy = ("torch", "diffusers", "transformers", "triton", "PIL", "numpy")
    code = (
        "import sys, time\nstart = time.process_time()\nimport lbdt\nspent = time.process_time() - start\n"
        f"print([m for m in {heavy} if m in sys.modules], spent < 0.3)"
    )
    assert python(code).strip() == "[] True"


def test_help_loads_nothing_heavy_and_is_quick():
    code = (
        "import sys, time\nfrom lbdt.cli import app\ntry: app(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'diffusers') if m in sys.modules], time.process_time() < 1)"
    )
    python(code)  # once, for the bytecode
    shown = python(code)
    assert "erase" in shown and shown.strip().endswith("[] True")


@pytest.mark.parametrize("name", ["ConceptEraser", "ConceptDictionary", "SparseAutoencoder"])
def test_public_names_are_found_lazily(name):
    assert python(f"import lbdt; print(lbdt.{name}.__name__, '{name}' in dir(lbdt))").split() == [
        name,
        "True",
    ]


def test_every_dependency_has_the_lower_bound_that_ci_runs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [
        *project["dependencies"],
        *(line for more in project["optional-dependencies"].values() for line in more),
    ]
    unbounded = {line for line in named if not re.match(r"[\w-]+(\[\w+\])?>=\d", line)}
    assert unbounded == {"ruff", "lbdt[evaluate,plot,serve,app]"}
