"""`torch.save` files: checked as a zip first, then read by `torch.load(weights_only=True)`."""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MAX_ENTRIES = 256
_MAX_PICKLE = 1 << 20
_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double", "Long", "Int")),
}


def read_pth(path: Path, max_entries: int = _MAX_ENTRIES) -> Any:
    """What `torch.save` wrote, on the CPU: tensors, numbers, strings, lists and dictionaries.

    Before anything is loaded, there must be at most `max_entries` (a tensor is one), every entry must be stored uncompressed and all of them together must fit the file,
    the pickle in it must name nothing but tensors, and no tensor may be larger than the file.

    Raises:
        ValueError: no such file, no zip (torch before 1.6), a compressed or oversized entry, another name.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a file written by torch.save")
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive.infolist(), size, max_entries)
            _check_names(path, archive)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(
            f"{path}: not a zip file as torch.save writes since torch 1.6 ({error}); if an older torch wrote it, load "
            f"it there and save it again, else it is damaged"
        ) from error
    except Exception as error:  # torch.load raises nearly every kind, by the damage
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: not readable by torch.load ({first}); it is damaged, get it again"
        ) from error
    _check_sizes(path, value, size)
    return value


def _check_entries(path: Path, entries: list[zipfile.ZipInfo], size: int, most: int) -> None:
    if len(entries) > most:
        raise ValueError(f"{path}: expected at most {most} zip entries, got {len(entries)}")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(
                f"{path}: entry {entry.filename}: expected it uncompressed, as torch.save writes it, got "
                f"{entry.compress_size} bytes that stand for {entry.file_size}; refused, it could fill the memory"
            )
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise ValueError(
            f"{path}: the zip entries claim {total} bytes, but the file has {size}; refused, it could fill the memory"
        )


def _check_names(path: Path, archive: zipfile.ZipFile) -> None:
    pickles = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
        raise ValueError(
            f"{path}: expected one data.pkl of at most {_MAX_PICKLE} bytes in it, got "
            f"{[entry.file_size for entry in pickles]} bytes; torch.save wrote no such file"
        )
    for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
        if opcode.name == "GLOBAL" and argument in _NAMES:
            continue
        if opcode.name in (
            "GLOBAL",
            "STACK_GLOBAL",
            "INST",
            "OBJ",
            "NEWOBJ",
            "NEWOBJ_EX",
            "EXT1",
            "EXT2",
            "EXT4",
        ):
            asked = argument.replace(" ", ".") if isinstance(argument, str) else opcode.name
            raise ValueError(
                f"{path}: its pickle asks for {asked[:200]!r}, which is no part of tensors and numbers; refused, and "
                f"nothing in it was run"
            )


def _check_sizes(path: Path, value: Any, size: int) -> None:
    """A tensor of stride 0 may claim any shape. Looks at the two levels that checkpoints have, no deeper."""
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    values += [inner for item in values if isinstance(item, Mapping) for inner in item.values()]
    for tensor in values:
        if isinstance(tensor, Tensor) and math.prod(tensor.shape) * tensor.element_size() > size:
            raise ValueError(
                f"{path}: a tensor of shape {list(tensor.shape)} is larger than the file of {size} bytes; refused, it "
                f"could fill the memory"
            )
