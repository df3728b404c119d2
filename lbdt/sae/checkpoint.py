"""Checkpoint files: `cfg.json` + `sae.safetensors`, strict to read, atomic to write; no pickles."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lbdt.sae.config import SAEConfig
from lbdt.sae.model import SparseAutoencoder

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
FORMATS = ("auto", "lbdt", "saeuron", "sdxl-unbox")
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+")


def save(
    sae: SparseAutoencoder,
    directory: str | os.PathLike[str],
    encoder_only: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `sae` to `directory` (made if needed), readable by SAeUron's own loader when the activation is
    topk.

    `encoder_only` leaves `W_dec` out; `dtype` (float16, bfloat16, float32) casts the weights. Both files are
    written beside their final names first and then renamed, so a crash leaves the old files or the new ones,
    no half file.

    Raises:
        ValueError: NaN or infinite weights, or weights that overflow `dtype`.
    """
    without_decoder = encoder_only or sae.W_dec is None
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in sae.state_dict().items()
        if not (without_decoder and name == "W_dec")
    }
    write_files(
        Path(directory),
        {
            CONFIG_FILE: json_bytes(replace(sae.config, encoder_only=without_decoder).to_json()),
            WEIGHTS_FILE: tensor_bytes(tensors, dtype),
        },
    )


def load(
    path_or_repo: str | os.PathLike[str], hookpoint: str | None = None, format: str = "auto"
) -> SparseAutoencoder:
    """The SAE in a folder, or in a Hugging Face repository (`owner/name`; offline mode is honoured).

    `hookpoint` names a subfolder (SAeUron keeps one per hook point). The weights come back in float32,
    whatever the file's dtype, without gradients; cast with `.half()` where the pipeline is in half precision.

    Raises:
        ValueError: anything absent, unreadable, of another shape, NaN or infinite; the text names it and says
            what was expected. sdxl-unbox checkpoints (pickles) are refused.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}; got {format!r}")
    folder = resolve_folder(path_or_repo, hookpoint, marker=CONFIG_FILE, files=(CONFIG_FILE, WEIGHTS_FILE))
    pickled = sorted(path.name for path in folder.glob("state_dict.pth"))
    if format == "sdxl-unbox" or (pickled and not (folder / CONFIG_FILE).exists()):
        raise ValueError(
            f"{folder}: sdxl-unbox checkpoints (config.json + state_dict.pth, a pickle) are not read here; "
            f"expected {CONFIG_FILE} and {WEIGHTS_FILE}. Convert the checkpoint to safetensors first"
        )
    config = SAEConfig.from_json(read_json(folder / CONFIG_FILE), source=str(folder / CONFIG_FILE))
    with torch.device("meta"):
        sae = SparseAutoencoder(config)
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    tensors = read_tensors(folder / WEIGHTS_FILE, expected)
    sae.load_state_dict(tensors, assign=True)
    return sae.float().requires_grad_(False).eval()


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


def read_json(path: Path) -> Any:
    """The parsed JSON file, or ValueError naming it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a folder written by save_pretrained (or SAeUron's)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged, get it again") from error


def read_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int | None, ...]],  # None: any size
) -> dict[str, Tensor]:
    """Exactly the tensors `shapes` names, on the CPU, from a safetensors file; floating-point ones must be
    finite.

    Raises ValueError naming file, tensor, expected and got.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected tensors {', '.join(shapes)} in it")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            missing = [name for name in shapes if name not in names]
            if missing:
                raise ValueError(
                    f"{path}: missing tensor {', '.join(missing)}; expected {', '.join(shapes)}, got "
                    f"{', '.join(sorted(names)) or 'none'}"
                )
            unknown = sorted(names - set(shapes))
            if unknown:
                raise ValueError(
                    f"{path}: unknown tensor {', '.join(unknown)}; expected only {', '.join(shapes)}"
                )
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({error}); it is truncated or damaged, get it again"
        ) from error
    for name, tensor in tensors.items():
        expected = shapes[name]
        got = tuple(tensor.shape)
        if len(got) != len(expected) or any(
            e is not None and e != g for e, g in zip(expected, got, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise ValueError(f"{path}: tensor {name}: expected shape [{wanted}], got {list(got)}")
        complaint = _finite(tensor)
        if complaint:
            raise ValueError(f"{path}: tensor {name}: {complaint}")
    return tensors


def _finite(tensor: Tensor) -> str | None:
    if not torch.is_floating_point(tensor):
        return None
    bad = int((~torch.isfinite(tensor)).sum())
    return f"expected finite values, got {bad} NaN or infinite of {tensor.numel()}" if bad else None


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


def write_files(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Writes every file under a temporary name, then renames them all (`os.replace`)."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[tuple[str, Path]] = []
    try:
        for name, data in contents.items():
            handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.")
            written.append((temporary, directory / name))
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes private files; what is shipped must be readable like any other file.
            os.chmod(temporary, 0o644)
        while written:
            os.replace(*written[0])
            written.pop(0)
    finally:
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)
