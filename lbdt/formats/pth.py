"""`torch.save` files: a zip whose pickle `lbdt.formats.machine` reads, so that nothing of it is imported or run."""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt.formats.machine import STORAGES, Call, Machine, Storage
from lbdt.runs.reading import brief, open_regular, reason

_MAX_ENTRIES = 256
_MAX_PICKLE = 1 << 20


def read_pth(path: Path, max_entries: int = _MAX_ENTRIES) -> Any:
    """What `torch.save` wrote, on the CPU: tensors, numbers, strings, lists and dictionaries (ordered ones without
    their attributes).

    There must be at most `max_entries` (a tensor is one), every entry must be stored uncompressed and all of them
    together must fit the file, the pickle in it must name nothing but tensors, and no tensor may be larger than the
    file. Nothing of it is run; torch's own loader is not used.

    Raises:
        ValueError: no such file, no zip (torch before 1.6), a compressed or oversized entry, another name, bytes that
            are not those that were written.
    """
    with open_regular(path, "a file written by torch.save") as file:
        size = os.fstat(file.fileno()).st_size
        with _damage(path):
            archive = zipfile.ZipFile(file)
        _check_entries(path, archive.infolist(), size, max_entries)
        return _Saved(path, archive, size).run()


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile raises nearly every kind, by the damage
        raise ValueError(
            f"{path}: not a zip file as torch.save writes since torch 1.6 ({reason(error)}); if an older torch wrote "
            f"it, load it there and save it again, else it is damaged"
        ) from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo], size: int, most: int) -> None:
    if len(entries) > most:
        raise ValueError(f"{path}: expected at most {most} zip entries, got {len(entries)}")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(
                f"{path}: entry {brief(entry.filename)}: expected it uncompressed, as torch.save writes it, got "
                f"{entry.compress_size} bytes that stand for {entry.file_size}; refused, it could fill the memory"
            )
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise ValueError(
            f"{path}: the zip entries claim {total} bytes, but the file has {size}; refused, it could fill the memory"
        )


class _Saved(Machine):
    """The machine of a zip's `data.pkl`, with its entries as storages."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, size: int) -> None:
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
            raise ValueError(
                f"{path}: expected one data.pkl of at most {_MAX_PICKLE} bytes in it, got "
                f"{[entry.file_size for entry in pickles]} bytes; torch.save wrote no such file"
            )
        with _damage(path):
            data = archive.read(pickles[0])
        super().__init__(io.BytesIO(data), len(data), path, _CALLS)
        self.stores, self.archive, self.size = True, archive, size
        self.root = pickles[0].filename.removesuffix("data.pkl")
        self.entries = {entry.filename: entry for entry in archive.infolist()}
        self.loaded: dict[str, Tensor] = {}
        order = self.entries.get(f"{self.root}byteorder")
        if order is not None and self.read_entry(order) != b"little":
            raise ValueError(f"{path}: saved on a big-endian machine; save it again on another one")

    def read_entry(self, entry: zipfile.ZipInfo) -> bytes:
        with _damage(self.path):
            return self.archive.read(entry)

    def build(self) -> None:
        """Attributes of an OrderedDict, such as a state_dict's `_metadata`, are passed over."""
        if len(self.stack) > 1 and type(self.stack[-2]) is dict and type(self.stack[-1]) is dict:
            self.pop()
        else:
            super().build()

    def bytes_of(self, storage: Storage) -> Tensor:
        """A storage's values, 1-D; tensors that share a storage share its memory."""
        if storage.key not in self.loaded:
            entry = self.entries.get(f"{self.root}data/{storage.key}")
            if entry is None or entry.file_size != storage.numel * storage.dtype.itemsize:
                held = "none" if entry is None else entry.file_size
                raise self.refused(f"a storage of {storage.numel} {storage.dtype} values in {held} bytes")
            data = bytearray(self.read_entry(entry))
            self.loaded[storage.key] = (
                torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
            )
        values = self.loaded[storage.key]
        if values.dtype != storage.dtype or len(values) != storage.numel:
            raise self.refused("a storage of two dtypes or sizes")
        return values


def _rebuild_tensor(machine: _Saved, arguments: tuple[Any, ...]) -> Tensor | None:
    match arguments:
        case (Storage() as storage, int() as offset, size, stride, bool(), {}):
            sizes, strides = machine.sizes(size), machine.sizes(stride)
        case _:
            return None
    values = machine.bytes_of(storage)
    nbytes = math.prod(sizes) * values.element_size()
    if nbytes > machine.size:
        raise machine.refused(
            f"a tensor of shape {list(sizes)} is larger than the file of {machine.size} bytes"
        )
    last = sum((n - 1) * step for n, step in zip(sizes, strides, strict=False)) if nbytes else -1
    if len(sizes) != len(strides) or not 0 <= offset <= len(values) - 1 - last:
        raise machine.refused(f"a tensor of shape {list(sizes)} outside of its storage")
    return values.as_strided(sizes, strides, offset)


def _rebuild_parameter(machine: Machine, arguments: tuple[Any, ...]) -> Tensor | None:
    match arguments:
        case (Tensor() as data, bool(), {}):
            return data
    return None


def _ordered(machine: Machine, arguments: tuple[Any, ...]) -> dict | None:
    return None if arguments else {}


_CALLS: dict[str, Call | None] = {
    **dict.fromkeys(STORAGES),
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
