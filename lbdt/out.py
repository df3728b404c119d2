"""The `--out` of every command that writes a file."""

from __future__ import annotations

import os
from pathlib import Path


def check_out(path: Path, what: str) -> None:
    """ValueError unless a file of this name can be written there, its folder made if needed; makes nothing.

    `what` names the file in the message, e.g. "picture".
    """
    if path.is_dir():
        raise ValueError(f"--out {path}: is a folder; give the {what}'s file name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"--out {path}: cannot write in {folder}; give a place in a folder of yours")
