"""The library behind `torch.ops.lbdt.*`: a schema is defined once, in its op's file, and every backend serves it."""

from collections.abc import Callable
from typing import Any

import torch

# Held for the life of the process: an unreferenced Library takes its ops away.
_LIBRARY = torch.library.Library("lbdt", "FRAGMENT")


def define(schema: str) -> None:
    """Defines a public op.

    An empty `backend` means use_backend's, then LBDT_BACKEND's, then "auto"; it is resolved when the op runs.
    """
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def define_internal(schema: str) -> None:
    """Defines an op that the C++ library alone implements: it writes into its arguments and returns nothing."""
    define(schema)
    torch.library.register_fake(f"lbdt::{schema.partition('(')[0]}", lambda *args: None, lib=_LIBRARY)


def implement(op: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes `run` the public op on every device, and `fake` its shapes and dtypes under tracing."""
    _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lbdt::{op}", fake, lib=_LIBRARY)
