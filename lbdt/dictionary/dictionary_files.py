"""Dictionary files: `dictionary.json` + `dictionary.safetensors`, strict to read, atomic to write."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lbdt.dictionary.activation_histograms import Histograms
from lbdt.dictionary.concept_dictionary import ConceptDictionary
from lbdt.runs.files import json_bytes, read_json, read_tensors, tensor_bytes
from lbdt.runs.folder import write_folder
from lbdt.runs.hub import resolve_folder
from lbdt.runs.reading import MAX_FLOAT, brief, listed

INFO_FILE = "dictionary.json"
TENSORS_FILE = "dictionary.safetensors"
_VERSION = 3
_KEYS = ("version", "concepts", "timesteps", "num_latents", "peak", "calibrated", "bank")
_SINCE = {2: {"fired"}, 3: {"assigned"}}


def save(
    dictionary: ConceptDictionary, directory: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Writes `dictionary` to `directory` (made if needed); each file appears whole or not at all.

    `dtype` float16 halves the means and the bank; thresholds then round by up to 0.05 %, and means below 6e-8
    become 0. Histogram edges stay float32; counts are stored as int32 where they fit.

    Raises:
        ValueError: values that overflow `dtype`.
    """
    tensors = {"mean": dictionary.mean, "counts": dictionary.counts}
    histograms = dictionary.histograms
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
    if dictionary.bank is not None:
        tensors["bank"] = dictionary.bank
    if dictionary.fired is not None:
        tensors["fired"] = dictionary.fired
    info = {
        "version": _VERSION,
        "concepts": list(dictionary.concepts),
        "timesteps": dictionary.timesteps.tolist(),
        "num_latents": dictionary.num_latents,
        "peak": dictionary.peak,
        "calibrated": histograms is not None,
        "bank": dictionary.bank is not None,
        "fired": dictionary.fired is not None,
        "assigned": dictionary.assigned,
    }
    write_folder(
        Path(directory),
        {INFO_FILE: json_bytes(info), TENSORS_FILE: tensor_bytes(tensors, dtype, keep=("edges",))},
    )


def load(path_or_repo: str | os.PathLike[str], subfolder: str | None = None) -> ConceptDictionary:
    """The dictionary in a folder or Hugging Face repository, as float32 and int64.

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
    tensors = read_tensors(folder / TENSORS_FILE, shapes)
    histograms = None
    if info["calibrated"]:
        histograms = Histograms(
            *(tensors[name].long() for name in ("candidates", "on", "off")), edges=tensors["edges"].float()
        )
    try:
        return ConceptDictionary(
            concepts,
            timesteps,
            tensors["mean"],
            tensors["counts"],
            histograms,
            tensors.get("bank"),
            peak,
            tensors.get("fired"),
            assigned,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: not a valid dictionary: {error}") from error
