"""Fuzz targets: hypothesis tests whose number of cases and seed the command line says.

`pytest` runs 300 cases of each target, the same every time; `pytest -m fuzz --fuzz-cases 10000` as many with a fresh
seed, which the first lines of the output print: `--hypothesis-seed N` repeats them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

CASES = 300
"""Of each target in every run of the tests."""
_chosen = {"cases": CASES, "seed": 0}


def choose(cases: int, given_seed: str | None) -> str:
    """Sets the number of cases and the seed (None: 0 for `CASES` of them, else a fresh one) of targets defined from
    here on; a line that says them."""
    number = (
        int(given_seed) if given_seed and given_seed.isdecimal() else random.SystemRandom().getrandbits(32)
    )
    _chosen.update(cases=cases, seed=0 if given_seed is None and cases == CASES else number)
    return f"fuzz: {cases} cases a target (--fuzz-cases), seed {_chosen['seed']} (--hypothesis-seed)"


def chosen_seed() -> int:
    """The seed of this run."""
    return _chosen["seed"]


def fuzz(*strategies: Any, each: int = 1, **named: Any) -> Callable[[Callable], Callable]:
    """A fuzz target: `given(...)` with the chosen number of cases and seed, under the marker `fuzz`.

    `each`: cases that one call of the target makes itself.

    A failing case is shrunk and printed with what reproduces it.
    """

    def decorate(target: Callable) -> Callable:
        target = settings(
            max_examples=-(-_chosen["cases"] // each),
            deadline=None,
            derandomize=False,
            database=None,
            print_blob=True,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(given(*strategies, **named)(target))
        return pytest.mark.fuzz(seed(_chosen["seed"])(target))

    return decorate
