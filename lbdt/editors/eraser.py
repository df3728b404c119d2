"""`ConceptEraser`: Patch Embedding Replacement on a diffusers pipeline (METHOD.md, 4; arXiv 2606.31699)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lbdt.dictionary import ConceptDictionary
from lbdt.donors import AVOIDED, SOURCES, AvoidedPatches
from lbdt.editors.attachment import LatentColumns, check_hookpoint, choice
from lbdt.editors.unet_editor import UnetEditor
from lbdt.hooks import lookup
from lbdt.hooks.call_state import CallState
from lbdt.hooks.detection_plan import MOST_PADDING, TARGETS, DetectionOptions, Gate
from lbdt.hooks.erase_plan import ErasePlan, KnownLatents
from lbdt.hooks.recorder import Recorder
from lbdt.ops.detect_patches import MOST_PATCHES
from lbdt.runs.reading import brief
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

    from lbdt.dictionary import Selection
    from lbdt.dictionary.picture_counts import PictureCounts
    from lbdt.hooks.lookup import Denoiser


class ConceptEraser(UnetEditor):
    """Detects the patches that carry a concept, and overwrites them with others of the same feature map.

    The SAE only looks: its latents are never edited, and there is no strength to set.
    """

    KIND = "eraser"
    FILE = "eraser.json"
    SETTINGS = ("hookpoint", "padding", "source", "selection", "target", "detect_at", "min_patches", "avoid")
    _ADDED = {"min_patches": None, "avoid": AvoidedPatches.erased.value}
    SHOWN = ("padding", "source", "avoid")
    _KEEPS_ROOM = True

    def __init__(
        self,
        sae: SparseAutoencoder,
        dictionary: ConceptDictionary,
        hookpoint: str,
        *,
        padding: int = 1,
        source: str = "random",
        selection: Mapping[str, Any] | None = None,
        target: str = "output",
        detect_at: str | None = None,
        min_patches: int | None = None,
        avoid: str = "erased",
    ) -> None:
        """
        Args:
            sae: of the block's output, or of its update (output - input) iff `sae.config.update`; the encoder
                suffices.
            dictionary: made with that SAE. Where it or the SAE names its site, that must be the block looked at.
            hookpoint: the block whose output is overwritten, e.g. "unet.up_blocks.1.attentions.1".
            padding: the mask grows by this Chebyshev distance (patches), >= 0.
            source: donors: "random" undetected patch | "nearest" one | "mean" of the 5 nearest | "row": the nearest
                of the same row of the grid, or where that has none, of all.
            selection: keywords of `ConceptDictionary.select`; None: its defaults. Under the name of a concept, keywords
                of its own stand in place of those: `{"top_k": 1, "Cats": {"percentile": 99.99}}`.
            target: what is replaced: the block's "output" or its "update".
            detect_at: the block that the SAE looks at, if another one, on the same grid and earlier in the UNet.
            min_patches: the gate (METHOD.md, 2.5): an image with fewer detected patches of a concept in a UNet call is
                not treated for it there, and without any concept left keeps its bits. None: as the dictionary was
                calibrated, for concepts whose latents and thresholds are those it was calibrated with; else 1: off.
            avoid: whose detected patches are no donors: those of the "erased" concepts | "known": of every concept of
                the dictionary, so that nothing is painted over with pieces of what stands beside it. That is a second
                detection in every UNet call, by the latents of all concepts: it costs more the more concepts there are
                and the more of the map they cover, in the images in which something is replaced.

        Raises:
            ValueError, TypeError: the argument, what was expected, what was given.
        """
        self.padding, self.source, self.target, self.detect_at = padding, source, target, detect_at
        self.min_patches, self.avoid = min_patches, avoid
        super().__init__(sae, dictionary, hookpoint, selection)

    def save_pretrained(
        self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None, decoder: bool = False
    ) -> None:
        """Writes `eraser.json`, `sae/`, `dictionary/` and their `digests.json`; `dtype` float16 halves the tensors.

        An eraser that is in `directory` is replaced all at one moment. An eraser needs the encoder only; `decoder`
        keeps `W_dec` too, for `lbdt.Steering.from_pretrained`.

        Raises:
            ValueError: `decoder` where this SAE has none, or tensors that overflow `dtype`.
            OSError: why the folder cannot be written.
        """
        if decoder and self.sae.W_dec is None:
            raise ValueError(
                "decoder: this eraser's SAE was loaded without W_dec; make the eraser with the SAE of the full "
                "checkpoint, or save with decoder=False"
            )
        self._save(directory, dtype, decoder)

    def _check(self) -> None:
        if self.detect_at is not None:
            check_hookpoint("detect_at", self.detect_at)
        super()._check()
        if isinstance(self.padding, bool) or not isinstance(self.padding, int):
            raise TypeError(f"padding: expected an integer >= 0, got {brief(self.padding)}")
        if self.padding < 0:
            raise ValueError(f"padding: expected an integer >= 0, got {self.padding}")
        if self.padding > MOST_PADDING:
            raise ValueError(f"padding: expected an integer <= {MOST_PADDING}, got {self.padding}")
        if self.min_patches is not None:
            least = self.min_patches
            if isinstance(least, bool) or not isinstance(least, int):
                raise TypeError(f"min_patches: expected None or an integer >= 1, got {brief(least)}")
            if not 1 <= least <= MOST_PATCHES:
                raise ValueError(f"min_patches: expected 1 <= min_patches <= {MOST_PATCHES}, got {least}")
        choice("source", self.source, SOURCES)
        choice("target", self.target, TARGETS)
        choice("avoid", self.avoid, AVOIDED)

    def _blocks(self, denoiser: Denoiser) -> list[nn.Module]:
        blocks = super()._blocks(denoiser)
        if self.detect_at not in (None, self.hookpoint):
            blocks.append(self._block(denoiser, self.detect_at, "detect_at"))
            if lookup.runs_before(self.hookpoint, self.detect_at):
                raise ValueError(
                    f"detect_at: {self.detect_at!r} runs after the hookpoint {self.hookpoint!r}; name an earlier block"
                )
        return blocks

    def _plan(
        self,
        columns: LatentColumns,
        options: DetectionOptions,
        *tensors: Tensor | None,
        like: ErasePlan | None = None,
    ) -> ErasePlan:
        known = None if like is None else like.known
        if like is None and self.avoid == AvoidedPatches.known:
            known = self._known_latents(columns.selections)
        return ErasePlan(
            options,
            *tensors,
            bank=self.dictionary.bank,
            padding=self.padding,
            source=self.source,
            target=self.target,
            gate=self._gate_of(columns),
            known=known,
            pre=self._pre_encoder(like),
            centre=self._centre() if like is None else None,
        )

    def _centre(self) -> Tensor:
        """What is near to the activations that the encoder's rows are multiplied with, [d] float32."""
        middle = self.sae.b_dec.detach().float()
        return torch.zeros_like(middle) if self.sae.config.pre_encoder else middle

    def _digested(self) -> list[Any]:
        gate = self._gate({name: self.select(name) for name in self.concepts})
        parts = [] if gate is None else ["gate", gate.least, str(gate.least_of)]
        parts += [] if gate is None or not gate.over_run else ["over the calls of a run"]
        return parts if self.avoid == AvoidedPatches.erased else [*parts, f"avoid={self.avoid}"]

    def _known_latents(self, selections: Mapping[str, Selection]) -> KnownLatents:
        """The latents of every concept of the dictionary, by `selections` where it is among them."""
        chosen = {n: selections[n] if n in selections else self.select(n) for n in self.concepts}
        columns = LatentColumns.of([], chosen, len(self.dictionary.timesteps))
        return KnownLatents.of(*self._detected(columns, self.dictionary.firing_order()))

    def _gate_of(self, columns: LatentColumns) -> Gate | None:
        """The gate of the columns, in whose place those of other concepts may come: there is one where any of them
        may have one, so that it does not depend on the concepts."""
        may_have = self.dictionary.gate is not None if self.min_patches is None else self.min_patches > 1
        return self._gate(columns.selections, always=True).padded(len(columns.latents)) if may_have else None

    def _gate(self, selections: Mapping[str, Selection], always: bool = False) -> Gate | None:
        """The gate of the selections' columns; None where it is off, unless `always`."""
        counts, bins = self.dictionary.gate, len(self.dictionary.timesteps)
        # Without any concept the op wants a column too, and others may come in its place.
        least = torch.ones(bins, max(1, len(selections)), dtype=torch.int64)
        least_of, over_run, early = 0, False, 0
        if self.min_patches is not None:
            least.fill_(self.min_patches)
        elif counts is not None:
            calibrated, least_of = counts.least(), counts.patches
            over_run, early = counts.over == "run", counts.early
            for place, (name, selection) in enumerate(selections.items()):
                # Where a concept is detected otherwise, its counts say nothing.
                if self._is_counted(counts, selection):
                    least[:, place] = calibrated[self.dictionary.index(name)]
        if not always and bool((least == 1).all()):
            return None
        widths = torch.tensor(
            [len(selection.latents) for selection in selections.values()], dtype=torch.int64
        )
        owners = torch.arange(len(selections)).repeat_interleave(widths)
        return Gate(owners, least, least_of, over_run, early)

    def _is_counted(self, counts: PictureCounts, selection: Selection) -> bool:
        """Whether the gate's pictures were counted under these latents and thresholds."""
        if selection.criteria is not None and counts.is_for(selection.criteria):
            return True
        counted = self.dictionary.select(selection.concept, **counts.selection)
        same = torch.equal(selection.latents, counted.latents)
        return same and torch.equal(selection.thresholds, counted.thresholds)

    def _hooks(
        self, blocks: list[nn.Module], plan: ErasePlan, state: CallState, recorder: Recorder
    ) -> list[tuple[nn.Module, ModelHook]]:
        from lbdt.hooks.blocks import DetectHook, EraseHook

        target, *detectors = blocks
        hooks = [(target, EraseHook(plan, state, recorder, detects=not detectors))]
        return hooks + [(detector, DetectHook(plan, state)) for detector in detectors]
