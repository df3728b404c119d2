"""The built library as a file: what is not whole is made again or refused, and never loaded."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lbdt import _build
from tests.backends import HAS_CPP

pytestmark = pytest.mark.skipif(not HAS_CPP, reason="no C++ compiler")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small library as `compile_extension` makes it: sealed."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "csrc").mkdir()
    (folder / "csrc" / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_build, "_SOURCES", folder / "csrc")
        patch.setenv("LBDT_BUILD_CUDA", "0")
        _build.compile_extension(folder / _build.LIBRARY)
    return folder / _build.LIBRARY


def stripped(data: bytes) -> bytes:
    """Without the seal, as a tool that rewrites libraries leaves it."""
    return data[: -len(_build._SEAL) - 32]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = [
    pytest.param(lambda data: data[: len(data) // 2], id="cut-in-half"),
    pytest.param(
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2), id="second-half-zeroed"
    ),
    pytest.param(lambda data: data[:-100], id="end-gone"),
    pytest.param(lambda data: data[:20], id="half-a-header"),
    pytest.param(lambda data: b"", id="empty"),
    pytest.param(lambda data: b"#!/bin/sh\necho not a library\n", id="text"),
    pytest.param(flipped, id="flipped-bit"),
    pytest.param(lambda data: stripped(data)[: len(data) // 2], id="stripped-and-cut"),
    pytest.param(lambda data: bytes(len(data)), id="all-zeros"),
]


def test_what_is_built_is_whole_and_without_its_seal_too(built, tmp_path):
    assert _build.damage(built) is None
    bare = tmp_path / "bare.so"
    bare.write_bytes(stripped(built.read_bytes()))
    assert _build.damage(bare) is None
    foreign = bytearray(bare.read_bytes())
    foreign[4] = 1  # of a 32-bit machine: the loader's matter
    bare.write_bytes(foreign)
    assert _build.damage(bare) is None


@pytest.mark.parametrize("change", DAMAGE)
def test_damage_is_seen_before_loading(change, built, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(change(built.read_bytes()))
    assert _build.damage(broken)


def load(package: Path, **environment: str) -> subprocess.CompletedProcess:
    """`_build.load()` in a process of its own, as damage may end it, with the prebuilt library sought in `package`."""
    code = (
        "import pathlib, sys, torch\nfrom lbdt import _build\n"
        "from lbdt import ops\n"
        f"_build._PACKAGE = pathlib.Path({str(package)!r})\n"
        "print(_build.load(), torch._C._dispatch_has_kernel_for_dispatch_key('lbdt::encode_topk_cpp', 'CPU'))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LBDT_BUILD_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("change", [*DAMAGE[:2], DAMAGE[6]])
def test_a_damaged_prebuilt_library_is_refused_by_name(change, tmp_path):
    own = _build._PACKAGE / _build.LIBRARY
    if not own.exists():
        pytest.skip("no prebuilt library in this installation")
    (tmp_path / _build.LIBRARY).write_bytes(change(own.read_bytes()))
    done = load(tmp_path)
    assert done.returncode == 1, f"ended by {done.returncode}"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and str(tmp_path / _build.LIBRARY) in last
    assert "damaged" in last and "delete it, or reinstall lbdt with LBDT_BUILD=1" in last


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache whose builds copy the installed library; the list of the builds that were made."""
    own, made = _build._PACKAGE / _build.LIBRARY, []
    if not own.exists():
        pytest.skip("no prebuilt library in this installation")

    def compile_extension(output):
        made.append(output)
        shutil.copy(own, output)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LBDT_BUILD_CUDA", "0")
    monkeypatch.setattr(_build, "compile_extension", compile_extension)
    return made


@pytest.mark.parametrize("change", DAMAGE)
def test_a_damaged_build_of_the_cache_is_made_again(change, cache):
    output = _build._cached()
    assert _build._cached() == output and cache == [output]
    whole = output.read_bytes()
    output.write_bytes(change(whole))
    leftovers = output.parent / f"{output.name}.killed"
    leftovers.mkdir()
    other = output.parent / "another-torch.so.building"
    other.mkdir()
    assert _build._cached() == output
    assert cache == [output, output] and output.read_bytes() == whole
    assert not leftovers.exists() and other.exists()


def test_two_that_want_the_build_at_once_make_one(cache, monkeypatch):
    compile_at_once = _build.compile_extension

    def compile_slowly(output):
        time.sleep(0.3)
        compile_at_once(output)

    monkeypatch.setattr(_build, "compile_extension", compile_slowly)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(_build._cached) for _ in range(2)]
    assert found[0].result() == found[1].result() == cache[0] and len(cache) == 1


def test_a_build_that_does_not_load_here_is_made_again_once(cache, monkeypatch):
    import torch

    loaded = []

    def load_library(path):
        loaded.append(path)
        if len(loaded) == 1:
            raise OSError("wrong ELF class")

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.setattr(_build, "_PACKAGE", Path(os.environ["XDG_CACHE_HOME"]))
    monkeypatch.delenv("LBDT_JIT", raising=False)
    assert _build.load.__wrapped__() is None
    assert len(loaded) == len(cache) == 2
    monkeypatch.setattr(torch.ops, "load_library", lambda path: (_ for _ in ()).throw(OSError("still not")))
    with pytest.warns(UserWarning, match="still not"):
        assert "still not" in _build.load.__wrapped__()


FAULTS = [
    pytest.param("#!/bin/sh\necho 'No space left on device' >&2\nexit 1\n", "No space left", id="full-disk"),
    pytest.param("#!/bin/sh\nkill -9 $$\n", "failed", id="compiler-killed"),
]


@pytest.mark.parametrize(("script", "words"), FAULTS)
def test_a_build_that_fails_leaves_nothing_and_falls_back(script, words, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    done = load(tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"), CXX=str(compiler), LBDT_JIT="1")
    assert done.returncode == 0, done.stderr
    assert "building the C++ library failed" in done.stdout and words in done.stderr
    assert [path.suffix for path in (tmp_path / "cache/lbdt").iterdir()] in ([], [".lock"])


def test_a_cache_that_is_no_folder_falls_back(tmp_path):
    (tmp_path / "cache").write_text("a file")
    done = load(tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "building the C++ library failed" in done.stdout and str(tmp_path / "cache") in done.stdout
