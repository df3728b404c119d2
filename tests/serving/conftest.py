"""A batch job that ran without an interruption, for those who continue or refuse it."""

import pytest

from lbdt.serving.jobs import generate
from tests.serving.jobs import LINES, small_job, write


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prompts") / "jobs.jsonl", LINES)


@pytest.fixture(scope="session")
def unbroken(prompts, tmp_path_factory):
    """The folder of a job that one process made without an interruption."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    result = generate(small_job(prompts, out))
    assert (result.made, result.there, result.interrupted) == (5, 0, False)
    return out
