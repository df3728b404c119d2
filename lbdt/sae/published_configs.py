"""The project that wrote a checkpoint folder, and its `cfg.json` as an `SAEConfig` (METHOD.md, 7.1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lbdt.runs.files import read_json
from lbdt.runs.reading import brief
from lbdt.sae import unbox
from lbdt.sae.config import SAEConfig

_SPARSIFY_OFF = {
    "transcode": "it predicts another activation than it sees",
    "skip_connection": "its output has a linear part that no latent explains",
    "embed_skip": "its output has a part that no latent explains",
    "gram_lookup": "its input is corrected by a table of token n-grams",
    "signed": "its latents may be negative, and detection is defined for latents above 0",
}
"""Keys of EleutherAI's sparsify that change the function, and why only false is read."""
_SPARSIFY_UNUSED = ("lookup_max_order", "gram_table_hash", "init_b_dec_as_zeros")


def detect(folder: Path) -> str:
    """The format of a folder, from its files and the keys of its configuration.

    Raises:
        ValueError: no readable configuration.
    """
    config = folder / "cfg.json"
    if (folder / unbox.WEIGHTS_FILE).is_file() and not (folder / "sae.safetensors").is_file():
        if config.is_file() and not (folder / unbox.CONFIG_FILE).is_file():
            return "saemnesia"
        return "steerers" if "auxk_coef" in unbox.read_config(folder) else "sdxl-unbox"
    values = read_json(config)
    keys = set(values) if isinstance(values, dict) else set()
    if keys & {*_SPARSIFY_OFF, *_SPARSIFY_UNUSED}:
        return "sparsify"
    return "lbdt" if "encoder_only" in keys else "saeuron"


def config_of(values: Any, format: str, source: str) -> SAEConfig:
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


def notes(format: str, named: bool, update: bool | None) -> Iterator[str]:
    """What the files of a format leave open; `update` as the caller gave it."""
    if format == "gsae":
        yield "z = sigmoid(TopK(pre)), as in the diffusion version of G-SAE; the files do not say it"
    elif format in ("saeuron", "saemnesia", "sparsify"):
        yield "TopK per patch, then ReLU; the files do not say it"
    if format in ("saeuron", "saemnesia", "gsae") and update is None:
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
