"""`Steering`: the three published rules that edit a UNet block's output by SAE latents (METHOD.md, 5.1 to 5.4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.selection import active_mean
from lbdt.editors.attachment import LatentColumns, choice
from lbdt.editors.editor import Editor
from lbdt.editors.eraser import ConceptEraser
from lbdt.editors.steer_plan import Decoder, LatentPlan, SteerPlan, VectorPlan
from lbdt.editors.unet_editor import UnetEditor
from lbdt.formats.class_params import load_class_settings
from lbdt.hooks.call_state import CallState
from lbdt.hooks.detection_plan import DetectionOptions
from lbdt.hooks.recorder import Recorder
from lbdt.runs.reading import MAX_FLOAT, brief
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

RULES = ("saeuron", "gsae", "sdxl")
ERRORS = ("corrected", "released")
WHERE = ("all", "detected")
UNITS = ("active", "patches")
_GSAE_KINDS = ("topk_sigmoid", "topk")


class Strengthened(Editor):
    """An editor that adds rows of the SAE's decoder, with one strength for all concepts or one for each."""

    KIND = "steering"
    _STRENGTH = -1.0
    """A strength, for the errors about one."""
    _OR_DECODER = ""
    """How else to come by the decoder."""

    def __init__(self, strength: float | Mapping[str, float], *arguments: Any) -> None:
        self.strength = dict(strength) if isinstance(strength, Mapping) else strength
        super().__init__(*arguments)

    def _ran(self) -> str:
        return self._in_words()

    def _check(self) -> None:
        super()._check()
        for name, value in self._strengths().items():
            given = brief(value) + ("" if name is None else f" for {name!r}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"strength: expected a number such as {self._STRENGTH}, got {given}")
            if not abs(value) <= MAX_FLOAT:
                raise ValueError(f"strength: expected a finite number, got {given}")
        if self.sae.W_dec is None:
            raise ValueError(
                "sae: has no decoder (encoder_only), and steering adds its rows; load the full checkpoint with "
                f"SparseAutoencoder.from_pretrained{self._OR_DECODER}"
            )

    def _strengths(self) -> dict[str | None, Any]:
        """The strength of each concept; under None the one of all."""
        return self.strength if isinstance(self.strength, dict) else {None: self.strength}

    def _strength_of(self, concept: str) -> float:
        strengths = self._strengths()
        if None in strengths:
            return float(strengths[None])
        if concept not in strengths:
            raise ValueError(f"strength: none for {concept!r}; given for {', '.join(strengths) or 'nothing'}")
        return float(strengths[concept])


class Steering(Strengthened, UnetEditor):
    """Edits SAE latents where the eraser would replace patches: what Patch Embedding Replacement is compared with.

    With x the block's output (its update, output - input, for an SAE of the update; the edit is then added to the
    output), a = `dictionary.mean`, mu the selection's thresholds, c an image's concepts and i their latents selected
    at the bin of the timestep t:

    - "saeuron" (SAeUron, arXiv 2501.18052; SAEmnesia, arXiv 2509.21379; METHOD.md, 5.1): where `z_i > mu_i(t)`,
      `z_i <- z_i * strength * a[c, t, i]`, decoded. Published strengths: -1 to -30; both guidance halves.
    - "gsae" (Haerle et al., NeurIPS 2025; METHOD.md, 5.2): `x <- x + strength * ||x|| * sum_i D_i / ||D_i||` per
      patch, D the decoder's rows. Published strengths: -0.1 to -10; conditional half. For topk and topk_sigmoid SAEs.
    - "sdxl" (Surkov et al., arXiv 2410.22366; METHOD.md, 5.3): `x <- x + strength * sum_i m_i * D_i`, m_i the latent's
      mean where it is active, as in the published `mean.pt` (unit "active"), or a[c, t, i] (unit "patches").

    A latent that several concepts of an image own is edited once: by the concept whose factor (strength, times its a
    where the rule has one) is farthest from 0, under "saeuron" among those whose threshold it passes. The released
    hook leaves that to the order of an indexed write.
    """

    FILE = "steering.json"
    SETTINGS = ("hookpoint", "rule", "strength", "error", "selection", "where", "unit")
    SHOWN = ("rule", "strength")
    _ADDED = {"unit": "patches"}
    _OTHERWISE = (ConceptEraser.FILE,)
    _OR_DECODER = ", or save the eraser with save_pretrained(folder, decoder=True)"

    def __init__(
        self,
        sae: SparseAutoencoder,
        dictionary: ConceptDictionary,
        hookpoint: str,
        *,
        rule: str = "saeuron",
        strength: float | Mapping[str, float],
        error: str = "corrected",
        selection: Mapping[str, Any] | None = None,
        where: str = "all",
        unit: str = "active",
    ) -> None:
        """
        Args:
            sae: of the block's output, or of its update iff `sae.config.update`; with its decoder.
            dictionary: made with that SAE. Where it or the SAE names its site, that must be this block.
            hookpoint: the block that is steered, e.g. "unet.up_blocks.1.attentions.1".
            rule: "saeuron" | "gsae" | "sdxl".
            strength: one for all, or one per concept that will be attached. Negative to erase.
            error: how rule "saeuron" adds the SAE's reconstruction error back. "corrected":
                `x + (z' - z) W_dec`, so what is not steered keeps its bits. "released": as SAeUron's and SAEmnesia's
                code does, with the sign reversed, `decode(z') + (decode(z) - x)`. Beware: that is `2 * x_hat - x`
                in every patch of a treated row, steered or not, so the error is doubled everywhere. It is there to
                reproduce their figures.
            selection: keywords of `ConceptDictionary.select`; None: its defaults. Under the name of a concept, keywords
                of its own stand in place of those: `{"top_k": 1, "Cats": {"percentile": 99.99}}`.
            where: rules "gsae" and "sdxl": "all" patches, as published | only the "detected" ones, in which one of
                the image's latents passes its threshold.
            unit: what rule "sdxl" counts strength in; others do not look at it. "active": the mean of the latent over
                the patches of all prompts in which it is active, which needs a dictionary that counted them |
                "patches": the mean over all patches of the concept's prompts at the timestep, often a tenth of that.

        Raises:
            ValueError, TypeError: the argument, what was expected, what was given.
        """
        self.rule, self.error, self.where, self.unit = rule, error, where, unit
        super().__init__(strength, sae, dictionary, hookpoint, selection)

    @classmethod
    def from_eraser(cls, eraser: ConceptEraser, **settings: Any) -> Steering:
        """The steering with an eraser's SAE, dictionary and selection, at the block that its SAE looks at.

        `settings` are keywords of `Steering`. Raises as it does, also where the eraser was loaded without the decoder.
        """
        settings = {"selection": eraser.selection, **settings}
        return cls(eraser.sae, eraser.dictionary, eraser.detect_at or eraser.hookpoint, **settings)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        class_params: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> Steering:
        """The steering in a folder or repository, as `EditorFiles.from_pretrained` reads it.

        `class_params`: SAeUron's `class_params.pth`, or what `lbdt convert` makes of it, gives the rule, and the
        strength and selection of each concept that is a class of it; others have no strength, and the selection of
        `settings` or of the folder.

        Raises:
            ValueError: as that does, and what `lbdt.formats.class_params.load_class_settings` refuses; a `strength`
                beside `class_params`, or another rule than the file's.
        """
        if class_params is None:
            return super().from_pretrained(path_or_repo, **settings)
        if "strength" in settings:
            raise ValueError("strength: class_params gives one for each concept; leave one of both out")
        # Any strength will do until the dictionary's concepts are known.
        made = super().from_pretrained(path_or_repo, **{"strength": cls._STRENGTH, **settings})
        given = load_class_settings(class_params, made.concepts)
        rule = settings.get("rule", given.rule)
        if rule != given.rule:
            raise ValueError(
                f"rule: {class_params} is of {given.rule!r}, got {brief(rule)}; leave the rule out, or give strengths"
            )
        made.rule, made.strength, made.selection = rule, given.strength, made.selection | given.selection
        made._check()
        return made

    @property
    def has_gradient(self) -> bool:
        """Whether a loss of the pictures reaches the prompt; not with error "released" and the code of a top-k SAE."""
        return not (self.error == "released" and self.sae.rank_k)

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes `steering.json`, `sae/` with its decoder, `dictionary/` and their `digests.json`; `dtype` float16
        halves the tensors. What is there of these is replaced all at one moment.

        In an eraser's folder, its `eraser.json` stays as it is.
        """
        self._save(directory, dtype, decoder=True)

    @classmethod
    def _stored(cls, folder: Path, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        if (folder / cls.FILE).is_file():
            return super()._stored(folder, given)
        path, erased = ConceptEraser._stored(folder, {})
        if "strength" not in given:
            raise ValueError(
                f"{path}: an eraser's folder has no strength; call Steering.from_pretrained(folder, strength=-1.0)"
            )
        looked = {"hookpoint": erased["detect_at"] or erased["hookpoint"], "selection": erased["selection"]}
        return path, looked | given

    def _in_words(self) -> str:
        words = f"rule {self.rule}, strength {self.strength}"
        if self.rule != "saeuron":
            means = {"active": "where active", "patches": "over all patches"}
            of = f" times the mean activation {means[self.unit]}" if self.rule == "sdxl" else ""
            return f"{words}{of}, {self.where} patches"
        if self.error == "corrected":
            return f"{words}, reconstruction error corrected: x + (z' - z) W_dec"
        return f"{words}, reconstruction error as released: 2 x_hat - x where nothing is steered"

    def _check(self) -> None:
        choice("rule", self.rule, RULES)
        choice("error", self.error, ERRORS)
        choice("where", self.where, WHERE)
        choice("unit", self.unit, UNITS)
        super()._check()
        if self.rule == "sdxl" and self.unit == "active" and self.dictionary.fired is None:
            raise ValueError(
                "unit: the dictionary does not say in how many patches a latent was active; score it by `lbdt score`, "
                "or give unit='patches'"
            )
        if not self._strengths():
            raise ValueError("strength: expected a number, or one per concept, got an empty dict")
        for name in self._strengths():
            if name is not None:
                self.dictionary.index(name)
        kind = self.sae.config.activation
        if self.rule == "gsae" and kind not in _GSAE_KINDS:
            raise ValueError(
                f"rule: 'gsae' is for an SAE with activation {' or '.join(_GSAE_KINDS)}, got {kind!r}; use rule "
                "'saeuron' or 'sdxl'"
            )
        if self.rule == "saeuron" and self.where != "all":
            raise ValueError("where: rule 'saeuron' steers where a latent fires; leave it at 'all'")
        if self.error == "released" and (self.rule != "saeuron" or kind == "topk_sigmoid"):
            raise ValueError(
                f"error: 'released' is the sign of SAeUron's and SAEmnesia's hook: rule 'saeuron' and an SAE without a "
                f"sigmoid, got rule {self.rule!r} and activation {kind!r}; use 'corrected'"
            )

    @property
    def _published_rows(self) -> str:
        return "cond" if self.rule == "gsae" else "all"

    def _hooks(
        self, blocks: list[nn.Module], plan: SteerPlan, state: CallState, recorder: Recorder
    ) -> list[tuple[nn.Module, ModelHook]]:
        from lbdt.hooks.blocks import SteerHook

        return [(blocks[0], SteerHook(plan, state, recorder))]

    def _plan(
        self,
        columns: LatentColumns,
        options: DetectionOptions,
        *tensors: Tensor | None,
        like: SteerPlan | None = None,
    ) -> SteerPlan:
        sae = self.sae
        device = sae.W_dec.device
        directions = sae.W_dec.detach().float()[columns.latents.to(device)]
        factors = self._factors(columns)
        if self.rule == "saeuron":
            return LatentPlan(
                options,
                *tensors,
                factors=factors,
                directions=directions,
                sigmoid=sae.config.activation == "topk_sigmoid",
                decoder=self._decoder() if self.error == "released" else None,
                pre=self._pre_encoder(like),
            )
        by_norm = self.rule == "gsae"
        return VectorPlan(
            options,
            *tensors,
            factors=factors,
            directions=F.normalize(directions, dim=1) if by_norm else directions,
            by_norm=by_norm,
            only_detected=self.where == "detected",
            pre=self._pre_encoder(like),
        )

    def _factors(self, columns: LatentColumns) -> Tensor:
        """[T, U] float32: strength, times a mean activation but for "gsae"; 0 where not selected."""
        factors = torch.zeros(columns.thresholds.shape)
        active = active_mean(self.dictionary) if self.rule == "sdxl" and self.unit == "active" else None
        for column, owner in enumerate(columns.owners):
            latent = columns.latents[column]
            mean = (
                1.0 if self.rule == "gsae" else self.dictionary.mean[self.dictionary.index(owner), :, latent]
            )
            factors[:, column] = self._strength_of(owner) * (mean if active is None else active[latent])
        return factors.masked_fill(torch.isinf(columns.thresholds), 0.0)

    def _digested(self) -> list[Any]:
        return ["unit=active"] if self.rule == "sdxl" and self.unit == "active" else []

    def _decoder(self) -> Decoder:
        sae = self.sae
        order = self.dictionary.firing_order().to(sae.W_dec.device)
        floors = sae.to_pre_activation(torch.zeros(1, len(order)), torch.arange(len(order)))[0]
        return Decoder(sae.W_dec.detach()[order], sae.b_dec.detach(), floors.to(order.device)[order])
