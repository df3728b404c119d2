"""`Editor`: what the eraser and the steering baselines have in common."""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lbdt.activations.pipelines import digest_of_module
from lbdt.dictionary import ConceptDictionary
from lbdt.editors.attachment import (
    EXAMPLE,
    Attachment,
    LatentColumns,
    around_call,
    check_hookpoint,
    check_selection,
    choice,
    concept_sets,
    seed_values,
    warn_of_blind,
    window,
)
from lbdt.editors.edit_report import Blind, Report, summarise
from lbdt.editors.site_check import check_site
from lbdt.hooks import lookup
from lbdt.hooks.detection_plan import ROWS, CallState, DetectionOptions, DetectionPlan
from lbdt.hooks.recorder import Call, Recorder
from lbdt.runs.digests import marked, sha256
from lbdt.runs.folder import DIGESTS_FILE, PARTS, check_digests, replaced, write_digests
from lbdt.runs.reading import brief, listed
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

    from lbdt.dictionary import Selection

FOLDER = ("sae", "dictionary", DIGESTS_FILE)
"""What `UnetEditor.save_pretrained` writes beside the settings' file."""
_VERSION = 1
# With None for what an editor lacks: finished pictures are kept under digests of these, in this order. Padding, source
# and strength are told apart by themselves.
_DIGESTED = ("hookpoint", "detect_at", "target", "rule", "error", "where")
_numbers = itertools.count()


class Editor(ABC):
    """Changes what a layer of a pipeline returns, by an SAE of that layer, while it is attached.

    No weight is touched. Settings are attributes that may be changed before the next `attach`.
    """

    KIND: ClassVar[str]
    """What errors call it: "eraser" | "steering"."""
    SETTINGS: ClassVar[tuple[str, ...]]
    """The names of what is set by attribute, and saved."""
    SHOWN: ClassVar[tuple[str, ...]]
    """Those of `SETTINGS` that a table of results names."""
    _ADDED: ClassVar[dict[str, Any]] = {}
    """Settings that older files lack, and what these meant."""
    _EXAMPLE: ClassVar[str] = EXAMPLE
    """A hookpoint, for the errors about one."""

    def __init__(self, sae: SparseAutoencoder, hookpoint: str) -> None:
        if not isinstance(sae, SparseAutoencoder):
            raise TypeError(f"sae: expected a SparseAutoencoder, got {type(sae).__name__}")
        self.sae, self.hookpoint = sae, hookpoint
        self._record: tuple[Recorder, Callable[[list[Call]], Report]] | None = None
        # Not id(self): an editor may be gone while its hooks are still on.
        self._name = f"lbdt_{self.KIND}_{next(_numbers)}"
        self._check()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the SAE and the dictionary, by name: a new dict."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    @property
    def shown(self) -> dict[str, Any]:
        """The settings of `SHOWN`, by name: without those that older files lack, where they mean what these meant."""
        given = {name: getattr(self, name) for name in self.SHOWN}
        return {n: v for n, v in given.items() if n not in self._ADDED or v != self._ADDED[n]}

    @abstractmethod
    def attach(self, pipe: Any, concepts: Sequence[str] | Sequence[Sequence[str]]) -> Attachment:
        """Puts the editor on a pipeline until the returned handle is removed, or its `with` block is left."""

    def report(self) -> Report:
        """What happened since the last `attach`; also after its removal. Waits for the device.

        Raises:
            ValueError: never attached.
        """
        if self._record is None:
            raise ValueError(f"report: the {self.KIND} was never attached; call attach(pipe, concepts) first")
        recorder, summary = self._record
        return summary(recorder.read())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._known()}hookpoint={self.hookpoint!r}, {self._in_words()})"

    def _known(self) -> str:
        return ""

    def _in_words(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.shown.items())

    def _ran(self) -> str | None:
        """What a steering's report says of the rule."""
        return None

    def _check(self) -> None:
        """Refuses bad settings: they are plain attributes, so they are checked again when they are used."""
        check_hookpoint("hookpoint", self.hookpoint, self._EXAMPLE)
        check_site(self, "sae", self.sae.config.site)

    def _refuse_twice(self, module: nn.Module) -> None:
        # Imported here, so that looking at an editor's concepts does not load diffusers.
        from lbdt.hooks import registry

        if registry.is_registered(module, self._name):
            raise ValueError(
                f"this {self.KIND} is attached to this pipeline already; remove() that handle (or leave its with "
                "block) first"
            )

    def _put_on(
        self,
        pipe: Any,
        hooks: Iterable[tuple[nn.Module, ModelHook]],
        watch: Callable[[Any], Callable[[], None]],
        recorder: Recorder,
        blind: Blind | None = None,
    ) -> Attachment:
        summary = partial(summarise, blind=blind, ran=self._ran())
        handle = Attachment(self._name, pipe, hooks, watch, recorder, summary)
        # Not the handle, which holds the pipeline.
        self._record = recorder, summary
        return handle


class UnetEditor(Editor):
    """An editor of a UNet block, by a concept dictionary."""

    FILE: ClassVar[str]
    """The JSON file of the settings."""
    _OTHERWISE: ClassVar[tuple[str, ...]] = ()
    """Files that are read instead of `FILE` where there is none."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        dictionary: ConceptDictionary,
        hookpoint: str,
        selection: dict[str, Any] | None,
    ) -> None:
        self.dictionary, self.selection = dictionary, dict(selection or {})
        super().__init__(sae, hookpoint)

    @property
    def concepts(self) -> tuple[str, ...]:
        """The names that `attach` takes."""
        return self.dictionary.concepts

    @property
    def has_gradient(self) -> bool:
        """Whether a loss of the pictures reaches the prompt through what is attached."""
        return True

    def select(self, concept: str) -> Selection:
        """The latents and thresholds of a concept under this editor's `selection`."""
        return self.dictionary.select(concept, **self.selection)

    def attach(
        self,
        pipe: Any,
        concepts: Sequence[str] | Sequence[Sequence[str]],
        seed: int | Sequence[int] = 0,
        rows: str | None = None,
        steps: tuple[int, int] | None = None,
        keep_masks: bool = False,
        selections: Mapping[str, Selection] | None = None,
    ) -> Attachment:
        """Puts the editor on a pipeline until the returned handle is removed, or its `with` block is left.

        Args:
            pipe: a diffusers pipeline with a UNet. Its weights and its state_dict are not touched.
            concepts: names for all images, or one list of names (which may be empty) per prompt or per image.
            seed: of the eraser's donor draws; a steering draws nothing. An int s stands for s + i for image i; in a
                list of one per prompt, for s + j for image j of the prompt. An image's draws do not depend on the
                batch around it.
            rows: guidance halves that are treated: "all" | "cond"; None: as published, "cond" under the steering rule
                "gsae", else "all". Without guidance, the only half.
            steps: (first, last): treat steps first <= i < last of the scheduler's timesteps; None: all.
            keep_masks: keep each call's masks for `Attachment.masks` (4 MiB on the device).
            selections: what `select` gave before, by name; of other names it is asked here.

        Rows without a concept, of the other half or outside of the window keep their bits.

        Raises:
            ValueError, TypeError: before anything is changed: unknown concept or hookpoint, an SAE of another width
                than the block, a concept without any latent or without a strength, a pipeline without a UNet, bad
                settings, an attachment that is still on. At the pipeline's call, before anything is generated: a list
                of neither one entry per prompt nor per image.
        """
        self._check()
        unet = lookup.find_unet(pipe)
        blocks = self._blocks(unet)
        sets, set_list = concept_sets(concepts)
        seeds, seed_list = seed_values(seed)
        options = DetectionOptions(
            rows=choice("rows", self._published_rows if rows is None else rows, ROWS),
            steps=window(steps),
            k=self.sae.rank_k,
            on_update=self.sae.config.update,
            width=self.sae.config.d_in,
            set_list=set_list,
            seed_list=seed_list,
        )
        self._refuse_twice(blocks[0])
        parameter = next(unet.parameters())
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            names = dict.fromkeys(itertools.chain.from_iterable(sets))
            known = selections or {}
            chosen = {name: known[name] if name in known else self.select(name) for name in names}
            columns = LatentColumns.of(sets, chosen, len(self.dictionary.timesteps))
            plan = self._plan(columns, options, *self._tensors(columns, seeds))
            blind = warn_of_blind(plan, columns.owners)
            plan.to(parameter.device, parameter.dtype)
            recorder = Recorder(parameter.device, masks=keep_masks, gated=plan.gate is not None)
        state = CallState(pipe)
        around, watch = around_call(unet, self.hookpoint, plan, state)
        hooks = [*around, *self._hooks(blocks, plan, state, recorder)]
        return self._put_on(pipe, hooks, watch, recorder, blind)

    def digest(self) -> str:
        """SHA-256 of the SAE (as in `lbdt.activations.pipelines`), the settings, every concept's latents and
        thresholds, the mean activations and the bank, so that no pictures are continued with another editor.

        What a run names by itself is left out: padding, source and strength.
        """
        settings = self.settings
        parts: list[Any] = [digest_of_module(self.sae)]
        parts += [f"{name}={settings.get(name)}" for name in _DIGESTED]
        for concept in self.concepts:
            chosen = self.select(concept)
            parts += [concept, chosen.latents, chosen.thresholds]
        bank = self.dictionary.bank
        parts += [self.dictionary.mean, "no bank" if bank is None else bank]
        return sha256(marked(parts + self._digested()))

    def _digested(self) -> list[Any]:
        """What else tells an editor's pictures from another's."""
        return []

    def save_settings(self, directory: str | os.PathLike[str]) -> None:
        """Writes `eraser.json` or `steering.json` alone, into the folder of another editor with the same SAE and
        dictionary; a steering needs the SAE's decoder there."""
        from lbdt.runs.files import json_bytes, write_files

        self._check()
        write_files(Path(directory), {self.FILE: json_bytes({"version": _VERSION, **self.settings})})

    @classmethod
    def from_pretrained(cls, path_or_repo: str | os.PathLike[str], **settings: Any) -> Self:
        """The editor in a folder, or in a Hugging Face repository (`owner/name`). `settings` are keywords of the class,
        and come before those of the file.

        An eraser's folder that was saved with `decoder=True` holds a `Steering` too: without a `steering.json`, give
        `strength`.

        Raises:
            ValueError: anything absent, unreadable or contradictory, or an SAE or dictionary other than those it was
                saved with (where it says which); the text names the file.
        """
        from lbdt.runs.hub import resolve_folder

        files = (cls.FILE, *cls._OTHERWISE, DIGESTS_FILE, *PARTS)
        folder = resolve_folder(path_or_repo, None, marker=cls.FILE, files=files)
        path, stored = cls._stored(folder, settings)
        check_digests(folder)
        sae = SparseAutoencoder.from_pretrained(folder / "sae")
        dictionary = ConceptDictionary.from_pretrained(folder / "dictionary")
        try:
            return cls(sae, dictionary, **stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _stored(cls, folder: Path, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The file of the settings, and what it says where nothing else is given."""
        from lbdt.runs.files import read_json

        path, keys = folder / cls.FILE, ("version", *cls.SETTINGS)
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
        if values.get("version") != _VERSION:
            raise ValueError(f"{path}: expected version {_VERSION}, got {brief(values.get('version'))}")
        values = cls._ADDED | values
        wrong = sorted(set(values) ^ set(keys))
        if wrong:
            raise ValueError(
                f"{path}: expected exactly the keys {', '.join(keys)}; missing or unknown: {listed(wrong)}"
            )
        del values["version"]
        return path, values | given

    def _save(self, directory: str | os.PathLike[str], dtype: torch.dtype | None, decoder: bool) -> None:
        self._check()
        with replaced(Path(directory), (self.FILE, *FOLDER)) as folder:
            self.sae.save_pretrained(folder / "sae", encoder_only=not decoder, dtype=dtype)
            self.dictionary.save_pretrained(folder / "dictionary", dtype=dtype)
            write_digests(folder)
            self.save_settings(folder)

    def _known(self) -> str:
        return f"{len(self.concepts)} concepts, "

    def _check(self) -> None:
        sae, dictionary = self.sae.config, self.dictionary
        if not isinstance(dictionary, ConceptDictionary):
            raise TypeError(f"dictionary: expected a ConceptDictionary, got {type(dictionary).__name__}")
        if sae.num_latents != dictionary.num_latents:
            raise ValueError(
                f"dictionary: made with an SAE of {dictionary.num_latents} latents, but the given SAE has "
                f"{sae.num_latents}; use the SAE and the dictionary of one training"
            )
        if dictionary.bank is not None and dictionary.bank.shape[2] != sae.d_in:
            raise ValueError(
                f"dictionary: its bank holds embeddings of width {dictionary.bank.shape[2]}, the SAE has width "
                f"{sae.d_in}"
            )
        super()._check()
        check_site(self, "dictionary", dictionary.site)
        check_selection(self.selection)

    @property
    def _published_rows(self) -> str:
        return "all"

    def _blocks(self, unet: nn.Module) -> list[nn.Module]:
        """The modules that are hooked; the first one's output is changed."""
        return [self._block(unet, self.hookpoint, "hookpoint")]

    def _block(self, unet: nn.Module, hookpoint: str, argument: str) -> nn.Module:
        block, width = lookup.find_block(unet, hookpoint, argument), self.sae.config.d_in
        found = lookup.channels(block)
        if found is not None and found != width:
            raise ValueError(
                f"{argument}: {hookpoint!r} has {found} channels, but the SAE was trained on {width}; "
                "use the SAE of this block"
            )
        return block

    def _tensors(self, columns: LatentColumns, seeds: list[int]) -> tuple[Tensor, ...]:
        """The tensors of a `DetectionPlan`, in its order; the encoder's rows in the dictionary's `firing_order`."""
        # Frequent latents first, so that a count of those above a value ends early. Ids elsewhere stay the SAE's own.
        order = self.dictionary.firing_order().to(self.sae.encoder.weight.device)
        return (
            self.sae.encoder.weight.detach().index_select(0, order),
            self.sae.folded_bias()[order],
            *self._detected(columns, order),
            self.dictionary.timesteps.float(),
            columns.enabled,
            torch.tensor(seeds, dtype=torch.int64),
        )

    def _detected(self, columns: LatentColumns, order: Tensor) -> tuple[Tensor, Tensor]:
        """The columns' latents as places in `order`, and their thresholds on pre-activations."""
        return (
            order.argsort().cpu()[columns.latents],
            self.sae.to_pre_activation(columns.thresholds, columns.latents),
        )

    @abstractmethod
    def _plan(self, columns: LatentColumns, options: DetectionOptions, *tensors: Tensor) -> DetectionPlan:
        """The plan of what is computed in a UNet call; `tensors` are those of `_tensors`."""

    @abstractmethod
    def _hooks(
        self, blocks: list[nn.Module], plan: DetectionPlan, state: CallState, recorder: Recorder
    ) -> list[tuple[nn.Module, ModelHook]]:
        """The hooks on `_blocks`."""
