"""Reading and writing JSON and safetensors files: strict to read, atomic to write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lbdt.runs.reading import listed, open_regular, reason
from lbdt.runs.reading import read_json as read_json
from lbdt.runs.writable import unwritable

_TEMPORARY = ".lbdt-"
_FOLDER = ".new"
_LONGEST = 50  # characters, of 4 bytes at most
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int | None, ...]],  # None: any size
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Exactly the tensors `shapes` names, on the CPU, from a safetensors file; floating-point ones must be
    finite, also in `dtype`, which they are computed with.

    Raises ValueError naming file, tensor, expected and got.
    """
    with open_tensors(path, f"tensors {listed(shapes)} in it") as file:
        _check_names(path, file.keys(), shapes)
        # Copies: a mapped file's tensors lie anywhere, so that products may round differently, and change with it.
        tensors = {name: file.get_tensor(name).clone() for name in shapes}
    check_tensors(path, tensors, shapes, dtype)
    return tensors


@contextlib.contextmanager
def open_tensors(
    path: Path,
    expected: str,
    advice: str = "it is truncated or damaged, get it again",
    unreadable: str = "not a readable safetensors file",
) -> Iterator[Any]:
    """An open safetensors file; ValueError naming it where it is absent, no regular file or damaged."""
    open_regular(path, expected).close()
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            yield file
    # TypeError: a dtype that torch has not.
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path}: {unreadable} ({reason(error)}); {advice}") from error


def check_tensors(
    path: Path,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int | None, ...]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """ValueError naming `path` and the tensor unless `tensors` are exactly those of `shapes` (None: any size), dense,
    on the CPU and, where floating-point, finite, also in `dtype`."""
    _check_names(path, tensors, shapes)
    for key, expected in shapes.items():
        tensor, name = tensors[key], listed([key])
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name}: expected a dense tensor, got {type(tensor).__name__}")
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
            raise ValueError(f"{path}: tensor {name}: expected numbers of 16 to 64 bits, got {tensor.dtype}")
        got = tuple(tensor.shape)
        if len(got) != len(expected) or any(
            e is not None and e != g for e, g in zip(expected, got, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise ValueError(f"{path}: tensor {name}: expected shape [{wanted}], got {list(got)}")
        complaint = _finite(tensor, dtype)
        if complaint:
            raise ValueError(f"{path}: tensor {name}: {complaint}")


def require_floats(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """ValueError naming `path` and the tensor unless all are floating-point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {listed([name])}: expected floating-point numbers, got {tensor.dtype}")


def _check_names(path: Path, names: Collection[str], shapes: Collection[str]) -> None:
    missing = [name for name in shapes if name not in names]
    if missing:
        raise ValueError(
            f"{path}: missing tensor {listed(missing)}; expected {listed(shapes)}, got "
            f"{listed(sorted(names)) or 'none'}"
        )
    unknown = sorted(set(names) - set(shapes))
    if unknown:
        raise ValueError(f"{path}: unknown tensor {listed(unknown)}; expected only {listed(shapes)}")


def _finite(tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    if not torch.is_floating_point(tensor):
        return None
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        return f"expected finite values, got {bad} NaN or infinite of {tensor.numel()}"
    if dtype is None or not tensor.numel() or torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return None
    largest = max(abs(float(end)) for end in tensor.aminmax())
    return f"values up to {largest:.3g} overflow {dtype}" if largest > torch.finfo(dtype).max else None


def tensor_bytes(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, keep: tuple[str, ...] = ()
) -> bytes:
    """A safetensors file's bytes, floating-point tensors but those of `keep` cast to `dtype`.

    Raises ValueError on NaN, infinity and overflow.
    """
    cast = {}
    for name, tensor in tensors.items():
        if dtype is not None and torch.is_floating_point(tensor) and name not in keep:
            complaint = _finite(tensor)
            tensor, source = tensor.to(dtype), tensor
            if not complaint and _finite(tensor):
                complaint = (
                    f"values up to {float(source.abs().max()):.3g} overflow {dtype}; save with a wider dtype"
                )
        else:
            complaint = _finite(tensor)
        if complaint:
            raise ValueError(f"tensor {name}: {complaint}; nothing was written")
        cast[name] = tensor.contiguous()
    return safetensors.torch.save(cast, metadata={"format": "pt"})


def json_bytes(values: Any) -> bytes:
    """Indented UTF-8 JSON with a final newline."""
    return (json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_files(directory: Path, contents: Mapping[str, bytes | tuple[bytes | memoryview, ...]]) -> None:
    """Writes every file (one piece, or several in a row) under a temporary name, then renames them all (`os.replace`).

    What killed processes left half written in `directory` is removed.

    Raises:
        OSError: the file, why it cannot be written, and what to do; every file is as it was.
    """
    with contextlib.ExitStack() as stack:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        written: list[tuple[str, Path]] = []
        for name, data in contents.items():
            with writing(directory / name):
                file, temporary = stack.enter_context(_temporary(directory, name))
                written.append((temporary, directory / name))
                # mkstemp makes private files; what is shipped must be readable like any other file.
                os.fchmod(file.fileno(), 0o644)
                for piece in data if isinstance(data, tuple) else (data,):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in written:
            with writing(path):
                os.replace(temporary, path)


def write_file(path: Path, data: bytes) -> None:
    """One file, as `write_files` writes it; a link is followed, and a device or a pipe is written to as it is."""
    path = Path(os.path.realpath(path))
    if not path.exists() or path.is_file():
        write_files(path.parent, {path.name: data})
        return
    with writing(path), path.open("wb") as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError of the block becomes one that names `path`, the reason and what to do, with the same `errno`."""
    try:
        yield
    except OSError as error:
        told = OSError(f"{path}: cannot be written: {unwritable(error)}")
        told.errno = error.errno
        raise told from error


def remove_leftovers(directory: Path) -> None:
    """Removes the temporary files and folders of killed processes in `directory`; those in use are locked, and stay."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        # Also where the file system knows no locks: then nothing tells whose the file is.
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not path.is_dir():
                    path.unlink()
                elif path.name.endswith(_FOLDER):
                    shutil.rmtree(path)
            finally:
                os.close(handle)


def temporary_folder(directory: Path, name: str) -> Path:
    """A new folder in `directory`, for what will be called `name`; `remove_leftovers` knows it."""
    return Path(tempfile.mkdtemp(dir=directory, prefix=_prefix(name), suffix=_FOLDER))


def _prefix(name: str) -> str:
    return f"{_TEMPORARY}{name[:_LONGEST]}."


@contextlib.contextmanager
def _temporary(directory: Path, name: str) -> Iterator[tuple[BinaryIO, str]]:
    """A new file, locked while it is open, and its path; removed in the end unless it was renamed."""
    while True:
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=_prefix(name))
        file = os.fdopen(handle, "wb")
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(handle).st_nlink:
                continue  # another process took it for a leftover before it was locked
            yield file, temporary
            return
        finally:
            Path(temporary).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what could not be written is tried again here
                file.close()
