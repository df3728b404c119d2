"""A folder given by path, or by the id of a Hugging Face repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")


def resolve_folder(
    path_or_repo: str | os.PathLike[str], hookpoint: str | None, marker: str, files: tuple[str, ...]
) -> Path:
    """The local folder of a path or Hub repository and its optional subfolder.

    Only `files` (of the subfolder, if named) are downloaded. Raises ValueError when there is nothing to read;
    names the subfolders that hold `marker` when one has to be chosen.
    """
    if hookpoint is not None and (hookpoint in ("", ".", "..") or "/" in hookpoint or "\\" in hookpoint):
        raise ValueError(
            f"hookpoint: expected the name of a subfolder such as 'unet.up_blocks.1.attentions.1', got "
            f"{hookpoint!r}"
        )
    name = os.fspath(path_or_repo)
    root = Path(name)
    if not root.is_dir():
        if root.exists():
            raise ValueError(
                f"{name}: expected a folder holding {marker}, got a file; pass the folder that contains it"
            )
        if not isinstance(path_or_repo, str) or not _REPO_ID.fullmatch(name):
            raise ValueError(
                f"{name}: no such folder, and not a Hugging Face repository id (owner/name); check the path"
            )
        root = _download(name, hookpoint, marker, files)
    folder = root if hookpoint is None else root / hookpoint
    if not folder.is_dir():
        raise ValueError(f"{name}: has no subfolder {hookpoint!r}{_choices(root, marker)}")
    if hookpoint is None and not (folder / marker).exists():
        choices = _choices(root, marker)
        if choices:
            raise ValueError(f"{name}: holds no {marker} of its own; pass hookpoint=...{choices}")
    return folder


def _choices(root: Path, marker: str) -> str:
    names = sorted(path.parent.name for path in root.glob(f"*/{marker}"))
    return f"; subfolders with {marker}: {', '.join(names)}" if names else ""


def _download(repo: str, hookpoint: str | None, marker: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"*/{marker}", *(file if hookpoint is None else f"{hookpoint}/{file}" for file in files)]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{repo}: no such folder, and the Hugging Face repository of that name could not be read "
            f"({reason}); check the name, the network, and HF_HUB_OFFLINE"
        ) from error
