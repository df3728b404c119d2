"""`Steering`: the three published rules that edit a UNet block's output by SAE latents (protocols.md, 3.1 to 3.4)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lbdt.dictionary import ConceptDictionary
from lbdt.editors import attachment
from lbdt.editors.attachment import Attachment
from lbdt.editors.report import SteeringReport, summarise_steering
from lbdt.editors.steer_plan import Decoder, LatentPlan, SteerPlan, VectorPlan
from lbdt.folders import DIGESTS_FILE, PARTS, check_digests, replaced, write_digests
from lbdt.hooks import lookup
from lbdt.hooks.detection_plan import ROWS, CallState, DetectionOptions
from lbdt.hooks.recorder import Recorder
from lbdt.reading import MAX_FLOAT, brief, listed
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from lbdt.dictionary import Selection
    from lbdt.editors import ConceptEraser

CONFIG_FILE = "steering.json"
RULES = ("saeuron", "gsae", "sdxl")
ERRORS = ("corrected", "released")
WHERE = ("all", "detected")
_VERSION = 1
_KEYS = ("version", "hookpoint", "rule", "strength", "error", "selection", "where")
_ERASER_KEYS = ("hookpoint", "detect_at", "selection")
_FILES = (CONFIG_FILE, "eraser.json", DIGESTS_FILE, *PARTS)
_OWN = (CONFIG_FILE, "sae", "dictionary", DIGESTS_FILE)
_ROWS = {"saeuron": "all", "gsae": "cond", "sdxl": "all"}
_GSAE_KINDS = ("topk_sigmoid", "topk")
_numbers = itertools.count()


class Steering:
    """Edits SAE latents where the eraser would replace patches: what Patch Embedding Replacement is compared with.

    With x the block's output (its update, output - input, for an SAE of the update; the edit is then added to the
    output), a = `dictionary.mean`, mu the selection's thresholds, c an image's concepts and i their latents selected
    at the bin of the timestep t:

    - "saeuron" (SAeUron, arXiv 2501.18052; SAEmnesia, arXiv 2509.21379; protocols.md 3.1): where `z_i > mu_i(t)`,
      `z_i <- z_i * strength * a[c, t, i]`, decoded. Published strengths: -1 to -30; both guidance halves.
    - "gsae" (Haerle et al., NeurIPS 2025; protocols.md 3.3): `x <- x + strength * ||x|| * sum_i D_i / ||D_i||` per
      patch, D the decoder's rows. Published strengths: -0.1 to -10; conditional half. For topk and topk_sigmoid SAEs.
    - "sdxl" (Surkov et al., arXiv 2410.22366; protocols.md 3.4): `x <- x + strength * sum_i a[c, t, i] * D_i`.

    A latent that several concepts of an image own is edited once: by the concept whose factor (strength, times its a
    where the rule has one) is farthest from 0, under "saeuron" among those whose threshold it passes. The released
    hook leaves that to the order of an indexed write.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        dictionary: ConceptDictionary,
        hookpoint: str,
        *,
        rule: str = "saeuron",
        strength: float | Mapping[str, float],
        error: str = "corrected",
        selection: dict[str, Any] | None = None,
        where: str = "all",
    ) -> None:
        """
        Args:
            sae: of the block's output, or of its update iff `sae.config.update`; with its decoder.
            dictionary: made with that SAE.
            hookpoint: the block that is steered, e.g. "unet.up_blocks.1.attentions.1".
            rule: "saeuron" | "gsae" | "sdxl".
            strength: one for all, or one per concept that will be attached. Negative to erase.
            error: how rule "saeuron" adds the SAE's reconstruction error back. "corrected":
                `x + (z' - z) W_dec`, so what is not steered keeps its bits. "released": as SAeUron's and SAEmnesia's
                code does, with the sign reversed, `decode(z') + (decode(z) - x)`. Beware: that is `2 * x_hat - x`
                in every patch of a treated row, steered or not, so the error is doubled everywhere. It is there to
                reproduce their figures.
            selection: keywords of `ConceptDictionary.select`; None: its defaults.
            where: rules "gsae" and "sdxl": "all" patches, as published | only the "detected" ones, in which one of
                the image's latents passes its threshold.

        Raises:
            ValueError, TypeError: the argument, what was expected, what was given.
        """
        attachment.check_parts(sae, dictionary)
        self.sae, self.dictionary, self.hookpoint = sae, dictionary, hookpoint
        self.rule, self.error, self.where = rule, error, where
        self.strength = dict(strength) if isinstance(strength, Mapping) else strength
        self.selection = dict(selection or {})
        self._recorder: Recorder | None = None
        self._summary = summarise_steering
        self._name = f"lbdt_steering_{next(_numbers)}"
        self._check_settings()

    @classmethod
    def from_eraser(cls, eraser: ConceptEraser, **settings: Any) -> Steering:
        """With an eraser's SAE, dictionary and selection, at the block that its SAE looks at; `settings`: keywords of
        `Steering`. Raises as it does, also where the eraser was loaded without the decoder."""
        settings = {"selection": eraser.selection, **settings}
        return cls(eraser.sae, eraser.dictionary, eraser.detect_at or eraser.hookpoint, **settings)

    @property
    def concepts(self) -> tuple[str, ...]:
        """The names that `attach` takes."""
        return self.dictionary.concepts

    def select(self, concept: str) -> Selection:
        """The latents and thresholds of a concept under this object's `selection`."""
        return self.dictionary.select(concept, **self.selection)

    def attach(
        self,
        pipe: Any,
        concepts: Sequence[str] | Sequence[Sequence[str]],
        seed: int | Sequence[int] = 0,
        rows: str | None = None,
        steps: tuple[int, int] | None = None,
        keep_masks: bool = False,
    ) -> Attachment:
        """Puts the steering on a pipeline until the returned handle is removed, or its `with` block is left.

        Args:
            pipe: a diffusers pipeline with a UNet. Its weights and its state_dict are not touched.
            concepts: names for all images, or one list of names (which may be empty) per prompt or per image.
            seed: taken as the eraser's is, and not used: nothing is drawn.
            rows: guidance halves that are treated: "all" | "cond"; None: the rule's published one, "cond" for "gsae",
                else "all". Without guidance, the only half.
            steps: (first, last): treat steps first <= i < last of the scheduler's timesteps; None: all.
            keep_masks: keep each call's masks for `Attachment.masks` (4 MiB on the device).

        Rows without a concept, of the other half or outside of the window keep their bits, under error "released" too.

        Raises:
            ValueError, TypeError: before anything is changed: unknown concept or hookpoint, a concept without a
                strength, an SAE of another width than the block, a pipeline without a UNet, bad settings, an
                attachment that is still on. At the pipeline's call, before anything is generated: a list of neither
                one entry per prompt nor per image.
        """
        self._check_settings()
        unet = lookup.find_unet(pipe)
        width = self.sae.config.d_in
        block = attachment.find_block(unet, self.hookpoint, width, "hookpoint")
        sets, set_list = attachment.concept_sets(concepts)
        seeds, seed_list = attachment.seed_values(seed)
        options = DetectionOptions(
            rows=attachment.choice("rows", _ROWS[self.rule] if rows is None else rows, ROWS),
            steps=attachment.window(steps),
            k=self.sae.rank_k,
            on_update=self.sae.config.update,
            width=width,
            set_list=set_list,
            seed_list=seed_list,
        )
        attachment.refuse_twice(block, self._name, "steering")
        parameter = next(unet.parameters())
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            chosen = attachment.columns(sets, self.select, len(self.dictionary.timesteps))
            plan = self._plan(options, chosen, seeds)
            blind = attachment.check_latents(plan, chosen.owners)
            plan.to(parameter.device, parameter.dtype)
            recorder = Recorder(parameter.device, masks=keep_masks)
        from lbdt.hooks import blocks

        state = CallState(pipe)
        summary = partial(summarise_steering, ran=self._in_words(), blind=blind)
        handle = Attachment.on_unet(
            self._name,
            pipe,
            self.hookpoint,
            [(block, blocks.SteerHook(plan, state, recorder))],
            plan,
            state,
            recorder,
            summary,
        )
        self._recorder, self._summary = recorder, summary
        return handle

    def report(self) -> SteeringReport:
        """What happened since the last `attach`, and which rule; also after its removal. Waits for the device.

        Raises:
            ValueError: never attached.
        """
        if self._recorder is None:
            raise ValueError("report: never attached; call attach(pipe, concepts) first")
        return self._summary(self._recorder.read())

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes `steering.json`, `sae/` with its decoder, `dictionary/` and their `digests.json`; `dtype` float16
        halves the tensors. What is there of these is replaced all at one moment.

        In an eraser's folder, its `eraser.json` stays as it is.
        """
        self._check_settings()
        with replaced(Path(directory), _OWN) as folder:
            self.sae.save_pretrained(folder / "sae", dtype=dtype)
            self.dictionary.save_pretrained(folder / "dictionary", dtype=dtype)
            write_digests(folder)
            self.save_settings(folder)

    def save_settings(self, directory: str | os.PathLike[str]) -> None:
        """Writes `steering.json` alone: for an eraser's folder with this SAE and dictionary, saved with its decoder."""
        from lbdt.files import json_bytes, write_files

        self._check_settings()
        settings = {key: _VERSION if key == "version" else getattr(self, key) for key in _KEYS}
        write_files(Path(directory), {CONFIG_FILE: json_bytes(settings)})

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **settings: Any) -> Steering:
        """The steering in a folder or a Hugging Face repository (`owner/name`): one of `Steering.save_pretrained`, or
        an eraser's, saved with `decoder=True`; then give `strength`. `settings` are keywords of `Steering`, and come
        before those of the file.

        Raises:
            ValueError: anything absent, unreadable or contradictory; the text names the file.
        """
        from lbdt.hub import resolve_folder

        folder = resolve_folder(path_or_repo, None, marker=CONFIG_FILE, files=_FILES)
        path, stored = _stored(folder)
        stored |= settings
        if "strength" not in stored:
            raise ValueError(
                f"{path}: an eraser's folder has no strength; call Steering.from_pretrained(folder, strength=-1.0)"
            )
        check_digests(folder)
        sae = SparseAutoencoder.from_pretrained(folder / "sae")
        dictionary = ConceptDictionary.from_pretrained(folder / "dictionary")
        try:
            return cls(sae, dictionary, **stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        return f"Steering({len(self.concepts)} concepts, hookpoint={self.hookpoint!r}, {self._in_words()})"

    def _in_words(self) -> str:
        words = f"rule {self.rule}, strength {self.strength}"
        if self.rule != "saeuron":
            return f"{words}, {self.where} patches"
        if self.error == "corrected":
            return f"{words}, reconstruction error corrected: x + (z' - z) W_dec"
        return f"{words}, reconstruction error as released: 2 x_hat - x where nothing is steered"

    def _check_settings(self) -> None:
        """Settings are plain attributes, so they are checked again when they are used."""
        attachment.check_hookpoint("hookpoint", self.hookpoint)
        attachment.choice("rule", self.rule, RULES)
        attachment.choice("error", self.error, ERRORS)
        attachment.choice("where", self.where, WHERE)
        attachment.check_selection(self.selection)
        self._check_strength()
        kind = self.sae.config.activation
        if self.sae.W_dec is None:
            raise ValueError(
                "sae: has no decoder (encoder_only), and steering adds its rows; load the full checkpoint with "
                "SparseAutoencoder.from_pretrained, or save the eraser with save_pretrained(folder, decoder=True)"
            )
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

    def _check_strength(self) -> None:
        per_concept = self.strength if isinstance(self.strength, dict) else {None: self.strength}
        if not per_concept:
            raise ValueError("strength: expected a number, or one per concept, got an empty dict")
        for name, value in per_concept.items():
            if name is not None:
                self.dictionary.index(name)
            given = brief(value) + ("" if name is None else f" for {name!r}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"strength: expected a number such as -1.0, got {given}")
            if not abs(value) <= MAX_FLOAT:
                raise ValueError(f"strength: expected a finite number, got {given}")

    def _strength_of(self, concept: str) -> float:
        if not isinstance(self.strength, dict):
            return float(self.strength)
        if concept not in self.strength:
            raise ValueError(f"strength: none for {concept!r}; given for {', '.join(self.strength)}")
        return float(self.strength[concept])

    def _plan(
        self, options: DetectionOptions, chosen: attachment.LatentColumns, seeds: list[int]
    ) -> SteerPlan:
        sae, dictionary = self.sae, self.dictionary
        tensors = (options, *attachment.plan_tensors(sae, dictionary, chosen, seeds))
        device = sae.W_dec.device
        directions = sae.W_dec.detach().float()[chosen.latents.to(device)]
        factors = self._factors(chosen)
        if self.rule == "saeuron":
            return LatentPlan(
                *tensors,
                factors=factors,
                directions=directions,
                sigmoid=sae.config.activation == "topk_sigmoid",
                decoder=self._decoder() if self.error == "released" else None,
            )
        by_norm = self.rule == "gsae"
        return VectorPlan(
            *tensors,
            factors=factors,
            directions=F.normalize(directions, dim=1) if by_norm else directions,
            by_norm=by_norm,
            only_detected=self.where == "detected",
        )

    def _factors(self, chosen: attachment.LatentColumns) -> Tensor:
        """[T, U] float32: strength, times the concept's mean activation but for "gsae"; 0 where not selected."""
        factors = torch.zeros(chosen.thresholds.shape)
        for column, owner in enumerate(chosen.owners):
            mean = self.dictionary.mean[self.dictionary.index(owner), :, chosen.latents[column]]
            factors[:, column] = self._strength_of(owner) * (1.0 if self.rule == "gsae" else mean)
        return factors.masked_fill(torch.isinf(chosen.thresholds), 0.0)

    def _decoder(self) -> Decoder:
        sae = self.sae
        order = self.dictionary.firing_order().to(sae.W_dec.device)
        floors = sae.to_pre_activation(torch.zeros(1, len(order)), torch.arange(len(order)))[0]
        return Decoder(sae.W_dec.detach()[order], sae.b_dec.detach(), floors.to(order.device)[order])


def _stored(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The settings file of a folder, `steering.json` or else `eraser.json`, and the settings in it."""
    from lbdt.files import read_json

    steering = (folder / CONFIG_FILE).is_file()
    path = folder / (CONFIG_FILE if steering else "eraser.json")
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    if values.get("version") != _VERSION:
        raise ValueError(f"{path}: expected version {_VERSION}, got {brief(values.get('version'))}")
    wanted = _KEYS if steering else _ERASER_KEYS
    wrong = sorted(set(values) ^ set(wanted) if steering else set(wanted) - set(values))
    if wrong:
        raise ValueError(
            f"{path}: expected the keys {', '.join(wanted)}; missing or unknown: {listed(wrong)}"
        )
    if steering:
        return path, {key: values[key] for key in _KEYS if key != "version"}
    return path, {
        "hookpoint": values["detect_at"] or values["hookpoint"],
        "selection": values["selection"],
    }
