"""Checkpoint files: lbdt's own `cfg.json` + `sae.safetensors`, atomic to write, and the other projects' (METHOD.md,
7.1), strict to read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbdt.formats import FORMATS
from lbdt.runs.files import json_bytes, read_json, read_tensors, require_floats, tensor_bytes
from lbdt.runs.folder import write_folder
from lbdt.runs.hub import resolve_folder
from lbdt.runs.reading import brief
from lbdt.runs.site_names import site_name
from lbdt.sae import unbox
from lbdt.sae.config import PRE_ENCODER, SAEConfig

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
_MARKERS = (CONFIG_FILE, unbox.WEIGHTS_FILE)
_SAFE = (CONFIG_FILE, WEIGHTS_FILE)
_PICKLED = (unbox.CONFIG_FILE, CONFIG_FILE, unbox.WEIGHTS_FILE)
_EVERY = tuple(dict.fromkeys(_SAFE + _PICKLED))
_FILES = dict.fromkeys(FORMATS, _SAFE) | {
    "auto": _EVERY,
    "saemnesia": _EVERY,
    "sdxl-unbox": _PICKLED,
    "steerers": _PICKLED,
}
_SPARSIFY_OFF = {
    "transcode": "it predicts another activation than it sees",
    "skip_connection": "its output has a linear part that no latent explains",
    "embed_skip": "its output has a part that no latent explains",
    "gram_lookup": "its input is corrected by a table of token n-grams",
    "signed": "its latents may be negative, and detection is defined for latents above 0",
}
"""Keys of EleutherAI's sparsify that change the function, and why only false is read."""
_SPARSIFY_UNUSED = ("lookup_max_order", "gram_table_hash", "init_b_dec_as_zeros")
_HOOKPOINT = re.compile(
    r"((?:unet\.(?:down_blocks|mid_block|up_blocks)|text_encoder(?:_\d+)?)(?:\.(?:[A-Za-z]\w*?|\d+))+)"
    r"(?:_k\d+_hidden\d+.*)?",
    re.ASCII,
)
"""The name of a folder that is a block's, as SAeUron's, or with the settings of the training, as sdxl-unbox's and
Concept Steerers' (text encoder layers)."""
_SAELENS = frozenset(("architecture", "hook_name", "hook_point", "d_sae"))
"""Keys of SAELens's `cfg.json`, of any version some."""


def save(
    config: SAEConfig,
    tensors: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    encoder_only: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes an SAE's configuration and tensors to `directory` (made if needed), readable by SAeUron's own loader when
    the activation is topk, with a pre-encoder by SAEParate's; of other kinds, which it would take for that one, it
    finds no `d_in`.

    `encoder_only` leaves `W_dec` out; `dtype` (float16, bfloat16, float32) casts the weights. A crash leaves no half
    file, and over an earlier SAE no file of one beside a file of the other.

    Raises:
        ValueError: NaN or infinite weights, or weights that overflow `dtype`.
    """
    config = replace(config, encoder_only=encoder_only or "W_dec" not in tensors)
    kept = {name: tensors[name].detach().cpu().contiguous() for name in config.shapes()}
    write_folder(
        Path(directory),
        {
            CONFIG_FILE: json_bytes(config.file_json()),
            WEIGHTS_FILE: tensor_bytes(kept, dtype),
        },
    )


class CheckpointFiles(NamedTuple):
    """What an SAE's files hold, and what they do not say."""

    config: SAEConfig
    tensors: dict[str, Tensor]
    """Those of `SAEConfig.shapes`, in the files' dtypes."""
    format: str
    """The one of `lbdt.formats.FORMATS` that they were read as; never "auto"."""
    folder: Path
    assumptions: tuple[str, ...]
    """What was taken for granted, one sentence each."""


def read(
    path_or_repo: str | os.PathLike[str],
    hookpoint: str | None = None,
    format: str = "auto",
    update: bool | None = None,
) -> CheckpointFiles:
    """An SAE's files in a folder, or in a Hugging Face repository (`owner/name[@revision]`; offline mode is honoured).

    `hookpoint` names a subfolder (SAeUron keeps one per hook point), or a path of them; None: the folder itself, or the
    only one in it that holds an SAE. `format` is one of `lbdt.formats.FORMATS`; "auto" goes by the files, which cannot
    tell a G-SAE (its sigmoid) from SAeUron's: name that one. sdxl-unbox's and steerers' are told apart by the name of
    their folder, a UNet block's or a text encoder layer's; of other names one has to be given. `update`, whether the
    SAE is one of the block's output minus its input, is known for lbdt's files, sdxl-unbox's (yes) and steerers' (no),
    and may be given for others (no). The site is lbdt's files', or that of other projects' folders which have the name
    of a block or layer. No pickle is run: see `lbdt.formats.pth`.

    Raises:
        ValueError: anything absent, unreadable, of another shape, NaN or infinite; the text names it and says
            what was expected.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}; got {format!r}")
    folder = resolve_folder(path_or_repo, hookpoint, marker=_MARKERS, files=_FILES[format], take_only=True)
    files = _read(folder, format, update)
    root = Path(path_or_repo)
    if hookpoint is None and root.is_dir() and folder != root:
        note = f"the SAE is {folder.relative_to(root)}, the only one there"
        files = files._replace(assumptions=(*files.assumptions, note))
    block = None if files.format == "lbdt" else _block_of(folder)
    if block is None or files.config.site is not None:
        return files
    site = site_name(block, files.config.update)
    note = f"the SAE is one of {site}, by the name of its folder"
    config = replace(files.config, site=site)
    return files._replace(config=config, assumptions=(*files.assumptions, note))


def _read(folder: Path, format: str, update: bool | None) -> CheckpointFiles:
    """`read`, of a folder; no site but one that the files name."""
    _refuse_others(folder)
    named = format != "auto"
    if not named:
        format = _detect(folder, update)
    if format in ("sdxl-unbox", "steerers") or (
        format == "saemnesia"
        and not (folder / WEIGHTS_FILE).exists()
        and (folder / unbox.WEIGHTS_FILE).exists()
    ):
        return _read_unbox(folder, format, named, update)
    path = folder / CONFIG_FILE
    config = _config_of(read_json(path), format, str(path))
    notes = list(_notes(format, named, update))
    if update is not None and update != config.update:
        if format == "lbdt":
            raise ValueError(
                f"{path}: update: the file says {str(config.update).lower()}; leave the option out"
            )
        config = replace(config, update=update)
    if config.pre_encoder and format not in ("lbdt", "saeparate"):
        raise ValueError(
            f"{path}: {PRE_ENCODER}: true is SAEParate's, and an SAE of {format} has no pre-encoder; "
            "read it as saeparate (lbdt convert: --from saeparate)"
        )
    tensors = read_tensors(folder / WEIGHTS_FILE, config.shapes())
    require_floats(folder / WEIGHTS_FILE, tensors)
    return CheckpointFiles(config, tensors, format, folder, tuple(notes))


def _read_unbox(folder: Path, format: str, named: bool, update: bool | None) -> CheckpointFiles:
    notes = []
    if update is None:
        if format == "saemnesia":
            raise ValueError(
                f"{folder}: {unbox.WEIGHTS_FILE} does not say whether the SAE is one of the block's output or of its "
                f"output minus its input (residual_sae in SAEmnesia); pass format='sdxl-unbox' for the difference, "
                f"'steerers' for the output (lbdt convert: --update or --no-update)"
            )
        update = format == "sdxl-unbox"
        side = "output minus its input" if update else "output"
        told = "auxk_coef in its configuration" if _block_of(folder) is None else "the name of its folder"
        reason = f"as {format}'s are" if named else f"as {format}'s are, by {told}"
        notes.append(f"the SAE is one of the block's {side}, {reason}")
    return CheckpointFiles(*unbox.read(folder, update), format, folder, tuple(notes))


def _block_of(folder: Path) -> str | None:
    """The block whose name the folder has, or the one that sdxl-unbox's "final" is in."""
    folder = folder.absolute()
    name = folder.parent.name if folder.name == "final" else folder.name
    match = _HOOKPOINT.fullmatch(name)
    return None if match is None else match[1]


def _refuse_others(folder: Path) -> None:
    """ValueError, naming the project, where the files are of one that lbdt does not read."""
    config, trainer = folder / CONFIG_FILE, folder / unbox.CONFIG_FILE
    project = None
    if config.is_file():
        values = read_json(config)
        project = "SAELens" if isinstance(values, dict) and _SAELENS & set(values) else None
    elif trainer.is_file() and not (folder / unbox.WEIGHTS_FILE).is_file():
        values = read_json(trainer)
        project = "dictionary_learning" if isinstance(values, dict) and "trainer" in values else None
    elif (folder / "ae.pt").is_file():
        project = "dictionary_learning"
    if project is not None:
        raise ValueError(
            f"{folder}: an SAE of {project}, whose files lbdt does not read; expected those of "
            f"{', '.join(FORMATS[1:])} (lbdt/METHOD.md, 7): write a ReLU or TopK one as {CONFIG_FILE} and "
            f"{WEIGHTS_FILE} of 7.1, or train one with lbdt train"
        )


def _detect(folder: Path, update: bool | None) -> str:
    """The format of a folder, from its name, its files and the keys of its configuration; ValueError where none is
    readable, or more than one possible and `update` does not say which."""
    config = folder / CONFIG_FILE
    if (folder / unbox.WEIGHTS_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        if config.is_file() and not (folder / unbox.CONFIG_FILE).is_file():
            return "saemnesia"
        kinds = {"steerers"} if "auxk_coef" in unbox.read_config(folder) else set()
        block = _block_of(folder)
        if block is not None:
            kinds.add("sdxl-unbox" if block.startswith("unet.") else "steerers")
        if len(kinds) == 1:
            return kinds.pop()
        if update is not None:
            return "sdxl-unbox" if update else "steerers"
        why = (
            "its name is sdxl-unbox's and its auxk_coef Concept Steerers'"
            if kinds
            else "its name is no block's"
        )
        raise ValueError(
            f"{folder}: {unbox.CONFIG_FILE} and {unbox.WEIGHTS_FILE} are sdxl-unbox's, of a UNet block's output minus "
            f"its input, or Concept Steerers', of a text encoder layer's output, and {why}; pass format='sdxl-unbox' "
            f"or 'steerers' (lbdt convert: --from), or keep the name of its run, such as "
            f"unet.down_blocks.2.attentions.1_k10_hidden5120_..."
        )
    values = read_json(config)
    keys = set(values) if isinstance(values, dict) else set()
    if keys & {*_SPARSIFY_OFF, *_SPARSIFY_UNUSED}:
        return "sparsify"
    if "encoder_only" in keys:
        return "lbdt"
    return "saeparate" if PRE_ENCODER in keys else "saeuron"


def _config_of(values: Any, format: str, source: str) -> SAEConfig:
    """A parsed `cfg.json`; `source` names it in errors.

    Raises:
        ValueError: what `SAEConfig.from_json` refuses; a sparsify coder that is no plain TopK autoencoder.
    """
    if format == "sparsify" and isinstance(values, dict):
        values = _sparsify(values, source)
    if format == "gsae" and isinstance(values, dict):
        given = values.get("activation", "topk_sigmoid")
        if given != "topk_sigmoid":
            raise ValueError(
                f"{source}: activation: a G-SAE's is topk_sigmoid, got {brief(given)}; it is no G-SAE"
            )
        values = {**values, "activation": "topk_sigmoid"}
    return SAEConfig.from_json(values, source=source)


def _notes(format: str, named: bool, update: bool | None) -> Iterator[str]:
    """What the files of a format leave open; `update` as the caller gave it."""
    if format == "gsae":
        yield "z = sigmoid(TopK(pre)), as in the diffusion version of G-SAE; the files do not say it"
    elif format in ("saeuron", "saemnesia", "saeparate", "sparsify"):
        yield "TopK per patch, then ReLU; the files do not say it"
    if format in ("saeuron", "saemnesia", "saeparate", "gsae") and update is None:
        yield "the SAE is one of the block's output, as SAeUron's are"
    if format == "saeuron" and not named:
        yield "no G-SAE, whose files look the same (--from gsae)"


def _sparsify(values: dict[str, Any], source: str) -> dict[str, Any]:
    for key, reason in _SPARSIFY_OFF.items():
        if values.get(key, False) is not False:
            raise ValueError(
                f"{source}: {key}: {brief(values[key])} is not supported ({reason}); use a coder without it"
            )
    activation = values.get("activation", "topk")
    if activation != "topk":
        raise ValueError(
            f"{source}: activation: {brief(activation)} is not supported (lbdt knows no such rank test); "
            "expected 'topk'"
        )
    return {key: value for key, value in values.items() if key not in (*_SPARSIFY_OFF, *_SPARSIFY_UNUSED)}
