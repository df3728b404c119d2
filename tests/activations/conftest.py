"""A tiny pipeline shared by the tests of this folder, which leave it as it was."""

import pytest

from tests import toy


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))
