"""`detect_patches` with a screen from few rows and survivors on: its launches as they are of many, on few."""

from unittest import mock

from torch import Tensor

from lbdt.kernels import _screen
from lbdt.kernels.detect_patches import detect_patches


def screened_patches(**arguments) -> Tensor:
    """`detect_patches`, which screens more than 64 survivors of any number of rows."""
    with mock.patch.multiple(_screen, LEAST_ROWS=1, unscreened=lambda rows: 64):
        return detect_patches(**arguments)
