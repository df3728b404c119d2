"""`test_ptx_kernels.py` with the oldest Triton that is supported, in a file of its own: xdist shares out files."""

import pytest

from tests.kernels.test_ptx_kernels import (  # noqa: F401
    outcomes,
    pytestmark,
    test_every_case_is_right_and_free_of_races,
    test_every_kernel_was_run,
    test_the_cases_tell_patches_apart,
)


@pytest.fixture(scope="module")
def version() -> str:
    return "oldest"
