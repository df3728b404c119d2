"""Other projects' files as lbdt's, or an SAE as sdxl-unbox's: what `lbdt convert` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lbdt.dictionary.dictionary_files import INFO_FILE, TENSORS_FILE
from lbdt.dictionary.latents_pickle import SPACINGS, read_latents
from lbdt.formats import class_params
from lbdt.runs.files import write_files
from lbdt.runs.folder import replaced
from lbdt.runs.hub import check_subfolder, resolve_folder
from lbdt.runs.writable import check_out_folder
from lbdt.sae import SparseAutoencoder, sae_checkpoint, unbox
from lbdt.sae.config import PRE_ENCODER
from lbdt.sae.model import read_sae

_PICKLES = ("cls_latents_dict_{}.pkl", "style_latents_dict_{}.pkl")
"""The pickles of SAeUron's two scripts, over objects and over styles, by hookpoint."""
_DICTIONARY = (INFO_FILE, TENSORS_FILE)
_SAE = (sae_checkpoint.CONFIG_FILE, sae_checkpoint.WEIGHTS_FILE)
_UNBOX = (unbox.CONFIG_FILE, unbox.WEIGHTS_FILE)


def convert(
    source: str,
    *,
    out: Path,
    source_format: str,
    target: str,
    hookpoint: str | None,
    update: bool | None,
    timesteps: str | None,
    concepts: str | None,
    encoder_only: bool,
    dtype: str,
    force: bool,
) -> dict[str, Any]:
    """Writes `out`; returns what was read, assumed, checked and written, for JSON.

    Everything that can be refused is refused before anything is written.

    Raises:
        ValueError: an option that does not go with the source, an unusable --out, or what the readers refuse.
    """
    check_subfolder(hookpoint)
    if source_format == "auto":
        source_format = _kind(source)
    given = {
        "--timesteps": timesteps is not None,
        "--concepts": concepts is not None,
        "--update": update is not None,
        "--encoder-only": encoder_only,
        "--to sdxl-unbox": target != "lbdt",
        "--dtype": dtype != "float32",
        "--hookpoint": hookpoint is not None,
    }
    kind = torch.float32 if dtype == "float32" else getattr(torch, dtype)
    if source_format == "class-params":
        _require(given, "class-params", ())
        return _class_params(source, out, force)
    if source_format == "latents":
        _require(given, "latents", ("--timesteps", "--concepts", "--dtype", "--hookpoint"))
        return _latents(source, out, hookpoint, timesteps, concepts, kind, force)
    allowed = ("--update", "--dtype", "--hookpoint", "--to sdxl-unbox")
    _require(given, "an SAE", allowed if target == "sdxl-unbox" else (*allowed, "--encoder-only"))
    return _sae(source, out, source_format, target, hookpoint, update, encoder_only, kind, force)


def _kind(source: str) -> str:
    """ "latents", "class-params" or "auto" (an SAE), by the names of a local source's files."""
    path = Path(source)
    if path.is_file():
        if path.suffix == ".pkl":
            return "latents"
        if path.name.startswith("class_params"):
            return "class-params"
    elif path.is_dir() and not any((path / name).exists() for name in (*_SAE, unbox.WEIGHTS_FILE)):
        if any(any(path.glob(name.format("*"))) for name in _PICKLES):
            return "latents"
        if (path / class_params.PTH_FILE).exists():
            return "class-params"
    return "auto"


def _require(given: dict[str, bool], what: str, allowed: tuple[str, ...]) -> None:
    wrong = [name for name, is_given in given.items() if is_given and name not in allowed]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: does not go with {what}; leave it out, or name the source with --from"
        )


def _sae(
    source: str,
    out: Path,
    source_format: str,
    target: str,
    hookpoint: str | None,
    update: bool | None,
    encoder_only: bool,
    dtype: torch.dtype,
    force: bool,
) -> dict[str, Any]:
    names = _UNBOX if target == "sdxl-unbox" else _SAE
    _check_out(out, names, force)
    read = read_sae(source, hookpoint, source_format, update)
    sae, notes = read.sae, list(read.assumptions)
    checks = _sae_checks(sae)
    if target == "sdxl-unbox" and not sae.config.update:
        notes.append(
            "sdxl-unbox itself will take the SAE for one of output minus input: its files cannot say no"
        )
    state = sae.state_dict()
    with replaced(out, names) as new:
        if target == "sdxl-unbox":
            unbox.save_unbox(sae, new, dtype)
            back = read_sae(new, format=target, update=sae.config.update).sae
        else:
            sae.save_pretrained(new, encoder_only=encoder_only, dtype=dtype)
            back = SparseAutoencoder.from_pretrained(new)
        _same({name: (state[name].to(dtype).float(), got) for name, got in back.state_dict().items()}, out)
    tensors = {name: list(tensor.shape) for name, tensor in state.items()}
    settings = {key: value for key, value in sae.config.to_json().items() if key in _SETTINGS}
    return _result(source, read.format, target, out, names, tensors, settings, notes, checks)


_SETTINGS = ("d_in", "num_latents", "k", "activation", "update", PRE_ENCODER, "site")


def _sae_checks(sae: SparseAutoencoder) -> dict[str, Any]:
    """What the weights alone tell; how well they explain activations cannot be known without some (`lbdt score`)."""
    checks: dict[str, Any] = {"encoder_rows_zero": _zero_rows(sae.encoder.weight)}
    if sae.W_dec is not None:
        norms = sae.W_dec.norm(dim=1)
        checks |= {
            "decoder_rows_zero": _zero_rows(sae.W_dec),
            "decoder_row_norms": [float(norms.min()), float(norms.median()), float(norms.max())],
        }
    return checks


def _zero_rows(weight: torch.Tensor) -> float:
    return float((weight == 0).all(1).float().mean())


def _latents(
    source: str,
    out: Path,
    hookpoint: str | None,
    timesteps: str | None,
    concepts: str | None,
    dtype: torch.dtype,
    force: bool,
) -> dict[str, Any]:
    path, params_path = _pickle(source, hookpoint)
    names = _DICTIONARY if params_path is None else (*_DICTIONARY, class_params.JSON_FILE)
    _check_out(out, names, force)
    params = None if params_path is None else class_params.load_class_params(params_path)
    chosen = None if concepts is None else [name.strip() for name in concepts.split(",")]
    read = read_latents(path, _timesteps(timesteps), chosen)
    dictionary = read.dictionary
    with replaced(out, names) as new:
        dictionary.save_pretrained(new, dtype=dtype)
        back = type(dictionary).from_pretrained(new)
        _same({"mean": (dictionary.mean.to(dtype).float(), back.mean)}, out)
        if params is not None:
            write_files(new, {class_params.JSON_FILE: class_params.class_params_json(params)})
    active = (dictionary.mean > 0).flatten(0, 1).any(0)
    checks = {
        "latents_never_active": float((~active).float().mean()),
        "samples_per_class": sorted(set(read.samples.values())),
        "largest_mean": float(dictionary.mean.max()),
    }
    settings = {
        "concepts": list(dictionary.concepts),
        "timesteps": dictionary.timesteps.tolist(),
        "class_params": params is not None,
    }
    tensors = {"mean": list(dictionary.mean.shape), "counts": list(dictionary.counts.shape)}
    return _result(path, "latents", "lbdt", out, names, tensors, settings, read.assumptions, checks)


def _pickle(source: str, hookpoint: str | None) -> tuple[Path, Path | None]:
    """The pickle, and the steering parameters of a folder that has both."""
    path = Path(source)
    if path.is_file():
        if hookpoint is not None:
            raise ValueError(f"--hookpoint: {source} is one file already; leave it out")
        return path, None
    wanted = tuple(name.format("*" if hookpoint is None else hookpoint) for name in _PICKLES)
    folder = resolve_folder(source, None, marker=wanted, files=(*wanted, class_params.PTH_FILE))
    found = sorted(file for name in wanted for file in folder.glob(name))
    if len(found) != 1:
        # Of a repository the files are in the cache, from where each can be named.
        listed = ", ".join(p.name if path.is_dir() else str(p) for p in found) or "none"
        advice = "name the file" if len(found) > 1 and hookpoint else "name the file, or give --hookpoint"
        raise ValueError(f"{source}: expected one {' or '.join(wanted)}, got {listed}; {advice}")
    beside = folder / class_params.PTH_FILE
    return found[0], beside if beside.exists() else None


def _timesteps(given: str | None) -> str | list[int]:
    if given is None or given in SPACINGS:
        return given or "leading"
    try:
        return [int(value) for value in given.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--timesteps: expected {', '.join(SPACINGS)}, or numbers such as 991,981,971, got {given!r}"
        ) from error


def _class_params(source: str, out: Path, force: bool) -> dict[str, Any]:
    names = (class_params.JSON_FILE,)
    _check_out(out, names, force)
    path = Path(source)
    if not path.is_file():
        path = (
            resolve_folder(source, None, class_params.PTH_FILE, (class_params.PTH_FILE,))
            / class_params.PTH_FILE
        )
    params = class_params.load_class_params(path)
    write_files(out, {class_params.JSON_FILE: class_params.class_params_json(params)})
    settings = {name: given.to_json() for name, given in params.items()}
    return _result(path, "class-params", "lbdt", out, names, {}, settings, (), {})


def _check_out(out: Path, names: Sequence[str], force: bool) -> None:
    """ValueError unless the folder can be written there and holds nothing but an earlier conversion to replace."""
    check_out_folder(out)
    present = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    others = [name for name in present if name not in names]
    if others:
        raise ValueError(
            f"--out {out}: holds {', '.join(others[:5])}, which this conversion does not write; give a new folder"
        )
    if present and not force:
        raise ValueError(
            f"--out {out}: holds {', '.join(present)} already; give a new folder, or --force to replace"
        )


def _same(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], out: Path) -> None:
    for name, (wanted, got) in pairs.items():
        if not torch.equal(wanted, got):
            raise RuntimeError(f"{out}: {name}: what was written does not read back equal; nothing was kept")


def _result(
    source: str | Path,
    source_format: str,
    target: str,
    out: Path,
    names: Sequence[str],
    tensors: dict[str, list[int]],
    settings: dict[str, Any],
    notes: Sequence[str],
    checks: dict[str, Any],
) -> dict[str, Any]:
    return {
        "source": str(source),
        "from": source_format,
        "to": target,
        "out": str(out),
        "files": list(names),
        "tensors": tensors,
        "settings": settings,
        "assumptions": list(notes),
        "checks": checks,
    }
