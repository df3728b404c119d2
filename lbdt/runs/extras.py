"""The packages of lbdt's extras."""

from __future__ import annotations

import importlib.util


def needed(what: str, extra: str, *modules: str) -> None:
    """ImportError, which says what to install for `what`, unless all of these can be found."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {' and '.join(missing)}: pip install lbdt[{extra}]")
