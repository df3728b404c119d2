"""`UnetEditor`: an editor of a denoiser's block, by a concept dictionary, and its files."""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lbdt.activations.capture import is_compiled
from lbdt.activations.pipelines import digest_of_module
from lbdt.dictionary import ConceptDictionary
from lbdt.editors.attachment import (
    Attachment,
    LatentColumns,
    around_call,
    choice,
    concept_sets,
    row_layout,
    seed_values,
    warn_of_blind,
    window,
)
from lbdt.editors.call_watch import ON_FAILURE, CallWatch, refuse_others, runs
from lbdt.editors.criteria import check_selection, criteria_of, own_copy
from lbdt.editors.edit_report import Blind, summarise
from lbdt.editors.editor import Editor
from lbdt.editors.editor_files import EditorFiles
from lbdt.editors.exchange import CompiledStand, Exchange, Stands, room_of
from lbdt.editors.site_check import check_site
from lbdt.hooks import lookup, pipeline_calls
from lbdt.hooks.call_state import CallState
from lbdt.hooks.detection_plan import ROWS, DetectionOptions, DetectionPlan
from lbdt.hooks.pre_encoder import PreEncoder
from lbdt.hooks.recorder import Recorder
from lbdt.runs.digests import marked, sha256
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from diffusers.hooks import ModelHook

    from lbdt.dictionary import Selection

# With None for what an editor lacks: finished pictures are kept under digests of these, in this order. Padding, source
# and strength are told apart by themselves.
_DIGESTED = ("hookpoint", "detect_at", "target", "rule", "error", "where")
_ATTACHING = threading.RLock()
"""Held while an editor is attached: two threads would take the same stand."""
_COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class UnetEditor(EditorFiles, Editor):
    """An editor of a UNet block, by a concept dictionary."""

    _KEEPS_ROOM: ClassVar[bool] = False
    """Whether columns that nothing passes leave every bit of the rest: a steering's sums would round otherwise."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        dictionary: ConceptDictionary,
        hookpoint: str,
        selection: Mapping[str, Any] | None,
    ) -> None:
        self.dictionary, self.selection = dictionary, own_copy(selection)
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
        return self.dictionary.select(concept, **criteria_of(self.selection, concept))

    def attach(
        self,
        pipe: Any,
        concepts: Sequence[str] | Sequence[Sequence[str]],
        seed: int | Sequence[int] = 0,
        rows: str | None = None,
        steps: tuple[int, int] | None = None,
        keep_masks: bool = False,
        selections: Mapping[str, Selection] | None = None,
        layout: Sequence[str] | None = None,
        on_failure: str = "refuse",
        room: int | None = None,
        stack: bool = False,
    ) -> Attachment:
        """Puts the editor on a pipeline until the returned handle is removed, or its `with` block is left.

        Args:
            pipe: a diffusers pipeline with a UNet, or a transformer of SD3, Flux or PixArt. Its weights and its
                state_dict are not touched.
            concepts: names for all images, or one list of names (which may be empty) per prompt or per image.
            seed: of the eraser's donor draws; a steering draws nothing. An int s stands for s + i for image i; in a
                list of one per prompt, for s + j for image j of the prompt. An image's draws do not depend on the
                batch around it.
            rows: guidance branches that are treated: "all" | "cond", those of the prompt; None: as published, "cond"
                under the steering rule "gsae", else "all". Without guidance, the only branch.
            steps: (first, last): treat steps first <= i < last of the scheduler's timesteps; None: all.
            keep_masks: keep each call's masks for `Attachment.masks` (4 MiB on the device).
            selections: what `select` gave before, by name; of other names it is asked here.
            layout: the guidance branches of a UNet call in the order of its rows, e.g. ("uncond", "cond"), for
                pipelines that lbdt does not know and for loops of one's own; None: as the calling pipeline is known.
            on_failure: where it turns out in a call that images were not protected (activations NaN or infinite, no
                memory, timesteps far from the dictionary's, a block that did not run): "refuse": the call raises
                `UnprotectedError` in place of its images | "generate": a warning and the report say so.
            room: latent columns to keep for other concepts, for `Attachment.set`; None: for an eraser on a compiled
                UNet up to the next power of two, 16 at least, else what `concepts` need.
            stack: let this editor stand beside another one on the same block of this pipeline: what one has changed is
                looked at by the next.

        Rows without a concept, of another branch or outside of the window keep their bits.

        Raises:
            ValueError, TypeError: before anything is changed: unknown concept or hookpoint, an SAE of another width
                than the block or with weights that are not finite, a concept without any latent or without a strength,
                a pipeline without such a denoiser, bad settings, an attachment that is still on, another editor on the
                block (without `stack`).
                At the pipeline's call, before anything is generated: a list of neither one entry per prompt nor per
                image; lists or rows="cond" where it is not known which rows are whose; a scheduler of other
                timesteps.
            UnprotectedError: at the pipeline's call, see `on_failure`; whatever that is, where the UNet was exchanged
                or its block's forward overwritten since.
            RuntimeError: at the pipeline's call, by `set`, and in a denoiser that is called by itself and not compiled:
                the SAE's encoder was written to since, and is used where it lies. On a CPU with an int8 screen it is,
                so that an attachment takes no copy of it.
        """
        self._check()
        denoiser = lookup.find_denoiser(pipe)
        blocks = self._blocks(denoiser)
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
        state = CallState(pipe, row_layout(layout))
        choice("on_failure", on_failure, ON_FAILURE)
        compiled = is_compiled(getattr(pipe, denoiser.root))
        with pipeline_calls.between_calls(pipe), _ATTACHING:
            self._refuse_twice(blocks[0])
            if not stack:
                refuse_others(pipe, blocks[0])
            # Tensors made in inference mode could not be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                columns = self._columns(sets, selections)
                room = room_of(room, len(columns.latents), compiled and self._KEEPS_ROOM)
                stands = Stands.on(denoiser.module) if compiled and selections is None else Stands()
                made_of = (self.sae.encoder.weight, self.sae.W_dec, self.sae.b_dec, self.dictionary)
                if self.sae.pre_encoder is not None:
                    made_of += tuple(self.sae.pre_encoder.parameters())
                key = (
                    *(self._name, str(self.settings), options, room, len(sets), len(seeds), state.layout),
                    *(keep_masks, on_failure, *map(_version, made_of)),
                )
                stand = None if runs(pipe) else stands.found(key)
                if stand is not None:
                    other, owners = self._exchanged(stand.plan, sets, seeds, selections)
                    blind = warn_of_blind(other, owners)
                    stand.reuse(pipe)
                    stand.plan.take(other)
                    stand.state.remember(stand.plan.gate, stand.plan.weight.device)
                else:
                    stand, blind = self._stand(
                        denoiser, blocks, columns, room, options, seeds, state, keep_masks
                    )
                    stand.made_of = made_of
                    if compiled:
                        stands.keep(key, stand)
            place = self._name, denoiser.root, denoiser.module, stand.hooks
            calls = CallWatch(*place, stand.plan, stand.state, stand.recorder, compiled, on_failure)
            handle = self._put_on(
                pipe,
                stand.hooks,
                stand.recorder,
                partial(summarise, blind=blind, ran=self._ran(), failures=calls.failures),
                calls=calls,
                changed=Exchange(self, stand.plan, stand.state, blind, sets, seeds, selections),
                stand=stand if compiled else None,
            )
            stand.handle = weakref.ref(handle)
            return handle

    def _columns(self, sets: list[list[str]], selections: Mapping[str, Selection] | None) -> LatentColumns:
        """The columns of the sets' concepts, by `selections` where they are among them."""
        known = selections or {}
        names = dict.fromkeys(itertools.chain.from_iterable(sets))
        chosen = {name: known[name] if name in known else self.select(name) for name in names}
        return LatentColumns.of(sets, chosen, len(self.dictionary.timesteps))

    def _stand(
        self,
        denoiser: lookup.Denoiser,
        blocks: list[nn.Module],
        columns: LatentColumns,
        room: int,
        options: DetectionOptions,
        seeds: list[int],
        state: CallState,
        keep_masks: bool,
    ) -> tuple[CompiledStand, Blind]:
        parameter = next(denoiser.module.parameters())
        device = parameter.device if parameter.device.type != "meta" else torch.device("cpu")
        padded = columns.padded(room)
        plan = self._plan(padded, options, *self._tensors(padded, seeds))
        blind = warn_of_blind(plan, columns.owners)
        # A guess: both follow the activations, which storage in half precision or on other devices does not tell.
        plan.to(device, parameter.dtype if parameter.dtype in _COMPUTED else torch.float32)
        state.remember(plan.gate, device)
        recorder = Recorder(device, masks=keep_masks, gated=plan.gate is not None)
        hooks = [
            *around_call(denoiser, self.hookpoint, plan, state),
            *self._hooks(blocks, plan, state, recorder),
        ]
        return CompiledStand(plan, state, recorder, hooks, ()), blind

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
        check_selection(self.selection, dictionary)

    @property
    def _published_rows(self) -> str:
        return "all"

    def _exchanged(
        self,
        plan: DetectionPlan,
        sets: list[list[str]],
        seeds: list[int],
        selections: Mapping[str, Selection] | None,
    ) -> tuple[DetectionPlan, list[str]]:
        """A plan like `plan` of other concepts and seeds, and the concepts that own its columns."""
        columns = self._columns(sets, selections)
        padded = columns.padded(len(plan.latents) if self._KEEPS_ROOM else 0)
        tensors = (
            *self._detected(padded, self.dictionary.firing_order()),
            self.dictionary.timesteps.float(),
            padded.enabled,
            torch.tensor(seeds, dtype=torch.int64),
        )
        encoder = plan.weight, None, plan.bias
        return self._plan(padded, plan.options, *encoder, *tensors, like=plan), columns.owners

    def _blocks(self, denoiser: lookup.Denoiser) -> list[nn.Module]:
        """The modules that are hooked; the first one's output is changed."""
        return [self._block(denoiser, self.hookpoint, "hookpoint")]

    def _block(self, denoiser: lookup.Denoiser, hookpoint: str, argument: str) -> nn.Module:
        block, width = (
            lookup.find_block(denoiser.module, hookpoint, argument, denoiser.root),
            self.sae.config.d_in,
        )
        found = lookup.channels(block)
        if found is not None and found != width:
            raise ValueError(
                f"{argument}: {hookpoint!r} has {found} channels, but the SAE was trained on {width}; "
                "use the SAE of this block"
            )
        return block

    def _tensors(self, columns: LatentColumns, seeds: list[int]) -> tuple[Tensor, ...]:
        """The tensors of a `DetectionPlan`; all but the encoder's rows in the dictionary's `firing_order`. ValueError
        for an SAE that is not finite: where a latent is NaN it is never detected."""
        given = {"encoder.weight": self.sae.encoder.weight, "folded bias": self.sae.folded_bias()}
        for name, tensor in given.items():
            # By its ends, which are NaN where anything is: no copy.
            if not all(map(math.isfinite, tensor.detach().aminmax())):
                raise ValueError(
                    f"sae: expected finite weights, got NaN or infinity in its {name}, with which nothing would be "
                    "detected; load or train it again"
                )
        # Frequent latents first, so that a count of those above a value ends early. Ids elsewhere stay the SAE's own.
        order = self.dictionary.firing_order().to(self.sae.encoder.weight.device)
        return (
            self.sae.encoder.weight.detach(),
            order,
            given["folded bias"][order],
            *self._detected(columns, order),
            self.dictionary.timesteps.float(),
            columns.enabled,
            torch.tensor(seeds, dtype=torch.int64),
        )

    def _pre_encoder(self, like: DetectionPlan | None) -> PreEncoder | None:
        """What the SAE has before its encoder, shared with the plan `like`; None: nothing."""
        if like is not None:
            return like.pre
        folded = self.sae.folded_pre_encoder()
        return None if folded is None else PreEncoder(*(tensor.detach() for tensor in folded))

    def _detected(self, columns: LatentColumns, order: Tensor) -> tuple[Tensor, Tensor]:
        """The columns' latents as places in `order`, and their thresholds on pre-activations."""
        return (
            order.argsort().cpu()[columns.latents],
            self.sae.to_pre_activation(columns.thresholds, columns.latents),
        )

    @abstractmethod
    def _plan(
        self,
        columns: LatentColumns,
        options: DetectionOptions,
        *tensors: Tensor | None,
        like: DetectionPlan | None = None,
    ) -> DetectionPlan:
        """The plan of what is computed in a UNet call; `tensors` are those of `_tensors`. `like`: a plan of this
        editor, from which what does not depend on the columns is taken."""

    @abstractmethod
    def _hooks(
        self, blocks: list[nn.Module], plan: DetectionPlan, state: CallState, recorder: Recorder
    ) -> list[tuple[nn.Module, ModelHook]]:
        """The hooks on `_blocks`."""


def _version(part: Any) -> tuple[int, int]:
    """Tells a part of an editor from another one, and a tensor from what it was before it was written to."""
    written = isinstance(part, Tensor) and not part.is_inference()
    return id(part), part._version if written else 0
