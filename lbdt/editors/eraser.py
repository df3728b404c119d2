"""`ConceptEraser`: Patch Embedding Replacement on a diffusers pipeline (arXiv 2606.31699, section 3)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lbdt.dictionary import ConceptDictionary
from lbdt.editors import attachment
from lbdt.editors.attachment import Attachment
from lbdt.editors.report import Report, summarise
from lbdt.folders import DIGESTS_FILE, PARTS, check_digests, replaced, write_digests
from lbdt.hooks import lookup
from lbdt.hooks.detection_plan import MOST_PADDING, ROWS, SOURCES, TARGETS, CallState, EraseOptions, ErasePlan
from lbdt.hooks.recorder import Recorder
from lbdt.reading import brief, listed
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from lbdt.dictionary import Selection

CONFIG_FILE = "eraser.json"
OWN = (CONFIG_FILE, "sae", "dictionary", DIGESTS_FILE)
"""What `save_pretrained` writes."""
_VERSION = 1
_numbers = itertools.count()
_KEYS = ("version", "hookpoint", "padding", "source", "selection", "target", "detect_at")
_FILES = (CONFIG_FILE, DIGESTS_FILE, *PARTS)


class ConceptEraser:
    """Detects the patches that carry a concept, and overwrites them with others of the same feature map.

    The SAE only looks: its latents are never edited, and there is no strength to set.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        dictionary: ConceptDictionary,
        hookpoint: str,
        *,
        padding: int = 1,
        source: str = "random",
        selection: dict[str, Any] | None = None,
        target: str = "output",
        detect_at: str | None = None,
    ) -> None:
        """
        Args:
            sae: of the block's output, or of its update (output - input) iff `sae.config.update`; the encoder
                suffices.
            dictionary: made with that SAE.
            hookpoint: the block whose output is overwritten, e.g. "unet.up_blocks.1.attentions.1".
            padding: the mask grows by this Chebyshev distance (patches), >= 0.
            source: donors: "random" undetected patch | "nearest" one | "mean" of the 5 nearest.
            selection: keywords of `ConceptDictionary.select`; None: its defaults.
            target: what is replaced: the block's "output" or its "update".
            detect_at: the block that the SAE looks at, if another one, on the same grid and earlier in the UNet.

        Raises:
            ValueError, TypeError: the argument, what was expected, what was given.
        """
        attachment.check_parts(sae, dictionary)
        self.sae, self.dictionary = sae, dictionary
        self.hookpoint, self.detect_at = hookpoint, detect_at
        self.padding, self.source, self.target = padding, source, target
        self.selection = dict(selection or {})
        self._recorder: Recorder | None = None
        self._summary = summarise
        # Not id(self): an eraser may be gone while its hooks are still on.
        self._name = f"lbdt_eraser_{next(_numbers)}"
        self._check_settings()

    @property
    def concepts(self) -> tuple[str, ...]:
        """The names that `attach` takes."""
        return self.dictionary.concepts

    def select(self, concept: str) -> Selection:
        """The latents and thresholds of a concept under this eraser's `selection`."""
        return self.dictionary.select(concept, **self.selection)

    def attach(
        self,
        pipe: Any,
        concepts: Sequence[str] | Sequence[Sequence[str]],
        seed: int | Sequence[int] = 0,
        rows: str = "all",
        steps: tuple[int, int] | None = None,
        keep_masks: bool = False,
    ) -> Attachment:
        """Puts the eraser on a pipeline until the returned handle is removed, or its `with` block is left.

        Args:
            pipe: a diffusers pipeline with a UNet. Its weights and its state_dict are not touched.
            concepts: names for all images, or one list of names (which may be empty) per prompt or per image.
            seed: of the donor draws. An int s stands for s + i for image i; in a list of one per prompt, for
                s + j for image j of the prompt. An image's draws do not depend on the batch around it.
            rows: guidance halves that are treated: "all" (published) | "cond". Without guidance, the only half.
            steps: (first, last): treat steps first <= i < last of the scheduler's timesteps; None: all.
            keep_masks: keep each call's masks for `Attachment.masks` (4 MiB on the device).

        Raises:
            ValueError, TypeError: before anything is changed: unknown concept or hookpoint, an SAE of another width
                than the block, a concept without any latent, a pipeline without a UNet, bad settings, an attachment
                that is still on. At the
                pipeline's call, before anything is generated: a list of neither one entry per prompt nor per image.
        """
        self._check_settings()
        unet = lookup.find_unet(pipe)
        width = self.sae.config.d_in
        block = attachment.find_block(unet, self.hookpoint, width, "hookpoint")
        detector = None
        if self.detect_at is not None and self.detect_at != self.hookpoint:
            detector = attachment.find_block(unet, self.detect_at, width, "detect_at")
            if lookup.runs_before(self.hookpoint, self.detect_at):
                raise ValueError(
                    f"detect_at: {self.detect_at!r} runs after the hookpoint {self.hookpoint!r}; name an earlier block"
                )
        sets, set_list = attachment.concept_sets(concepts)
        seeds, seed_list = attachment.seed_values(seed)
        options = EraseOptions(
            padding=self.padding,
            source=self.source,
            target=self.target,
            rows=attachment.choice("rows", rows, ROWS),
            steps=attachment.window(steps),
            k=self.sae.rank_k,
            on_update=self.sae.config.update,
            width=width,
            set_list=set_list,
            seed_list=seed_list,
        )
        attachment.refuse_twice(block, self._name, "eraser")
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
        hooks = [(block, blocks.EraseHook(plan, state, recorder, detects=detector is None))]
        if detector is not None:
            hooks.append((detector, blocks.DetectHook(plan, state)))
        summary = partial(summarise, blind=blind)
        handle = Attachment.on_unet(self._name, pipe, self.hookpoint, hooks, plan, state, recorder, summary)
        self._recorder, self._summary = recorder, summary
        return handle

    def report(self) -> Report:
        """What happened since the last `attach`; also after its removal. Waits for the device.

        Raises:
            ValueError: never attached.
        """
        if self._recorder is None:
            raise ValueError("report: the eraser was never attached; call attach(pipe, concepts) first")
        return self._summary(self._recorder.read())

    def save_pretrained(
        self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None, decoder: bool = False
    ) -> None:
        """Writes `eraser.json`, `sae/`, `dictionary/` and their `digests.json`; `dtype` float16 halves the tensors.

        An eraser that is in `directory` is replaced all at one moment. An eraser needs the encoder only. `decoder` keeps `W_dec` too, for `lbdt.Steering.from_pretrained`.

        Raises:
            ValueError: `decoder` where this SAE has none, or tensors that overflow `dtype`.
            OSError: why the folder cannot be written.
        """
        from lbdt.files import json_bytes, write_files

        self._check_settings()
        if decoder and self.sae.W_dec is None:
            raise ValueError(
                "decoder: this eraser's SAE was loaded without W_dec; make the eraser with the SAE of the full "
                "checkpoint, or save with decoder=False"
            )
        settings = {key: _VERSION if key == "version" else getattr(self, key) for key in _KEYS}
        with replaced(Path(directory), OWN) as folder:
            self.sae.save_pretrained(folder / "sae", encoder_only=not decoder, dtype=dtype)
            self.dictionary.save_pretrained(folder / "dictionary", dtype=dtype)
            write_digests(folder)
            write_files(folder, {CONFIG_FILE: json_bytes(settings)})

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str]) -> ConceptEraser:
        """The eraser in a folder, or in a Hugging Face repository (`owner/name`).

        Raises:
            ValueError: anything absent, unreadable or contradictory, or an SAE or dictionary other than those it was
                saved with (where it says which); the text names the file.
        """
        from lbdt.files import read_json
        from lbdt.hub import resolve_folder

        folder = resolve_folder(path_or_repo, None, marker=CONFIG_FILE, files=_FILES)
        path = folder / CONFIG_FILE
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
        if settings.get("version") != _VERSION:
            raise ValueError(f"{path}: expected version {_VERSION}, got {brief(settings.get('version'))}")
        wrong = sorted(set(settings) ^ set(_KEYS))
        if wrong:
            raise ValueError(
                f"{path}: expected exactly the keys {', '.join(_KEYS)}; missing or unknown: {listed(wrong)}"
            )
        check_digests(folder)
        sae = SparseAutoencoder.from_pretrained(folder / "sae")
        dictionary = ConceptDictionary.from_pretrained(folder / "dictionary")
        try:
            return cls(sae, dictionary, **{key: settings[key] for key in _KEYS if key != "version"})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        return (
            f"ConceptEraser({len(self.concepts)} concepts, hookpoint={self.hookpoint!r}, padding={self.padding}, "
            f"source={self.source!r})"
        )

    def _check_settings(self) -> None:
        """Settings are plain attributes, so they are checked again when they are used."""
        attachment.check_hookpoint("hookpoint", self.hookpoint)
        if self.detect_at is not None:
            attachment.check_hookpoint("detect_at", self.detect_at)
        if isinstance(self.padding, bool) or not isinstance(self.padding, int):
            raise TypeError(f"padding: expected an integer >= 0, got {brief(self.padding)}")
        if self.padding < 0:
            raise ValueError(f"padding: expected an integer >= 0, got {self.padding}")
        if self.padding > MOST_PADDING:
            raise ValueError(f"padding: expected an integer <= {MOST_PADDING}, got {self.padding}")
        attachment.choice("source", self.source, SOURCES)
        attachment.choice("target", self.target, TARGETS)
        attachment.check_selection(self.selection)

    def _plan(self, options: EraseOptions, chosen: attachment.LatentColumns, seeds: list[int]) -> ErasePlan:
        tensors = attachment.plan_tensors(self.sae, self.dictionary, chosen, seeds)
        return ErasePlan(options, *tensors, bank=self.dictionary.bank)
