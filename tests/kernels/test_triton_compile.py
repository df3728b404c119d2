"""The Triton kernels as machine code for three generations of GPUs, without one: instructions, registers, memory."""

import re
import tomllib
from collections import defaultdict

import pytest

from tests.backends import HAS_TRITON
from tests.kernels import triton_process
from tests.kernels.budgets import BUDGETS

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

SHARED = {
    80: 163,
    90: 227,
    100: 227,
}  # KiB a program may have (CUDA C++ programming guide, table of capabilities)
PRODUCTS = ("detect_patches_candidates_kernel", "detect_patches_count_kernel", "encode_topk_part_kernel")
SCREEN = "detect_patches_screen_kernel"  # of half precision alone
KERNELS = {
    *(SCREEN, "detect_patches_code_kernel", "detect_patches_pairs_kernel"),
    *(*PRODUCTS, "detect_patches_gate_kernel"),
    *("encode_topk_merge_kernel", "patch_uniform_kernel", "record_patches_kernel"),
    *("erase_step_rows_kernel", "erase_step_keep_kernel"),
}


def by_kernel(version: str, arch: int, cache, *cases: str) -> dict[str, list[dict]]:
    """Results of a process of its own."""
    results = defaultdict(list)
    for result in triton_process.lines(version, cache, "tests.kernels.compile_triton", str(arch), *cases):
        results[result["kernel"]].append(result)
        print(
            f"sm_{result['arch']} {result['case']}: {result['kernel']} {result['registers']} registers, "
            f"{result['shared']} bytes shared, {result['warps']} warps, {result['wgmma']} wgmma, {result['mma']} mma"
        )
    return results


@pytest.fixture(scope="module", params=sorted(SHARED), ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    return request.param, by_kernel(
        triton_process.PINNED, request.param, triton_process.cache(tmp_path_factory)
    )


@pytest.fixture(scope="module")
def compiled_by_the_oldest(tmp_path_factory):
    triton_process.needs("oldest")
    return by_kernel("oldest", 90, triton_process.cache(tmp_path_factory), "budgets")


def keeps_its_budgets(results: dict[str, list[dict]], version: tuple[int, ...]) -> None:
    """Asserts every row of the version's table; a later Triton than the pinned one has none."""
    worse = {}
    for budget in BUDGETS.get(version, ()):
        (got,) = (r for r in results[budget.kernel] if r["case"] == budget.case)
        assert set(got["products"]) == ({budget.product} if budget.product else set()), got
        if (
            got["registers"] > budget.registers
            or got["blocks"] < budget.blocks
            or got["element_loads"] > budget.loads
            or got["products_in_flight"] < budget.products_in_flight
            or got["copies_in_flight"] < budget.copies_in_flight
        ):
            worse[budget] = got
    assert worse == {}


def test_every_kernel_fits(compiled):
    arch, results = compiled
    assert set(results) == KERNELS
    for result in (r for group in results.values() for r in group):
        assert result["registers"] <= 255, result
        # The tile sizes are chosen for the pinned compiler; Triton 3.6 spills up to 400 bytes in some.
        assert result["spilled"] == 0 or triton_process.version_of(triton_process.PINNED) < (3, 9), result
        assert result["registers"] * 32 * result["warps"] <= 65536, result
        assert result["shared"] <= SHARED[arch] * 1024, result


def test_half_precision_uses_the_tensor_cores(compiled):
    arch, results = compiled
    for name in PRODUCTS:
        half = [r for r in results[name] if "float32" not in r["case"]]
        assert half and all(r["wgmma"] + r["mma"] > 0 for r in half), name
        # Exact float32 takes no tensor core: TF32 is asked for, never assumed.
        single = [r for r in results[name] if "float32" in r["case"]]
        assert single and all(r["wgmma"] + r["mma"] == 0 for r in single), name
    assert all(r["wgmma"] + r["mma"] > 0 for r in results[SCREEN])
    if arch == 90:
        assert all(
            r["wgmma"] > 0 for r in results["detect_patches_count_kernel"] if "float32" not in r["case"]
        )
        assert all(r["wgmma"] > 0 for r in results[SCREEN])


def test_the_dictionary_is_read_ahead_of_its_use(compiled):
    _, results = compiled
    for name in (*PRODUCTS, SCREEN):
        assert all(r["cp_async"] > 0 for r in results[name]), name


def test_the_machine_code_keeps_its_budgets(compiled):
    arch, results = compiled
    # Products that wait for each other, as their registers are used in between.
    assert not [r for group in results.values() for r in group if r["serialised"]]
    if arch == 90:
        keeps_its_budgets(results, triton_process.version_of(triton_process.PINNED))


def test_the_oldest_triton_is_that_of_the_project_file():
    extras = tomllib.loads((triton_process.ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.search(r"triton==([\d.]+)", (triton_process.ROOT / ".ci/oldest-triton.txt").read_text())[1]
    for extra in ("test", "gpu"):
        (bound,) = (
            re.match(r"triton>=([\d.]+)", line)[1] for line in extras[extra] if line.startswith("triton")
        )
        assert named.removesuffix(".0") == bound


def test_the_oldest_triton_compiles_every_kernel_within_its_budgets(compiled_by_the_oldest):
    assert set(compiled_by_the_oldest) == KERNELS
    for result in (r for group in compiled_by_the_oldest.values() for r in group):
        assert result["registers"] * 32 * result["warps"] <= 65536 and not result["serialised"], result
        assert result["shared"] <= SHARED[90] * 1024, result
    keeps_its_budgets(compiled_by_the_oldest, triton_process.version_of("oldest"))
