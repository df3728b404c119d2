"""Whether two runs of one computation gave the same: in their bits, but for tensors misaligned on purpose.

torch aligns whatever it allocates to 64 bytes, and no product depends on an address any further, so that a run repeats
in its bits. With `.ci/test --misaligned` no two products agree so far; then TOLERANCES hold.
"""

import io
import json
import math
import os
import re
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from lbdt.testing import TOLERANCES, assert_close

MISALIGNED = os.environ.get("LBDT_TEST_MISALIGNED") == "1"
_NUMBER = r"-?\d+\.\d+(?:e-?\d+)?"


def repeats(actual: Any, expected: Any) -> bool:
    """Whether tensors, numbers, text, pictures, a file's bytes, or lists and dicts of them, are another run's."""
    return _close(actual, expected) if MISALIGNED else _equal(actual, expected)


def matches(actual: Tensor, expected: Tensor) -> Tensor:
    """bool, where two runs' tensors agree as `repeats` takes it; shapes broadcast."""
    if not MISALIGNED:
        return actual == expected
    _, largest = TOLERANCES[expected.dtype, "repeated"]
    return (actual - expected).abs() <= largest * expected.abs().max()


def _equal(actual: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(actual, expected)
    if isinstance(expected, list | tuple):
        return len(actual) == len(expected) and all(map(_equal, actual, expected))
    if isinstance(expected, Image.Image):
        return actual.tobytes() == expected.tobytes()
    return actual == expected


def _close(actual: Any, expected: Any) -> bool:
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, Tensor):
        return _close_tensors(actual, expected)
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(
            _close(actual[key], expected[key]) for key in expected
        )
    if isinstance(expected, list | tuple):
        return len(actual) == len(expected) and all(map(_close, actual, expected))
    if isinstance(expected, bytes):
        return _close(_content(actual), _content(expected))
    if isinstance(expected, str):
        texts = actual, expected
        numbers = [[float(number) for number in re.findall(_NUMBER, text)] for text in texts]
        # A digest says that the bits differ, which is known.
        rest = {re.sub(rf"{_NUMBER}|\b[0-9a-f]{{64}}\b", "", text) for text in texts}
        return len(rest) == 1 and _close(*numbers)
    if isinstance(expected, Image.Image):
        return _close(*(torch.from_numpy(np.array(picture)) for picture in (actual, expected)))
    if is_dataclass(expected):
        return _close(asdict(actual), asdict(expected))
    if isinstance(expected, float):
        return math.isclose(actual, expected, rel_tol=1e-3, abs_tol=1e-4)
    return actual == expected


def _close_tensors(actual: Tensor, expected: Tensor) -> bool:
    if expected.is_floating_point():
        assert_close(actual, expected, "repeated")
        return True
    # Counts and colours: what lies on an edge is taken for one side or the other.
    same = actual.shape == expected.shape and actual.dtype == expected.dtype
    return same and bool(((actual.double() - expected.double()).abs() <= 2).all())


def _content(data: bytes) -> Any:
    if data.startswith(b"\x89PNG"):
        return Image.open(io.BytesIO(data))
    try:
        tensors = safetensors.torch.load(data)
        tensors.pop("digests", None)  # of pictures, likewise
        return tensors
    except safetensors.SafetensorError:
        pass
    try:
        return json.loads(data)
    except ValueError:
        return data.decode()
