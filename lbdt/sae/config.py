"""Configuration of a sparse autoencoder, and its form in a `cfg.json` file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from lbdt.runs.reading import MAX_FLOAT, brief
from lbdt.runs.site_names import checked_site, site_name

ACTIVATIONS = ("topk", "topk_sigmoid", "relu", "jumprelu", "batch_topk")
_LARGEST = 1 << 24
RANKED_ACTIVATIONS = ("topk", "topk_sigmoid")
WIDTH = "width"
"""What a `cfg.json` calls `d_in` where SAeUron's loader would take the SAE for another one: without `d_in` it fails."""
PRE_ENCODER = "use_pre_encoder_gelu"
"""What SAEParate's `cfg.json`, and so lbdt's, calls `pre_encoder`."""
MOVED = 'to move this one on purpose, sae.with_site(None) (in its folder: no "site" in cfg.json)'
"""What errors say about an SAE whose site is not the one it is used at."""


@dataclass(frozen=True)
class SAEConfig:
    """Sizes and activation function of a sparse autoencoder.

    SAeUron's keys (`SAE/config.py` of cywinski/SAeUron) keep their names, so one `cfg.json` serves both
    programs; `activation`, `threshold`, `update`, `encoder_only` and `site` are lbdt's.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range, fields that contradict each other, or `input_unit_norm`.
    """

    d_in: int
    """Width d of the activations, > 0."""
    num_latents: int = 0
    """Dictionary size L; 0 means `d_in * expansion_factor`."""
    k: int = 0
    """Latents kept per patch; needed by topk, topk_sigmoid and batch_topk (there the average), ignored otherwise."""
    activation: str = "topk"
    """Activation at inference: topk | topk_sigmoid | relu | jumprelu | batch_topk (METHOD.md, 2.1)."""
    threshold: float | None = None
    """The pre-activation above which a latent is active; batch_topk alone has it."""
    update: bool = False
    """The SAE was trained on the block's update (output - input) instead of its output."""
    expansion_factor: int | None = None
    """`num_latents / d_in`, as SAeUron's file states it."""
    normalize_decoder: bool = True
    """Decoder rows are kept at unit norm while training."""
    batch_topk: bool = False
    """The training kept the k * rows largest latents of a batch (BatchTopK); inference is by `activation`."""
    sample_topk: bool = False
    """The training kept the k largest latents of a sample (SAeUron's option); inference is by `activation`."""
    multi_topk: bool = False
    """The training used SAeUron's Multi-TopK loss."""
    input_unit_norm: bool = False
    """Inputs are normalised patch by patch. Refused, as detection is defined on an affine encoder."""
    encoder_only: bool = False
    """The file holds no `W_dec`; decoding raises."""
    pre_encoder: bool = False
    """The encoder reads `gelu(W_pre (x - b_dec) + b_pre)` in place of `x - b_dec` (SAEParate; METHOD.md, 6.7)."""
    site: str | None = None
    """Where it was trained, "HOOKPOINT:output" or, iff `update`, "HOOKPOINT:update"; None: not known, so that it is
    compared with no other."""

    def __post_init__(self) -> None:
        for name in ("d_in", "num_latents", "k"):
            _require_int(name, getattr(self, name))
        for name in (
            "update",
            "normalize_decoder",
            "batch_topk",
            "sample_topk",
            "multi_topk",
            "input_unit_norm",
            "encoder_only",
            "pre_encoder",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected true or false, got {brief(getattr(self, name))}")
        if self.d_in <= 0:
            raise ValueError(f"d_in: expected an integer > 0, got {self.d_in}")
        if self.expansion_factor is not None:
            _require_int("expansion_factor", self.expansion_factor)
        if self.num_latents == 0 and self.expansion_factor:
            object.__setattr__(self, "num_latents", self.d_in * self.expansion_factor)
        if max(self.d_in, self.num_latents) > _LARGEST:
            raise ValueError(
                f"d_in, num_latents: expected at most {_LARGEST}, got {brief(self.d_in)} and {brief(self.num_latents)}"
            )
        if self.num_latents <= 0:
            raise ValueError(
                f"num_latents: expected an integer > 0 (or 0 and an expansion_factor > 0), got "
                f"{self.num_latents} and expansion_factor {self.expansion_factor}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}; got {brief(self.activation)}"
            )
        if self.activation in (*RANKED_ACTIVATIONS, "batch_topk") and not 0 < self.k <= self.num_latents:
            raise ValueError(
                f"k: activation {self.activation!r} expects 1 <= k <= num_latents ({self.num_latents}), got "
                f"{self.k}"
            )
        if self.k < 0:
            raise ValueError(f"k: expected an integer >= 0, got {self.k}")
        if self.threshold is not None:
            if self.activation != "batch_topk":
                raise ValueError(
                    f"threshold: only activation 'batch_topk' has one, got {brief(self.threshold)} with "
                    f"{self.activation!r}; jumprelu keeps its thresholds in the tensor 'theta'"
                )
            if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
                raise TypeError(f"threshold: expected a number, got {brief(self.threshold)}")
            if not 0 <= self.threshold <= MAX_FLOAT:
                raise ValueError(f"threshold: expected a finite number >= 0, got {brief(self.threshold)}")
        if checked_site(self.site) is not None:
            hookpoint = self.site.partition(":")[0]
            if self.site != site_name(hookpoint, self.update):
                raise ValueError(
                    f"site: expected {site_name(hookpoint, self.update)} or None, as update is "
                    f"{str(self.update).lower()}, got {self.site}"
                )
        if self.input_unit_norm:
            raise ValueError(
                "input_unit_norm: true is not supported (each patch would be normalised before encoding, and "
                "detection is defined on an affine encoder); use an SAE trained without it"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of an autoencoder of this configuration, by their names in SAeUron's file."""
        n, d = self.num_latents, self.d_in
        return {
            **({} if self.encoder_only else {"W_dec": (n, d)}),
            "b_dec": (d,),
            **({"theta": (n,)} if self.activation == "jumprelu" else {}),
            **({"pre_encoder.0.weight": (d, d), "pre_encoder.0.bias": (d,)} if self.pre_encoder else {}),
            "encoder.weight": (n, d),
            "encoder.bias": (n,),
        }

    def to_json(self) -> dict[str, Any]:
        """The settings by name: SAeUron's, then lbdt's; SAEParate's and `site` only where there is such a thing."""
        return {
            "expansion_factor": self.expansion_factor or max(1, self.num_latents // self.d_in),
            "normalize_decoder": self.normalize_decoder,
            "num_latents": self.num_latents,
            "k": self.k,
            "batch_topk": self.batch_topk,
            "sample_topk": self.sample_topk,
            "input_unit_norm": self.input_unit_norm,
            "multi_topk": self.multi_topk,
            "d_in": self.d_in,
            "activation": self.activation,
            "threshold": self.threshold,
            "update": self.update,
            "encoder_only": self.encoder_only,
            **({PRE_ENCODER: True} if self.pre_encoder else {}),
            **({} if self.site is None else {"site": self.site}),
        }

    def file_json(self) -> dict[str, Any]:
        """The dictionary written to `cfg.json`: `to_json`, with the width under a name that SAeUron's loader does not
        know where that would run the SAE as a TopK one without a word (one without a decoder it loads whatever else
        the file holds)."""
        values = self.to_json()
        if self.activation == "topk" and not (self.pre_encoder and self.encoder_only):
            return values
        return {WIDTH if name == "d_in" else name: value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Any, source: str = "cfg.json") -> SAEConfig:
        """A config from a parsed `cfg.json` (SAeUron's or lbdt's). `source` names the file in errors.

        A file without `activation` is SAeUron's: whatever it was trained with (`batch_topk` included),
        inference is per-patch TopK (METHOD.md, 7.1).

        Raises:
            ValueError: not an object, an unknown or missing key, or a value that `SAEConfig` refuses.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{source}: expected a JSON object, got {type(values).__name__}")
        if WIDTH in values and "d_in" not in values:
            values = {"d_in" if name == WIDTH else name: value for name, value in values.items()}
        known = [PRE_ENCODER if name == "pre_encoder" else name for name in cls.__dataclass_fields__]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key)[:80], known, n=1)
                hint = f"; nearest known key: {near[0]}" if near else ""
                raise ValueError(f"{source}: unknown key {brief(key)}{hint} (known: {', '.join(known)})")
        if "d_in" not in values:
            raise ValueError(f"{source}: missing key 'd_in' (the width of the activations)")
        try:
            config = cls(
                **{"pre_encoder" if name == PRE_ENCODER else name: value for name, value in values.items()}
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error
        if config.activation == "batch_topk" and config.threshold is None:
            raise ValueError(f"{source}: activation 'batch_topk' needs a 'threshold' to run at inference")
        return config


def _require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {brief(value)}")
