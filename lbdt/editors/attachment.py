"""What the eraser and the steering baselines share: checked arguments, a plan's columns, and the handle on a pipeline."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lbdt.dictionary import ConceptDictionary
from lbdt.dictionary.selection import check_criteria
from lbdt.editors.report import Blind, Report, StepMask, step_masks, summarise, warn_not_finite
from lbdt.hooks import lookup
from lbdt.hooks.detection_plan import CallState, DetectionPlan, check_lengths
from lbdt.hooks.recorder import Call, Recorder
from lbdt.reading import brief, listed
from lbdt.sae import SparseAutoencoder

if TYPE_CHECKING:
    from lbdt.dictionary import Selection


class LatentColumns(NamedTuple):
    """The U latents that an attachment looks at. Every concept keeps columns of its own: two may share a latent at
    different thresholds."""

    owners: list[str]
    """The concept of each."""
    latents: Tensor
    """[U] int64, the SAE's own ids."""
    thresholds: Tensor
    """[T, U] float32, on activations; +inf where not selected in a bin."""
    enabled: Tensor
    """[S, U] bool, one row a concept set."""


class Attachment:
    """Something attached to a pipeline. A context manager; `remove()` takes it off, and may be called again."""

    def __init__(
        self,
        name: str,
        pipe: Any,
        hooks: Sequence[tuple[torch.nn.Module, Any]],
        watches: Sequence[Callable[[Any], Callable[[], None]]],
        recorder: Recorder,
        summary: Callable[[list[Call]], Report] = summarise,
    ) -> None:
        """`hooks`: modules and their ModelHooks, registered as `name`. `watches`: each is given the pipeline and
        returns its undo. Whatever was put on before an error comes off again."""
        from lbdt.hooks import pipeline_calls, registry

        self._recorder, self._summary = recorder, summary
        self._told = 0
        self._undo: list[Callable[[], None]] = []
        try:
            for module, hook in hooks:
                registry.register(module, hook, name)
                self._undo.append(lambda module=module: registry.unregister(module, name))
            for put in watches:
                self._undo.append(put(pipe))
            self._undo.append(pipeline_calls.watch_end(pipe, self._warn))
        except BaseException:
            self.remove()
            raise

    @classmethod
    def on_unet(
        cls,
        name: str,
        pipe: Any,
        hookpoint: str,
        hooks: Sequence[tuple[torch.nn.Module, Any]],
        plan: DetectionPlan,
        state: CallState,
        recorder: Recorder,
        summary: Callable[[list[Call]], Report] = summarise,
    ) -> Attachment:
        """With the hooks that a plan needs besides its own `hooks`: of the timestep, of the grid, of the call."""
        from lbdt.hooks import blocks, pipeline_calls

        unet = lookup.find_unet(pipe)
        embeds_classes = getattr(unet.config, "class_embed_type", None) == "timestep"
        around = lookup.grid_parent(unet, hookpoint)
        grid = [] if around is None else [(around, blocks.GridHook(plan, state))]

        def begin(prompts: int, images: int, in_call: bool) -> None:
            if in_call:
                check_lengths(plan, images, prompts)
            state.prompts, state.images = prompts, images

        timestep = (unet.time_proj, blocks.TimestepHook(plan, state, embeds_classes))
        watches = [lambda pipe: pipeline_calls.watch(pipe, begin)]
        return cls(name, pipe, [timestep, *hooks, *grid], watches, recorder, summary)

    def remove(self) -> None:
        """Takes every hook off; the pipeline computes bit for bit what it did before."""
        while self._undo:
            self._undo.pop()()

    def report(self) -> Report:
        """What happened under this attachment. Waits for the device."""
        return self._summary(self._recorder.read())

    def _warn(self) -> None:
        """Of patches that were not looked at in the pipeline's call that ends, and in those before."""
        patches = self._recorder.not_finite()
        if patches != self._told:
            self._told = patches
            warn_not_finite(patches)

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


def check_parts(sae: Any, dictionary: Any) -> None:
    """TypeError, ValueError unless both are what they should be, and of one size."""
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


def check_hookpoint(name: str, value: Any, example: str = "unet.mid_block.attentions.0") -> None:
    """TypeError unless it is a name."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a name such as {example!r}, got {brief(value)}")


def check_selection(selection: dict[str, Any]) -> None:
    """ValueError where a key is no keyword of `ConceptDictionary.select`, or its value none."""
    known = [name for name in inspect.signature(ConceptDictionary.select).parameters][2:]
    unknown = sorted(set(selection) - set(known))
    if unknown:
        raise ValueError(f"selection: unknown key {listed(unknown)}; expected some of {', '.join(known)}")
    check_criteria(**selection)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """`value`; ValueError unless it is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {brief(value)}")
    return value


def concept_sets(concepts: Any) -> tuple[list[list[str]], bool]:
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


def seed_values(seed: Any) -> tuple[list[int], bool]:
    """The seeds, and whether there is one per prompt or image."""
    values = [seed] if isinstance(seed, int) else seed
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise TypeError(f"seed: expected an integer, or one per prompt or image, got {seed!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"seed: expected integers, got {value!r}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"seed: expected a 64-bit integer, got {value}")
    return list(values), values is seed


def window(steps: Any) -> tuple[int, int] | None:
    """(first, last) of the schedule, or None for all."""
    if steps is None:
        return None
    pair = tuple(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else ()
    if len(pair) != 2 or any(isinstance(i, bool) or not isinstance(i, int) for i in pair):
        raise TypeError(f"steps: expected (first, last), two integers, got {steps!r}")
    if not 0 <= pair[0] < pair[1]:
        raise ValueError(f"steps: expected 0 <= first < last, got {pair}")
    return pair


def find_block(unet: torch.nn.Module, hookpoint: str, width: int, argument: str) -> torch.nn.Module:
    """The block at `hookpoint`; ValueError where there is none, or one of another width than the SAE's."""
    block = lookup.find_block(unet, hookpoint, argument)
    found = lookup.channels(block)
    if found is not None and found != width:
        raise ValueError(
            f"{argument}: {hookpoint!r} has {found} channels, but the SAE was trained on {width}; "
            "use the SAE of this block"
        )
    return block


def refuse_twice(module: torch.nn.Module, name: str, what: str) -> None:
    """ValueError where the hook `name` of `what` (such as "eraser") is on the module."""
    # Imported here, so that looking at an eraser's concepts does not load diffusers.
    from lbdt.hooks import registry

    if registry.is_registered(module, name):
        raise ValueError(
            f"this {what} is attached to this pipeline already; remove() that handle (or leave its with block) first"
        )


def columns(sets: list[list[str]], select: Callable[[str], Selection], bins: int) -> LatentColumns:
    """The columns of the concepts named in `sets`; ValueError for an unknown one."""
    names = list(dict.fromkeys(name for names in sets for name in names))
    selections = [select(name) for name in names]
    owners = [name for name, s in zip(names, selections, strict=True) for _ in range(len(s.latents))]
    enabled = torch.tensor([[name in chosen for name in owners] for chosen in sets], dtype=torch.bool)
    return LatentColumns(
        owners,
        torch.cat([torch.zeros(0, dtype=torch.int64), *(s.latents for s in selections)]),
        torch.cat([torch.zeros(bins, 0), *(s.thresholds for s in selections)], dim=1),
        enabled.view(len(sets), len(owners)),
    )


def plan_tensors(
    sae: SparseAutoencoder, dictionary: ConceptDictionary, chosen: LatentColumns, seeds: list[int]
) -> tuple[Tensor, ...]:
    """The tensors of a `DetectionPlan`, in its order; the encoder's rows in the dictionary's `firing_order`."""
    # Frequent latents first, so that a count of those above a value ends early. Ids elsewhere stay the SAE's own.
    order = dictionary.firing_order().to(sae.encoder.weight.device)
    return (
        sae.encoder.weight.detach().index_select(0, order),
        sae.folded_bias()[order],
        order.argsort().cpu()[chosen.latents],
        sae.to_pre_activation(chosen.thresholds, chosen.latents),
        dictionary.timesteps.float(),
        chosen.enabled,
        torch.tensor(seeds, dtype=torch.int64),
    )


def check_latents(plan: DetectionPlan, owners: Sequence[str]) -> Blind:
    """Where the concepts of the plan's columns have no latent that could pass its threshold.

    Warns of those timesteps; ValueError for a concept that has none at any.
    """
    deaf = torch.isposinf(plan.thresholds.cpu())
    blind = {}
    for name in dict.fromkeys(owners):
        own = torch.tensor([owner == name for owner in owners])
        blind[name] = deaf[:, own].all(1)
        if bool(blind[name].all()):
            raise ValueError(
                f"concepts: no latent of {name!r} can be detected at any timestep (all thresholds are infinite), so it "
                "would never be looked for; lower the percentile, raise false_positive, or score again"
            )
    found = Blind(plan.timesteps.cpu(), blind)
    if found.concepts:
        warnings.warn(
            f"lbdt: no latent can be detected, and so the concept is not looked for: {found} (timesteps); lower the "
            "percentile, raise false_positive, or score at more timesteps",
            RuntimeWarning,
            stacklevel=3,
        )
    return found
