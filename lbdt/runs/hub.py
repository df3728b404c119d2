"""A folder given by path, or by the id of a Hugging Face repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

_REPO_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)
_PART = re.compile(r"[^\\/*?\[\]\x00-\x1f]+")
_DRIVE = re.compile(r"[A-Za-z]:")
_DEPTH = 3
_SHOWN = 20


def resolve_folder(
    path_or_repo: str | os.PathLike[str],
    hookpoint: str | None,
    marker: str | tuple[str, ...],
    files: tuple[str, ...],
    take_only: bool = False,
) -> Path:
    """The local folder of a path or Hub repository (`owner/name`, `owner/name@revision`) and its optional subfolder.

    `hookpoint` is a subfolder, or a path of them with "/". Only `files` (of the subfolder, if named) are downloaded.
    A folder counts as one when it holds a `marker` (any of several). Both may be patterns such as "*.pkl".
    `take_only`: where no subfolder is named and just one holds a marker, it is that one.
    With HF_HUB_OFFLINE=1 only the cache is read.

    Raises:
        ValueError: nothing to read, or a path that leaves the folder; names the subfolders that hold a marker when one
            has to be chosen.
    """
    markers = (marker,) if isinstance(marker, str) else marker
    check_subfolder(hookpoint)
    name = os.fspath(path_or_repo)
    root = Path(name)
    if not root.is_dir():
        if root.exists():
            raise ValueError(
                f"{name}: expected a folder holding {markers[0]}, got a file; pass the folder that contains it"
            )
        repo, revision = _repository(path_or_repo)
        root, hookpoint = _download(repo, revision, hookpoint, markers, files, take_only)
    folder = root if hookpoint is None else root / hookpoint
    if not folder.is_dir():
        raise ValueError(f"{name}: has no subfolder {hookpoint!r}{_listed(_choices(root, markers), markers)}")
    if hookpoint is None and not any(_holds(folder, mark) for mark in markers):
        choices = _choices(root, markers)
        if take_only and len(choices) == 1:
            return root / choices[0]
        if choices:
            raise ValueError(
                f"{name}: holds no {markers[0]} of its own; pass hookpoint=...{_listed(choices, markers)}"
            )
    return folder


def check_subfolder(hookpoint: str | None) -> None:
    """ValueError unless it is None or a path of plain folder names, "/" between them, that stays inside."""
    if hookpoint is not None and not _stays_inside(hookpoint):
        raise ValueError(
            f"hookpoint: expected the name of a subfolder such as 'unet.up_blocks.1.attentions.1', or a path of them "
            f"inside the folder ('NAME/final'), got {hookpoint!r}"
        )


def _stays_inside(subfolder: str) -> bool:
    """Colons are in the names of Concept Steerers' folders, which end with a time of day."""
    parts = subfolder.split("/")
    plain = all(_PART.fullmatch(part) and not set(part) <= {".", " "} for part in parts)
    return plain and not _DRIVE.match(subfolder)


def _repository(path_or_repo: str | os.PathLike[str]) -> tuple[str, str | None]:
    match = _REPO_ID.fullmatch(path_or_repo) if isinstance(path_or_repo, str) else None
    # Two dots in a row would be a way up in the cache; the Hub has no such names.
    if match is None or ".." in match[0] or "//" in match[0]:
        raise ValueError(
            f"{os.fspath(path_or_repo)}: no such folder, and not a Hugging Face repository id (owner/name or "
            f"owner/name@revision); check the path"
        )
    return match["repo"], match["revision"]


def _holds(folder: Path, name: str) -> bool:
    return next(folder.glob(name), None) is not None


def _choices(root: Path, markers: tuple[str, ...]) -> list[str]:
    """The subfolders that hold a marker."""
    found = (
        path.parent.relative_to(root).as_posix()
        for mark in markers
        for depth in range(1, _DEPTH + 1)
        for path in root.glob("*/" * depth + mark)
    )
    return sorted(set(found))


def _listed(names: list[str], markers: tuple[str, ...]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; subfolders with {' or '.join(markers)}: {', '.join(names[:_SHOWN])}{more}"


def _download(
    repo: str,
    revision: str | None,
    hookpoint: str | None,
    markers: tuple[str, ...],
    files: tuple[str, ...],
    take_only: bool,
) -> tuple[Path, str | None]:
    """The cached folder of a repository, and the subfolder that was downloaded of it."""
    from huggingface_hub import snapshot_download

    wanted = [file if hookpoint is None else f"{hookpoint}/{file}" for file in files]
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    # The HTTP library below huggingface_hub, and so its exceptions, differ between versions.
    except Exception as error:
        raise ValueError(_unreadable(repo, revision, error)) from error
    if not any(_holds(root, file) for file in wanted):
        choices = _remote_choices(repo, revision, markers)
        if take_only and hookpoint is None and len(choices) == 1 and _stays_inside(choices[0]):
            return _download(repo, revision, choices[0], markers, files, False)
        shown = repo if revision is None else f"{repo}@{revision}"
        advice = _listed(choices, markers).replace("; sub", "; pass hookpoint=...; sub", 1)
        raise ValueError(f"{shown}: holds none of {', '.join(wanted)}{advice}")
    return root, hookpoint


def _unreadable(repo: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants

    shown = repo if revision is None else f"{repo}@{revision}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = (
        f"{shown}: no such folder, and the Hugging Face repository of that name could not be read ({reason})"
    )
    if constants.HF_HUB_OFFLINE:
        return (
            f"{text}; HF_HUB_OFFLINE is set, so only the cache {constants.HF_HUB_CACHE} is read: unset it, or fill the "
            f"cache on a machine with network"
        )
    return f"{text}; check the name, the network, and HF_HUB_OFFLINE"


def _remote_choices(repo: str, revision: str | None, markers: tuple[str, ...]) -> list[str]:
    from huggingface_hub import HfApi

    try:
        listed = HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # only a hint is lost
        return []
    folders = {path.rpartition("/")[0] for path in listed if path.rpartition("/")[2] in markers}
    return sorted(folders - {""})
