"""The PTX that Triton compiles for sm_90 and sm_80, run on the CPU: results, memory, and the order of all accesses."""

import pytest

from tests.backends import HAS_TRITON
from tests.kernels import triton_process
from tests.kernels.test_triton_compile import KERNELS

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

MASKS = (
    "half",
    "half, channels last",
    "bfloat16",
    "float32",
    "half, update",
    "ragged",
    "ties",
    "gated over calls",
)


@pytest.fixture(scope="module")
def version() -> str:
    """`test_ptx_oldest.py` has another."""
    return triton_process.PINNED


@pytest.fixture(scope="module")
def outcomes(version, tmp_path_factory) -> tuple[str, list[dict]]:
    """Of all cases, of the oldest Triton those of every kernel: a process compiles and runs them one by one."""
    triton_process.needs(version)
    which = "--oldest" if version == "oldest" else "--suite"
    cache = triton_process.cache(tmp_path_factory)
    return version, triton_process.lines(version, cache, "tests.kernels.ptx.run", which)


def test_every_case_is_right_and_free_of_races(outcomes):
    version, results = outcomes
    wrong = [result for result in results if result["wrong"] or result["error"]]
    assert wrong == []
    assert {tuple(result["triton"]) for result in results} == {triton_process.version_of(version)}


def test_every_kernel_was_run(outcomes):
    version, results = outcomes
    run = {kernel for result in results for kernel in result["kernels"]}
    assert run >= KERNELS
    assert {result["arch"] for result in results} == ({80, 90} if version == triton_process.PINNED else {90})
    assert all(count > 0 for result in results for count in result["executed"])


def test_the_cases_tell_patches_apart(outcomes):
    """A mask of only ones or zeros would not tell a wrong kernel."""
    version, results = outcomes
    values = {result["case"]: result["values"] for result in results}
    assert all(values[name] == [0, 1] for name in MASKS if version == triton_process.PINNED or name in values)
    if version == triton_process.PINNED:
        assert values["no candidate"] == values["all refuted"] == [0]
