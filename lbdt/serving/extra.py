"""The packages of the extra `serve`."""

from __future__ import annotations

import importlib.util


def needed(*modules: str) -> None:
    """ImportError, which says what to install, unless all of these can be found."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"this needs {' and '.join(missing)}: pip install lbdt[serve]")
