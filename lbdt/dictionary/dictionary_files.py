"""Dictionary files: `dictionary.json` + `dictionary.safetensors`, strict to read, atomic to write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lbdt.dictionary.activation_histograms import Histograms
from lbdt.dictionary.picture_counts import PictureCounts
from lbdt.runs.files import json_bytes, read_json, read_tensors, tensor_bytes
from lbdt.runs.folder import write_folder
from lbdt.runs.hub import resolve_folder
from lbdt.runs.reading import MAX_FLOAT, brief, listed
from lbdt.runs.settings import plain

INFO_FILE = "dictionary.json"
TENSORS_FILE = "dictionary.safetensors"
_VERSION = 7
_KEYS = ("version", "concepts", "timesteps", "num_latents", "peak", "calibrated", "bank")
_SINCE = {2: {"fired"}, 3: {"assigned"}, 4: {"gate"}, 5: {"site"}}
_GATE_KEYS = {"patches", "selection", "false_positive", "over", "several"}
_GATE_ADDED = {6: {"over": "call"}, 7: {"several": []}}
"""What the gates of older versions lack, and what they meant."""


def save(
    parts: Mapping[str, Any], directory: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Writes a dictionary's parts, the arguments of `ConceptDictionary`, to `directory` (made if needed); each file
    appears whole or not at all.

    `dtype` float16 halves the means and the bank; thresholds then round by up to 0.05 %, and means below 6e-8
    become 0. Histogram edges stay float32; counts are stored as int32 where they fit.

    Raises:
        ValueError: values that overflow `dtype`.
    """
    tensors = {"mean": parts["mean"], "counts": parts["counts"]}
    histograms = parts["histograms"]
    if histograms is not None:
        tensors |= {
            "candidates": histograms.candidates,
            "on": histograms.on,
            "off": histograms.off,
            "edges": histograms.edges,
        }
        for name in ("candidates", "on", "off"):
            if int(tensors[name].max()) < 2**31:
                tensors[name] = tensors[name].int()
    tensors |= {name: parts[name] for name in ("bank", "fired") if parts[name] is not None}
    gate = parts["gate"]
    if gate is not None:
        tensors |= {"gate_on": gate.on.int(), "gate_off": gate.off.int()}
    info = {
        "version": _VERSION,
        "concepts": list(parts["concepts"]),
        "timesteps": parts["timesteps"].tolist(),
        "num_latents": parts["mean"].shape[2],
        "peak": parts["peak"],
        "calibrated": histograms is not None,
        "bank": parts["bank"] is not None,
        "fired": parts["fired"] is not None,
        "assigned": parts["assigned"],
        "gate": None if gate is None else {name: plain(getattr(gate, name)) for name in sorted(_GATE_KEYS)},
        "site": parts["site"],
    }
    write_folder(
        Path(directory),
        {INFO_FILE: json_bytes(info), TENSORS_FILE: tensor_bytes(tensors, dtype, keep=("edges",))},
    )


def load(path_or_repo: str | os.PathLike[str], subfolder: str | None) -> tuple[Path, dict[str, Any]]:
    """The folder of a path or Hugging Face repository, and the parts of the dictionary in it: the arguments of
    `ConceptDictionary`, which checks that they fit.

    Raises:
        ValueError: anything absent, unreadable, of another shape, NaN or infinite, naming file and tensor.
    """
    folder = resolve_folder(path_or_repo, subfolder, marker=INFO_FILE, files=(INFO_FILE, TENSORS_FILE))
    path = folder / INFO_FILE
    info = read_json(path)
    if not isinstance(info, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(info).__name__}")
    version = info.get("version")
    if type(version) is not int or version not in range(1, _VERSION + 1):
        raise ValueError(
            f"{path}: expected version 1 to {_VERSION}, got {brief(version)}; use a matching lbdt"
        )
    keys = set(_KEYS).union(*(added for since, added in _SINCE.items() if since <= version))
    wrong = sorted(set(info) ^ keys)
    if wrong:
        raise ValueError(
            f"{path}: expected exactly the keys {', '.join(sorted(keys))}; missing or unknown: {listed(wrong)}"
        )
    concepts, timesteps = info["concepts"], info["timesteps"]
    if not isinstance(concepts, list) or not isinstance(timesteps, list):
        raise ValueError(f"{path}: expected lists 'concepts' and 'timesteps'")
    peak = info["peak"]
    if isinstance(peak, bool) or not isinstance(peak, (int, float)) or not abs(peak) <= MAX_FLOAT:
        raise ValueError(f"{path}: peak: expected a finite number, got {brief(peak)}")
    assigned = info.get("assigned")
    if assigned is not None and not isinstance(assigned, dict):
        raise ValueError(f"{path}: assigned: expected an object of names and latents, got {brief(assigned)}")
    if type(info["num_latents"]) is not int or info["num_latents"] < 1:
        raise ValueError(f"{path}: num_latents: expected an integer >= 1, got {brief(info['num_latents'])}")
    for name in ("calibrated", "bank", "fired"):
        if not isinstance(info.get(name, False), bool):
            raise ValueError(f"{path}: {name}: expected true or false, got {brief(info[name])}")
    gate = info.get("gate")
    for since, added in _GATE_ADDED.items():
        if since > version and isinstance(gate, dict) and not set(gate) & set(added):
            gate = gate | added
    if gate is not None and (not isinstance(gate, dict) or set(gate) != _GATE_KEYS):
        raise ValueError(
            f"{path}: gate: expected null or an object of {', '.join(sorted(_GATE_KEYS))}, got {brief(gate)}"
        )
    place = (len(concepts), len(timesteps))
    shapes: dict[str, tuple[int | None, ...]] = {"mean": (*place, info["num_latents"]), "counts": place}
    if info["calibrated"]:
        shapes |= {
            "candidates": (*place, None),
            "on": (*place, None, None),
            "off": (*place, None, None),
            "edges": (None,),
        }
    if info["bank"]:
        shapes["bank"] = (place[1], None, None)
    if info.get("fired"):
        shapes["fired"] = (info["num_latents"],)
    if gate is not None:
        shapes |= {"gate_on": (*place, None), "gate_off": (*place, None)}
    tensors = read_tensors(folder / TENSORS_FILE, shapes)
    histograms = None
    if info["calibrated"]:
        histograms = Histograms(
            *(tensors[name].long() for name in ("candidates", "on", "off")), edges=tensors["edges"].float()
        )
    return folder, {
        "concepts": concepts,
        "timesteps": timesteps,
        "mean": tensors["mean"],
        "counts": tensors["counts"],
        "histograms": histograms,
        "bank": tensors.get("bank"),
        "peak": peak,
        "fired": tensors.get("fired"),
        "assigned": assigned,
        "gate": None
        if gate is None
        else PictureCounts(
            *(tensors[name].long() for name in ("gate_on", "gate_off")),
            **gate
            | {"several": tuple(gate["several"]) if isinstance(gate["several"], list) else gate["several"]},
        ),
        "site": info.get("site"),
    }
