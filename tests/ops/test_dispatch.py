"""The choice of a backend: explained, forced, and what happens where one is absent or broken."""

import importlib
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from lbdt import _build, ops
from lbdt.ops import _dispatch, _triton
from tests.backends import HAS_TRITON

ENCODE = (torch.zeros(1, 3, 2, 2), torch.zeros(4, 3), torch.zeros(4), 2)
REPLACE = (torch.randn(1, 3, 2, 2), torch.tensor([[True, False, False, True]]), torch.rand(1, 4), 2, 2)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("LBDT_BACKEND", raising=False)
    _dispatch.of_the_environment.cache_clear()
    yield
    _dispatch.of_the_environment.cache_clear()


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(_build, "load", lambda: "the C++ library is at the cleaner's")


@pytest.fixture
def spy(monkeypatch):
    """An op with three backends, and the names of those that ran."""
    ran = []
    monkeypatch.setitem(_dispatch._registry, "spy", {})
    for name, reason in (("triton", "needs CUDA"), ("cpp", None), ("reference", None)):
        _dispatch.register("spy", name, lambda *a, _r=reason, **k: _r, lambda *a, _n=name: ran.append(_n))
    return ran


def test_explain_names_the_choice_and_why_not_the_others(no_library):
    choice = ops.explain("encode_topk", *ENCODE)
    assert choice.op == "encode_topk" and choice.backend == "reference"
    assert set(choice.reasons) == {"triton", "cpp"}
    assert "cleaner's" in choice.reasons["cpp"] and choice.reasons["triton"]
    assert str(choice).splitlines()[0] == "encode_topk: reference" and "not cpp: " in str(choice)


def test_an_op_that_lacks_a_backend_says_so():
    choice = ops.explain("replace_patches", *REPLACE)
    assert choice.reasons["triton"] == "not implemented for this op in this version"
    with pytest.raises(ValueError, match="replace_patches: backend 'triton' cannot serve.*not implemented"):
        ops.replace_patches(*REPLACE, backend="triton")
    with ops.use_backend("triton"), pytest.raises(ValueError, match="cannot serve this call"):
        ops.replace_patches(*REPLACE)


def test_explain_takes_arguments_by_position_and_by_name():
    x, mask, u, height, width = REPLACE
    by_name = ops.explain("replace_patches", x=x, mask=mask, u=u, height=height, width=width)
    assert by_name == ops.explain("replace_patches", *REPLACE)


def test_explain_of_a_forced_backend_runs_nothing(spy):
    choice = ops.explain("spy", backend="reference")
    assert choice.backend == "reference" and spy == []
    assert choice.reasons == {"triton": "needs CUDA", "cpp": "usable, but reference was asked for"}


def test_auto_falls_back_and_says_why(no_library):
    choice = ops.explain("replace_patches", *REPLACE)
    assert choice.backend == "reference"
    assert choice.reasons["cpp"] == "the C++ library is at the cleaner's"
    expected = ops.replace_patches(*REPLACE, backend="reference")
    for got, wanted in zip(ops.replace_patches(*REPLACE), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_named_backend_that_cannot_serve_the_call_raises_its_reason(no_library):
    with pytest.raises(
        ValueError, match="replace_patches: backend 'cpp' cannot .* at the cleaner's.*reference"
    ):
        ops.replace_patches(*REPLACE, backend="cpp")
    with pytest.raises(ValueError, match="encode_topk: backend 'cpp' cannot serve.*at the cleaner's"):
        ops.encode_topk(*ENCODE, backend="cpp")
    with ops.use_backend("cpp"), pytest.raises(ValueError, match="cannot serve this call"):
        ops.encode_topk(*ENCODE)


def test_the_reason_is_about_the_tensors_not_the_machine():
    x, mask, u = (t.to("meta") for t in REPLACE[:3])
    choice = ops.explain("replace_patches", x, mask, u, 2, 2)
    assert choice.backend == "reference" and choice.reasons["cpp"] == "needs a CPU tensor, got one on meta"


def test_auto_passes_over_a_backend_that_declines_and_a_name_does_not(spy):
    _dispatch._registry["spy"].pop("cpp")
    _dispatch.register("spy", "cpp", _dispatch.always, lambda: spy.append("cpp"), lambda: "slow at this size")
    _dispatch.call("spy", "")
    _dispatch.call("spy", "cpp")
    assert spy == ["reference", "cpp"]
    assert ops.explain("spy").reasons["cpp"] == "usable, but slow at this size"
    assert ops.explain("spy", backend="cpp").backend == "cpp"


TRITON = [
    pytest.param({"_installed": False}, ENCODE, "triton is not installed: pip install", id="not-installed"),
    pytest.param({"interpreted": False}, ENCODE, "needs a CUDA tensor, got one on cpu", id="on-the-CPU"),
    pytest.param(
        {}, tuple(t.double() for t in ENCODE[:3]) + (2,), "needs float32, .*got float64", id="float64"
    ),
    pytest.param(
        {},
        (torch.empty_strided((1, 3, 1, 1), (0, 1 << 30, 1, 1), device="meta"), *ENCODE[1:]),
        r"needs channels within 2\*\*31 elements",
        id="far-channels",
    ),
]


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(("machine", "arguments", "reason"), TRITON)
def test_why_not_triton(machine, arguments, reason, monkeypatch):
    for name, answer in machine.items():
        monkeypatch.setattr(_triton, name, lambda answer=answer: answer)
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve this call: {reason}"):
        ops.explain("encode_topk", *arguments, backend="triton")


def test_a_gpu_that_is_too_old_for_the_kernels_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "8.0 or later, cuda:1 has 7.5" in _triton._unfit.__wrapped__(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _triton._unfit.__wrapped__(torch.device("cuda:1")) is None


def test_an_installation_without_the_kernels_is_an_error_not_a_fallback(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: __import__("lbdt.kernels_of_another_age"))
    with pytest.raises(ModuleNotFoundError, match="another_age"):
        _triton.kernels("encode_topk")

    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="lacks its package lbdt.kernels .* install lbdt with pip"):
        _triton.kernels("encode_topk")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_calls_on_the_cpu_do_not_import_triton():
    code = (
        "import sys, torch; from lbdt import ops\n"
        "ops.encode_topk(torch.ones(1, 3, 2, 2), torch.ones(4, 3), torch.zeros(4), 2)\n"
        "print('triton' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_keyword_goes_before_context_goes_before_environment(spy, monkeypatch):
    _dispatch.call("spy", "")
    monkeypatch.setenv("LBDT_BACKEND", "reference")
    _dispatch.call("spy", "")  # it was read before, when the first op ran
    _dispatch.of_the_environment.cache_clear()
    _dispatch.call("spy", "")
    with ops.use_backend("cpp"):
        _dispatch.call("spy", "")
        with ops.use_backend("auto"):
            _dispatch.call("spy", "")
        _dispatch.call("spy", "reference")
    _dispatch.call("spy", "")
    assert spy == ["cpp", "cpp", "reference", "cpp", "cpp", "reference", "reference"]


def test_use_backend_ends_with_its_block_and_stays_in_its_thread(spy):
    with pytest.raises(KeyError), ops.use_backend("reference"):
        thread = threading.Thread(target=_dispatch.call, args=("spy", ""))
        thread.start()
        thread.join()
        raise KeyError
    _dispatch.call("spy", "")
    assert spy == ["cpp", "cpp"]


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="unknown op 'erase'; known: detect_patches"):
        ops.explain("erase")
    with pytest.raises(ValueError, match="use_backend: unknown backend 'cuda'"), ops.use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match="backend: unknown backend 'cuda'; expected 'auto' or one of triton"):
        ops.encode_topk(*ENCODE, backend="cuda")
    monkeypatch.setenv("LBDT_BACKEND", "fast")
    _dispatch.of_the_environment.cache_clear()
    with pytest.raises(ValueError, match="LBDT_BACKEND: unknown backend 'fast'"):
        ops.encode_topk(*ENCODE)


def test_an_error_in_a_check_is_not_read_as_unsupported(monkeypatch):
    def broken():
        raise ImportError("present, and broken")

    monkeypatch.setattr(_build, "load", broken)
    with pytest.raises(ImportError, match="present, and broken"):
        ops.replace_patches(*REPLACE)


def test_a_second_implementation_of_the_same_pair_is_refused(spy):
    with pytest.raises(KeyError, match="already has a backend 'cpp'"):
        _dispatch.register("spy", "cpp", lambda: None, lambda: None)


def test_each_reason_is_logged_once(spy, caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_logged", set())
    with caplog.at_level(logging.DEBUG, logger="lbdt"):
        for _ in range(3):
            _dispatch.call("spy", "")
    assert sorted(record.getMessage() for record in caplog.records) == [
        "spy: reference not used: usable, but cpp comes first",
        "spy: triton not used: needs CUDA",
    ]


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A package folder without a built library and an empty cache; `load` without its memory."""
    monkeypatch.setattr(_build, "_PACKAGE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LBDT_JIT", raising=False)
    return tmp_path


def test_a_wheel_without_the_library_says_so(bare, monkeypatch):
    monkeypatch.setattr(_build, "_SOURCES", bare)
    assert "installed without a compiler" in _build.load.__wrapped__()


def test_the_build_at_first_use_can_be_forbidden(bare, monkeypatch):
    monkeypatch.setenv("LBDT_JIT", "0")
    assert "LBDT_JIT=0 forbids" in _build.load.__wrapped__()
    assert not (bare / "cache").exists()


def test_a_failed_build_warns_with_the_compiler_s_words(bare, monkeypatch):
    compiler = bare / "compiler"
    compiler.write_text("#!/bin/sh\necho 'ops.cpp:1: no' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(UserWarning, match="ops.cpp:1: no"):
        reason = _build.load.__wrapped__()
    assert "building the C++ library failed" in reason
    assert not list((bare / "cache").rglob("*.so"))


def test_a_broken_library_is_an_error_not_a_fallback(bare):
    (bare / _build.LIBRARY).write_bytes(b"not a library")
    with pytest.raises(ImportError, match="delete it, or reinstall"):
        _build.load.__wrapped__()
