"""`ConceptEraser`: Patch Embedding Replacement on a diffusers pipeline (arXiv 2606.31699, section 3)."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lbdt.dictionary import ConceptDictionary
from lbdt.hooks import lookup
from lbdt.hooks.plan import ROWS, SOURCES, TARGETS, CallState, Options, Plan, check_lengths
from lbdt.hooks.recorder import Recorder
from lbdt.report import Report, StepMask, step_masks, summarise
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from lbdt.dictionary import Selection

CONFIG_FILE = "eraser.json"
_VERSION = 1
_numbers = itertools.count()
_KEYS = ("version", "hookpoint", "padding", "source", "selection", "target", "detect_at")
_FILES = (
    CONFIG_FILE,
    "sae/cfg.json",
    "sae/sae.safetensors",
    "dictionary/dictionary.json",
    "dictionary/dictionary.safetensors",
)


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
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"sae: expected a SparseAutoencoder, got {type(sae).__name__}")
        if not isinstance(dictionary, ConceptDictionary):
            raise TypeError(f"dictionary: expected a ConceptDictionary, got {type(dictionary).__name__}")
        if sae.config.num_latents != dictionary.num_latents:
            raise ValueError(
                f"dictionary: made with an SAE of {dictionary.num_latents} latents, but the given SAE has "
                f"{sae.config.num_latents}; use the SAE and the dictionary of one training"
            )
        if dictionary.bank is not None and dictionary.bank.shape[2] != sae.config.d_in:
            raise ValueError(
                f"dictionary: its bank holds embeddings of width {dictionary.bank.shape[2]}, the SAE has width "
                f"{sae.config.d_in}"
            )
        self.sae, self.dictionary = sae, dictionary
        self.hookpoint, self.detect_at = hookpoint, detect_at
        self.padding, self.source, self.target = padding, source, target
        self.selection = dict(selection or {})
        self._recorder: Recorder | None = None
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
                than the block, a pipeline without a UNet, bad settings, an attachment that is still on. At the
                pipeline's call, before anything is generated: a list of neither one entry per prompt nor per image.
        """
        self._check_settings()
        unet = lookup.find_unet(pipe)
        block = self._block(unet, self.hookpoint, "hookpoint")
        detector = None
        if self.detect_at is not None and self.detect_at != self.hookpoint:
            detector = self._block(unet, self.detect_at, "detect_at")
            if lookup.runs_before(self.hookpoint, self.detect_at):
                raise ValueError(
                    f"detect_at: {self.detect_at!r} runs after the hookpoint {self.hookpoint!r}; name an earlier block"
                )
        sets, set_list = _concept_sets(concepts)
        seeds, seed_list = _seeds(seed)
        options = Options(
            padding=self.padding,
            source=self.source,
            target=self.target,
            rows=_choice("rows", rows, ROWS),
            steps=_window(steps),
            k=self.sae.rank_k,
            on_update=self.sae.config.update,
            width=self.sae.config.d_in,
            set_list=set_list,
            seed_list=seed_list,
        )
        # Imported here, so that looking at an eraser's concepts does not load diffusers.
        from lbdt.hooks import registry

        name = self._name
        if registry.is_registered(block, name):
            raise ValueError(
                "this eraser is attached to this pipeline already; remove() that handle (or leave its with block) first"
            )
        parameter = next(unet.parameters())
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            plan = self._plan(options, sets, seeds)
            plan.to(parameter.device, parameter.dtype)
            recorder = Recorder(parameter.device, masks=keep_masks)
        attachment = Attachment(name, pipe, unet, block, detector, self, plan, recorder)
        self._recorder = recorder
        return attachment

    def report(self) -> Report:
        """What happened since the last `attach`; also after its removal. Waits for the device.

        Raises:
            ValueError: never attached.
        """
        if self._recorder is None:
            raise ValueError("report: the eraser was never attached; call attach(pipe, concepts) first")
        return summarise(self._recorder.read())

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes `eraser.json`, `sae/` (encoder only) and `dictionary/`; `dtype` float16 halves the tensors."""
        from lbdt.files import json_bytes, write_files

        self._check_settings()
        folder = Path(directory)
        self.sae.save_pretrained(folder / "sae", encoder_only=True, dtype=dtype)
        self.dictionary.save_pretrained(folder / "dictionary", dtype=dtype)
        settings = {key: _VERSION if key == "version" else getattr(self, key) for key in _KEYS}
        write_files(folder, {CONFIG_FILE: json_bytes(settings)})

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str]) -> ConceptEraser:
        """The eraser in a folder, or in a Hugging Face repository (`owner/name`).

        Raises:
            ValueError: anything absent, unreadable or contradictory; the text names the file.
        """
        from lbdt.files import read_json
        from lbdt.hub import resolve_folder

        folder = resolve_folder(path_or_repo, None, marker=CONFIG_FILE, files=_FILES)
        path = folder / CONFIG_FILE
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
        if settings.get("version") != _VERSION:
            raise ValueError(f"{path}: expected version {_VERSION}, got {settings.get('version')!r}")
        wrong = sorted(set(settings) ^ set(_KEYS))
        if wrong:
            raise ValueError(
                f"{path}: expected exactly the keys {', '.join(_KEYS)}; missing or unknown: {', '.join(wrong)}"
            )
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
        for name in ("hookpoint", "detect_at"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name == "detect_at"):
                raise TypeError(
                    f"{name}: expected a name such as 'unet.mid_block.attentions.0', got {value!r}"
                )
        if isinstance(self.padding, bool) or not isinstance(self.padding, int):
            raise TypeError(f"padding: expected an integer >= 0, got {self.padding!r}")
        if self.padding < 0:
            raise ValueError(f"padding: expected an integer >= 0, got {self.padding}")
        _choice("source", self.source, SOURCES)
        _choice("target", self.target, TARGETS)
        known = [name for name in inspect.signature(ConceptDictionary.select).parameters][2:]
        unknown = sorted(set(self.selection) - set(known))
        if unknown:
            raise ValueError(
                f"selection: unknown key {', '.join(unknown)}; expected some of {', '.join(known)}"
            )

    def _block(self, unet: torch.nn.Module, hookpoint: str, argument: str) -> torch.nn.Module:
        block = lookup.find_block(unet, hookpoint, argument)
        width = lookup.channels(block)
        if width is not None and width != self.sae.config.d_in:
            raise ValueError(
                f"{argument}: {hookpoint!r} has {width} channels, but the SAE was trained on {self.sae.config.d_in}; "
                "use the SAE of this block"
            )
        return block

    def _plan(self, options: Options, sets: list[list[str]], seeds: list[int]) -> Plan:
        names = list(dict.fromkeys(name for names in sets for name in names))
        selections = [self.select(name) for name in names]
        latents = torch.cat([torch.zeros(0, dtype=torch.int64), *(s.latents for s in selections)])
        bins = len(self.dictionary.timesteps)
        thresholds = torch.cat([torch.zeros(bins, 0), *(s.thresholds for s in selections)], dim=1)
        # Every concept keeps columns of its own: two may share a latent at different thresholds.
        owner = [name for name, s in zip(names, selections, strict=True) for _ in range(len(s.latents))]
        enabled = torch.tensor([[name in chosen for name in owner] for chosen in sets], dtype=torch.bool)
        sae = self.sae
        # Frequent latents first, so that a count of those above a value ends early. Ids elsewhere stay the SAE's own.
        order = self.dictionary.firing_order().to(sae.encoder.weight.device)
        return Plan(
            options,
            weight=sae.encoder.weight.detach().index_select(0, order),
            bias=sae.folded_bias()[order],
            latents=order.argsort().cpu()[latents],
            thresholds=sae.to_pre_activation(thresholds, latents),
            timesteps=self.dictionary.timesteps.float(),
            enabled=enabled.view(len(sets), len(owner)),
            seeds=torch.tensor(seeds, dtype=torch.int64),
            bank=self.dictionary.bank,
        )


class Attachment:
    """An eraser on a pipeline. A context manager; `remove()` takes it off, and may be called again."""

    def __init__(
        self,
        name: str,
        pipe: Any,
        unet: torch.nn.Module,
        block: torch.nn.Module,
        detector: torch.nn.Module | None,
        eraser: ConceptEraser,
        plan: Plan,
        recorder: Recorder,
    ) -> None:
        from lbdt.hooks import blocks, registry, watch

        self._recorder = recorder
        self._undo: list[Any] = []
        state = CallState(pipe)
        embeds_classes = getattr(unet.config, "class_embed_type", None) == "timestep"
        hooks = [
            (unet.time_proj, blocks.TimestepHook(plan, state, embeds_classes)),
            (block, blocks.EraseHook(plan, state, recorder, detects=detector is None)),
        ]
        if detector is not None:
            hooks.append((detector, blocks.DetectHook(plan, state)))
        around = lookup.grid_parent(unet, eraser.hookpoint)
        if around is not None:
            hooks.append((around, blocks.GridHook(plan, state)))

        def begin(prompts: int, images: int, in_call: bool) -> None:
            if in_call:
                check_lengths(plan, images, prompts)
            state.prompts, state.images = prompts, images

        try:
            for module, hook in hooks:
                registry.register(module, hook, name)
                self._undo.append(lambda module=module: registry.unregister(module, name))
            self._undo.append(watch.watch(pipe, begin))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes every hook off; the pipeline computes bit for bit what it did before."""
        while self._undo:
            self._undo.pop()()

    def report(self) -> Report:
        """What happened under this attachment. Waits for the device."""
        return summarise(self._recorder.read())

    def masks(self) -> list[StepMask]:
        """The masks of every UNet call, oldest first; needs `attach(..., keep_masks=True)`.

        Raises:
            ValueError: they were not kept.
        """
        if not self._recorder.masks:
            raise ValueError("masks: not kept; attach with keep_masks=True")
        return step_masks(self._recorder.read())

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")
    return value


def _concept_sets(concepts: Any) -> tuple[list[list[str]], bool]:
    """The sets, and whether there is one per prompt or image."""
    example = "concepts=['Cats'] for all images, or [['Cats'], []], one list per prompt"
    if isinstance(concepts, str) or not isinstance(concepts, Sequence):
        raise TypeError(f"concepts: expected a list of names, got {concepts!r}; write {example}")
    if not concepts:
        raise ValueError(f"concepts: expected one name or more, got an empty list; write {example}")
    if all(isinstance(name, str) for name in concepts):
        return [list(concepts)], False
    for names in concepts:
        if (
            isinstance(names, str)
            or not isinstance(names, Sequence)
            or not all(isinstance(n, str) for n in names)
        ):
            raise TypeError(
                f"concepts: expected names or lists of names, got {names!r} among them; write {example}"
            )
    return [list(names) for names in concepts], True


def _seeds(seed: Any) -> tuple[list[int], bool]:
    values = [seed] if isinstance(seed, int) else seed
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise TypeError(f"seed: expected an integer, or one per prompt or image, got {seed!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"seed: expected integers, got {value!r}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed: expected a 64-bit integer, got {value}")
    return list(values), values is seed


def _window(steps: Any) -> tuple[int, int] | None:
    if steps is None:
        return None
    pair = tuple(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else ()
    if len(pair) != 2 or any(isinstance(i, bool) or not isinstance(i, int) for i in pair):
        raise TypeError(f"steps: expected (first, last), two integers, got {steps!r}")
    if not 0 <= pair[0] < pair[1]:
        raise ValueError(f"steps: expected 0 <= first < last, got {pair}")
    return pair
