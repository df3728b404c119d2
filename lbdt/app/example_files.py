"""The examples that ship with EmojiCanvas's erasers, in `lbdt/canvas/weights/examples`: the pictures once for each
sampling, as one sheet, and for each eraser which of their patches fire each of its latents most.

`python -m benchmarks.latent_examples` makes them.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import safetensors
import safetensors.torch
import torch
from PIL import Image

from lbdt.activations.prompts import Prompt
from lbdt.app.examples import ExampleSet, Firings
from lbdt.app.settings import digest_of_sae
from lbdt.canvas import KINDS, WEIGHTS, Sampling
from lbdt.runs.files import write_files

if TYPE_CHECKING:
    from lbdt.editors import ConceptEraser, Steering

FOLDER = WEIGHTS / "examples"
_ACROSS = 16
_QUALITY = 85
_STORED = {"values": torch.float16, "pictures": torch.int16, "timesteps": torch.int16, "places": torch.int16}


class PictureSheet(NamedTuple):
    """Pictures of one size, and their prompts."""

    prompts: tuple[Prompt, ...]
    pictures: dict[int, Image.Image]


def sheet_name(sampling: Sampling) -> str:
    """The file of the pictures of a sampling."""
    return f"pictures-{sampling.steps}-{sampling.guidance:g}.safetensors"


def write_sheet(
    folder: Path, sampling: Sampling, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]
) -> None:
    """Writes pictures of one size as a JPEG sheet, without the colours' usual halving, and their prompts."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (_ACROSS * width, -(-len(pictures) // _ACROSS) * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, _corner(number, width, height))
    data = io.BytesIO()
    sheet.save(data, format="JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    tensors = {"jpeg": torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)}
    about = {
        "prompts": json.dumps([prompt.to_dict() for prompt in prompts], ensure_ascii=False),
        "size": json.dumps([width, height]),
    }
    write_files(folder, {sheet_name(sampling): safetensors.torch.save(tensors, metadata=about)})


def read_sheet(folder: Path, name: str) -> PictureSheet:
    """What `write_sheet` wrote."""
    tensors, about = _read(folder / name)
    prompts = tuple(_prompt(values) for values in json.loads(about["prompts"]))
    width, height = json.loads(about["size"])
    with Image.open(io.BytesIO(tensors["jpeg"].numpy().tobytes()), formats=("JPEG",)) as sheet:
        whole = sheet.convert("RGB")
    pictures = {}
    for number in range(len(prompts)):
        left, top = _corner(number, width, height)
        pictures[number] = whole.crop((left, top, left + width, top + height))
    return PictureSheet(prompts, pictures)


def write_firings(folder: Path, kind: str, editor: ConceptEraser, found: ExampleSet) -> None:
    """Writes the firings of every latent of an embedded eraser, which are of the pictures of its sampling's sheet."""
    tensors = {name: getattr(found.firings, name).to(dtype) for name, dtype in _STORED.items()}
    about = {
        "sae": digest_of_sae(editor.sae),
        "sheet": sheet_name(KINDS[kind]),
        "grid": json.dumps(found.grid),
    }
    write_files(folder, {f"{kind}.safetensors": safetensors.torch.save(tensors, metadata=about)})


def stored_for(editor: ConceptEraser | Steering, folder: Path = FOLDER) -> ExampleSet | None:
    """The stored examples of the SAE that an editor looks with, whatever folder it came from; None: there are none."""
    return _by_digest(folder).get(digest_of_sae(editor.sae), lambda: None)()


@functools.lru_cache(maxsize=4)
def _by_digest(folder: Path):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if "sae" in about:
            found[about["sae"]] = functools.partial(_example_set, path)
    return found


@functools.lru_cache(maxsize=len(KINDS))
def _example_set(path: Path) -> ExampleSet:
    tensors, about = _read(path)
    sheet = _sheet(path.parent, about["sheet"])
    firings = Firings(
        tensors["values"].float(),
        tensors["pictures"].long(),
        tensors["timesteps"].float(),
        tensors["places"].long(),
    )
    return ExampleSet(
        tuple(range(len(firings.values))),
        firings,
        tuple(json.loads(about["grid"])),
        sheet.prompts,
        sheet.pictures,
    )


@functools.lru_cache(maxsize=2)
def _sheet(folder: Path, name: str) -> PictureSheet:
    return read_sheet(folder, name)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _prompt(values: dict) -> Prompt:
    return Prompt(
        values["prompt"],
        values["concept"],
        values["style"],
        values["seed"],
        tuple(values.get("beside") or ()),
    )


def _corner(number: int, width: int, height: int) -> tuple[int, int]:
    return number % _ACROSS * width, number // _ACROSS * height
