"""Pictures made with one setting, in a folder: resumable, by several processes, always the same pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbdt.editors import UnetEditor
from lbdt.evaluation.concept_texts import BY_TEXT, ConceptTexts
from lbdt.evaluation.evaluated_world import EvaluatedKind, Judge, Verdicts
from lbdt.evaluation.jobs import Job
from lbdt.runs.digests import sha256
from lbdt.runs.files import json_bytes, open_tensors, read_json, tensor_bytes, write_files
from lbdt.runs.settings import keep_settings
from lbdt.runs.wording import slug

STEERED = ("steering", "by class")
"""The methods that steer: one strength for all concepts, or strength and selection of each one's own."""
_NO_STYLE = -2
_VERSION = 2
"""The layout of a series' folder, so that one of another layout is refused."""


@dataclass(frozen=True)
class Series:
    """Pictures that are made alike."""

    name: str
    """The name of its folder, e.g. "saeuron/scored/per-padding1-nearest"."""
    kind: EvaluatedKind
    method: str
    """ "base" | "negative" | "uce" | "steering" | "by class" | "ungated" | "per"."""
    settings: Mapping[str, Any] = field(hash=False)
    jobs: tuple[Job, ...]
    watched: bool = False
    """Keep a sample of the hooked block's output."""
    stacked: bool = False
    """One attachment for each erased concept, in their order, instead of one for all."""
    texts: ConceptTexts | None = field(default=None, compare=False)
    """What the methods that work by text are told; None for others."""

    @property
    def shared(self) -> bool:
        """Whether kinds of equal sampling have it in common, as there is no SAE in it."""
        return self.method == "base" or self.method in BY_TEXT

    def batches(self, size: int) -> list[tuple[Job, ...]]:
        """The jobs, `size` at a time: a picture's last bits may depend on its batch, so batches never
        change."""
        return [self.jobs[first : first + size] for first in range(0, len(self.jobs), size)]

    def editors(self) -> list[UnetEditor]:
        """The erasers or steerings to attach: none for the base and by text, one, or for stacked ones one for
        each concept."""
        if self.shared:
            return []
        make = self.kind.steering if self.method in STEERED else self.kind.per
        count = max((len(job.erased) for job in self.jobs), default=0) if self.stacked else 1
        return [make(**self.settings) for _ in range(count)]


class SeriesFiles:
    """The folder of one series under an evaluation's folder.

    Of batch 12 it holds the pictures `0012-*.png`, `0012.safetensors` (start seeds, digests, masks, watched rows) and
    `0012.json`, written in this order, so that what has a JSON is whole; then the scorers' verdicts
    `0012.DIGEST.safetensors`.
    """

    def __init__(self, root: Path, series: Series, size: int, about: Mapping[str, Any]) -> None:
        """`about`: what else the pictures depend on, such as the pipeline's fingerprint."""
        self.series, self.size = series, size
        self.folder = root / series.name
        self.about = {
            **about,
            "version": _VERSION,
            "kind": None if series.shared else series.kind.name,
            "method": series.method,
            "settings": dict(series.settings),
            "steps": series.kind.steps,
            "guidance": series.kind.guidance,
            "batch": size,
            "watched": series.watched,
            "stacked": series.stacked,
            "jobs": [[*job.prompt.to_dict().values(), job.beside, *job.erased] for job in series.jobs],
        }

    def prepare(self) -> None:
        """Writes series.json, or compares it; ValueError where the folder holds another series."""
        keep_settings(
            self.folder,
            "series.json",
            self.about,
            "holds pictures made otherwise ({names} differ); give the same settings to continue, or another --out",
        )

    def has(self, index: int) -> bool:
        """Whether batch `index` is there."""
        return self._path(index, ".json").is_file()

    def write(self, index: int, pictures: Sequence[Any], tensors: Mapping[str, Tensor], record: dict) -> None:
        """Writes batch `index`: PIL pictures, tensors and what else is to be known of it."""
        names = self.names(index)
        contents: dict[str, bytes] = {}
        for name, picture in zip(names, pictures, strict=True):
            data = io.BytesIO()
            picture.save(data, format="PNG", compress_level=1)
            contents[name] = data.getvalue()
        contents[self._path(index, ".safetensors").name] = tensor_bytes(tensors, None)
        write_files(self.folder, contents)
        write_files(self.folder, {self._path(index, ".json").name: json_bytes(record)})

    def names(self, index: int) -> list[str]:
        """The pictures' file names: batch, place, concept, what stands beside it, style and seed."""
        names = []
        jobs = self.series.jobs[index * self.size : (index + 1) * self.size]
        for place, job in enumerate(jobs):
            labels = [job.prompt.concept, job.beside, job.prompt.style, str(job.prompt.seed)]
            names.append(f"{index:04d}-{place:02d}-{slug(' '.join(label for label in labels if label))}.png")
        return names

    def pictures(self, index: int) -> list[Any]:
        """The RGB pictures of batch `index`; ValueError for one that is missing or damaged."""
        from lbdt.evaluation.pictures import read_picture

        advice = f"remove {self._path(index, '.json')} to make its batch again"
        return [read_picture(self.folder / name, advice) for name in self.names(index)]

    def record(self, index: int) -> dict[str, Any]:
        """The JSON of batch `index`; ValueError for one that is damaged."""
        path = self._path(index, ".json")
        record = read_json(path)
        if not isinstance(record, dict):
            raise ValueError(f"{path}: expected a JSON object; remove it to make its batch again")
        return record

    def tensors(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors `names` of batch `index`; ValueError for a file that is damaged or lacks one."""
        again = f"remove {self._path(index, '.json')} to make its batch again"
        return self._read(self._path(index, ".safetensors"), again, names)

    def _read(self, path: Path, advice: str, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        with open_tensors(path, "a batch's tensors", advice, "not readable") as file:
            there = set(file.keys())
            names = sorted(there) if names is None else names
            missing = [name for name in names if name not in there]
            if missing:
                raise ValueError(f"{path}: has no tensor {', '.join(missing)}; {advice}")
            return {name: file.get_tensor(name) for name in names}

    def judge(self, index: int, judge: Judge) -> Verdicts:
        """The verdicts on batch `index`, from the file of an earlier call if there is one."""

        def verdicts() -> dict[str, Tensor]:
            objects, styles, features = judge(self.pictures(index))
            unknown = torch.full((len(objects),), _NO_STYLE)
            tensors = {"objects": objects, "styles": unknown if styles is None else styles}
            return tensors | {"features": features.float()}

        got = self.scored(index, f"seen, {judge.name}, {judge.features_name}", verdicts)
        styles = None if bool((got["styles"] == _NO_STYLE).any()) else got["styles"]
        return Verdicts(got["objects"], styles, got["features"])

    def scored(self, index: int, scorer: str, score: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `score()` says of batch `index`, one row a picture; kept under the scorer's name, so asked
        once."""
        digest = sha256(scorer)[:8]
        path = self._path(index, f".{digest}.safetensors")
        if not path.is_file():
            write_files(self.folder, {path.name: tensor_bytes(score(), None)})
        return self._read(path, "remove it, and run the same command again")

    def _path(self, index: int, ending: str) -> Path:
        return self.folder / f"{index:04d}{ending}"
