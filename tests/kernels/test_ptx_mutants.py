"""Whether the PTX runner finds a synchronisation that is missing: a sample of the mutants of the compiled kernels.

`python -m tests.kernels.ptx.mutants` judges all of them.
"""

import pytest

from tests.backends import HAS_TRITON
from tests.kernels import triton_process

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

# Of all kinds of waits: asynchronous copies into products of either kind, mbarriers, and barriers of global memory.
CASES = (
    *(("half", 90), ("half, update, channels last", 90), ("gated over calls", 80)),
    # The other tiles of the same kernels.
    *(("many survivors", 90), ("many survivors, update", 90), ("many survivors", 80)),
    *(("screened", 90), ("screened from afar", 90), ("screened, few", 90)),
    ("tensor maps", 90),
)
COUNT = 60


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> list[dict]:
    cases = [argument for name, arch in CASES for argument in ("--of", f"{arch} {name}")]
    return triton_process.lines(
        triton_process.PINNED,
        triton_process.cache(tmp_path_factory),
        "tests.kernels.ptx.mutants",
        *("--json", "--sample", str(COUNT), *cases),
    )


def test_at_least_95_per_cent_of_the_mutants_that_change_something_are_found(judged):
    assert len(judged) == COUNT
    changing = [mutant for mutant in judged if mutant["outcome"] != "equivalent"]
    missed = [mutant for mutant in changing if mutant["outcome"] != "found"]
    assert len(changing) > COUNT / 2
    assert len(missed) <= 0.05 * len(changing), missed


def test_the_sample_has_every_kind_of_synchronisation(judged):
    assert {mutant["kind"] for mutant in judged} == {
        *("barrier", "wait for copies", "wait for products", "proxy fence", "register fence", "mbarrier"),
    }
    assert all(mutant["why"] for mutant in judged)
