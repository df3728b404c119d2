"""The PTX that nvcc compiles of csrc/cuda, run on the CPU: results, memory, the order of all accesses, and mutants.

What is launched, and with what, the ops' own host code says (`tests.kernels.ptx.cuda_launching`).
"""

import shutil
import struct
from collections import Counter

import pytest

from tests.kernels.cuda_inputs import replacement
from tests.kernels.ptx.cuda_cases import CUDA_CASES, MUTATED_CUDA, CudaCase
from tests.kernels.ptx.cuda_launching import NVCC, CudaRun, library, ready
from tests.kernels.ptx.memory import BadAccess
from tests.kernels.ptx.mutants import EQUIVALENT, FOUND, everything

pytestmark = pytest.mark.skipif(NVCC is None or not shutil.which("c++filt"), reason="needs nvcc and g++")

# Of either kernel, moving and averaging, whole vectors and not; `python -m tests.kernels.ptx.mutants` has all.
MUTATED = (
    *("tiles, planes, float16, random, avoid", "tiles, planes one by one, float32, random, avoid"),
    *("tiles, rows one by one, float64, random, avoid", "tiles, rows, bfloat16, mean, avoid"),
)


@pytest.mark.parametrize("name", CUDA_CASES)
def test_a_case_is_right_and_free_of_races(name):
    case = CudaRun(CUDA_CASES[name])
    (launch,) = case.run(seed=list(CUDA_CASES).index(name))
    assert case.wrong() is None
    assert launch.executed > 0


@pytest.fixture(scope="module")
def recorded() -> dict[str, tuple]:
    """By name of a case, the launch that it makes."""
    calls = {name: (case.call(), case.units) for name, case in (CUDA_CASES | MUTATED_CUDA).items()}
    return {name: library().record(call.op, units, *call.given)[0] for name, (call, units) in calls.items()}


def test_every_kernel_runs_in_both_ways(recorded):
    kernels = {name: library().names[launch.kernel] for name, launch in recorded.items()}
    every = set(library().names.values())
    for place in ("", "_"):
        run = {kernels[name] for name, case in CUDA_CASES.items() if case.op == f"replace_patches{place}"}
        assert run == {kernel for kernel in every if kernel.startswith("replace")}
    assert {kernels[name] for name in CUDA_CASES} == every


def test_every_kernel_with_barriers_is_mutated(recorded):
    mutated = {recorded[name].kernel for name in MUTATED_CUDA}
    assert mutated == {
        name for name, ptx in library().entries.items() if "\tbar." in ptx.partition(".entry")[2]
    }


def test_more_multiprocessors_take_more_blocks(recorded):
    few, many = (
        CudaRun(CUDA_CASES["chunks of channels"]._replace(units=units)).recorded[0].grid for units in (1, 2)
    )
    assert few < many


def test_every_missing_barrier_is_found_or_shown_to_keep_nothing_apart():
    judged = [judge.judge(*mutant) for judge, *mutant in everything((name, 90) for name in MUTATED)]
    assert {mutant.outcome for mutant in judged} == {FOUND, EQUIVALENT}, judged
    found = Counter(mutant.case for mutant in judged if mutant.outcome == FOUND)
    assert set(found) == set(MUTATED) and all(count >= 5 for count in found.values()), found


def test_a_launch_with_other_arguments_than_its_tensors_have_is_found():
    case = CudaRun(CudaCase("replace_patches", lambda: replacement(H=4, W=8)))
    (launch,) = case.recorded
    assert library().names[launch.kernel] == "replace_planes_kernel<unsigned int, 4, 1>"
    with pytest.raises(BadAccess, match="outside of every argument of the kernel"):
        ready(launch._replace(grid=(launch.grid[0] + 1, 1, 1)), case.memory).run()
    (given,) = launch.arguments
    shifted = struct.pack("<Q", struct.unpack("<Q", given[:8])[0] + 4) + given[8:]  # x is the first member
    with pytest.raises(BadAccess, match="is not a multiple of 16"):
        ready(launch._replace(arguments=[shifted]), case.memory).run()
    with pytest.raises(BadAccess, match="shared memory|outside of every variable"):
        ready(launch._replace(shared=launch.shared - 4), case.memory).run()


def test_a_large_map_asks_for_its_shared_memory():
    case = CudaRun(CudaCase("replace_patches", lambda: replacement(B=1, d=1, H=460, W=460, rate=0.001)))
    (launch,) = case.recorded
    assert launch.asked == launch.shared == -(-460 * 460 // 32) * 2 * 4  # two words of each 32 patches
    with pytest.raises(BadAccess, match="of which it asked for 0"):
        ready(launch._replace(asked=0), case.memory)
    with pytest.raises(BadAccess, match="compiled for 256 threads"):
        ready(launch._replace(block=(128, 1, 1)), case.memory)
