"""`TextSteering`: Concept Steerers' rule, on the text encoder (Kim & Ghadiyaram; METHOD.md, 5.5)."""

from __future__ import annotations

import difflib
import itertools
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lbdt.editors.attachment import Attachment, choice, concept_sets
from lbdt.editors.edit_report import summarise
from lbdt.editors.steering import Strengthened
from lbdt.hooks import feature_maps, lookup
from lbdt.hooks.detection_plan import ROWS
from lbdt.hooks.recorder import Recorder
from lbdt.sae import SparseAutoencoder


class TextSteering(Strengthened):
    """Shifts a pipeline's text states along the latents of a concept's prompt, and leaves the UNet alone.

    With x_c [N, d] the layer's state of the concept prompt's N tokens: `delta = strength * ReLU(h(x_c)) W_dec`, all
    latents, no top-k, no decoder bias. The conditional state becomes `x + delta`, the unconditional one `x - delta`,
    token by token (METHOD.md, 5.5). Published: strength -0.5 for nudity, layer index 9 of SD 1.4's CLIP.

    The report has one step, of timestep 0: its rows are the encoded texts, its patches their tokens, and those
    "detected" the tokens at which a latent of the concept prompt is active.
    """

    SETTINGS = ("hookpoint", "strength")
    SHOWN = ("strength",)
    _EXAMPLE = "text_encoder.text_model.encoder.layers.9"
    _STRENGTH = -0.5

    def __init__(
        self, sae: SparseAutoencoder, hookpoint: str, *, strength: float | Mapping[str, float] = -0.5
    ) -> None:
        """
        Args:
            sae: of the layer's output, with its decoder. Where it names its site, that must be this layer.
            hookpoint: a layer of a text encoder, e.g. "text_encoder.text_model.encoder.layers.9". transformers 5 has
                no "text_model" in CLIPTextModel: names with it and without it are both found.
            strength: one for all concept prompts, or one per prompt that will be attached. Negative to erase.

        Raises:
            ValueError, TypeError: the argument, what was expected, what was given.
        """
        super().__init__(strength, sae, hookpoint)

    def attach(
        self, pipe: Any, concepts: Sequence[str] | Sequence[Sequence[str]], rows: str = "all"
    ) -> Attachment:
        """Encodes the concept prompts, and steers what the pipeline encodes until the handle is removed.

        Args:
            pipe: a diffusers pipeline with a text encoder and `encode_prompt`. Its weights are not touched.
            concepts: prompts that describe what to steer by, such as ["nudity"], for all images (their deltas add
                up), or one list of them (which may be empty) per prompt of the call.
            rows: "all": the unconditional state too, by -delta, as published | "cond": the conditional one only.

        Only texts that the pipeline's `encode_prompt` encodes are steered: embeddings given to the pipeline stay as
        they are, and so does what a user calls the text encoder with.

        Raises:
            ValueError, TypeError: before anything is changed: no such layer, an SAE of another width, a pipeline
                without text encoder, a concept without a strength, an attachment that is still on. At the pipeline's
                call, before anything is generated: a list that has not one entry per prompt.
        """
        self._check()
        sets, per_prompt = concept_sets(concepts)
        choice("rows", rows, ROWS)
        encoder, layer = _find_layer(pipe, self.hookpoint)
        if not callable(getattr(pipe, "encode_prompt", None)):
            raise ValueError(
                f"pipe: {type(pipe).__name__} has no encode_prompt, by which its texts are told apart"
            )
        names = list(dict.fromkeys(itertools.chain.from_iterable(sets)))
        for name in names:
            self._strength_of(name)
        self._refuse_twice(layer)
        with torch.inference_mode(False), torch.no_grad():
            # With an empty text, so that sets without any concept have the shape of a state too.
            states = _states_of(pipe, self.hookpoint, encoder, layer, ["", *names])
            shifts = dict(zip(names, self._shifts(states[1:], names), strict=True))
            nothing = torch.zeros_like(states[0], dtype=torch.float32)
            deltas = torch.stack([sum((shifts[name] for name in chosen), nothing) for chosen in sets])
            recorder = Recorder(deltas.device)
        from lbdt.hooks import blocks

        state = _Encoding(deltas, per_prompt, rows, recorder)
        hooks = [(layer, blocks.TextHook(state.edit))]
        summary = partial(summarise, ran=self._ran())
        return self._put_on(pipe, hooks, recorder, summary, texts=(state.begin, state.end))

    def _in_words(self) -> str:
        return f"text encoder, strength {self.strength}"

    def _check(self) -> None:
        super()._check()
        if self.sae.config.update:
            raise ValueError("sae: expected one of the layer's output, got one of a block's update")

    def _shifts(self, states: Tensor, names: list[str]) -> list[Tensor]:
        """The delta of each concept prompt, [N, d] float32, from the layer's states [C, N, d]."""
        if states.shape[2] != self.sae.config.d_in:
            raise ValueError(
                f"hookpoint: {self.hookpoint!r} has width {states.shape[2]}, but the SAE was trained on "
                f"{self.sae.config.d_in}; use the SAE of this layer"
            )
        device, decoder = self.sae.W_dec.device, self.sae.W_dec.float()
        shifts = []
        for name, state in zip(names, states, strict=True):
            z = self.sae.pre_activations(state.to(device)).relu() * self._strength_of(name)
            shifts.append(torch.matmul(z, decoder).to(states.device))
        return shifts


class _Encoding(threading.local):
    """Where the pipeline's `encode_prompt` is at in a thread, and the edit that this calls for."""

    def __init__(self, deltas: Tensor, per_prompt: bool, rows: str, recorder: Recorder) -> None:
        self.deltas = deltas  # [S, N, d]
        self.per_prompt, self.rows, self.recorder = per_prompt, rows, recorder
        self.prompts: int | None = None
        self.roles: list[str] | None = None

    def begin(self, prompts: int | None, roles: list[str]) -> None:
        if self.per_prompt and roles and prompts != len(self.deltas):
            raise ValueError(
                f"concepts: got a list of {len(self.deltas)} entries for {prompts} prompts; attach with one entry per "
                "prompt, or with one for all"
            )
        self.prompts, self.roles = prompts, list(roles)

    def end(self) -> None:
        self.prompts = self.roles = None

    def edit(self, x: Tensor) -> Tensor:
        if self.roles is None:
            return x
        if not self.roles or x.shape[0] != self.prompts:
            raise RuntimeError(
                f"hookpoint: the text encoder ran on {x.shape[0]} texts, which are not the pipeline's {self.prompts} "
                "prompts or negative prompts; this pipeline's encode_prompt is not supported"
            )
        role = self.roles.pop(0)
        if role == "uncond" and self.rows == "cond":
            return x
        if x.shape[1:] != self.deltas.shape[1:]:
            raise ValueError(
                f"hookpoint: its layer returned {x.shape[1]} tokens of width {x.shape[2]}, but the concept prompts "
                f"were encoded as {self.deltas.shape[1]} of width {self.deltas.shape[2]}"
            )
        if self.deltas.device != x.device:
            self.deltas = self.deltas.to(x.device)
            self.recorder.to(x.device)
        delta = (self.deltas if role == "cond" else -self.deltas).to(x.dtype)
        moved = delta != 0
        out = (x + delta).where(moved, x)  # tokens without an active latent keep their bits
        changed = moved.any(2).expand(x.shape[0], -1)
        timesteps = torch.zeros(x.shape[0], device=x.device)
        self.recorder.add(timesteps, changed, changed, x.sum(2, dtype=torch.float32), 1, x.shape[1], 1)
        return out


def _find_layer(pipe: Any, hookpoint: str) -> tuple[nn.Module, nn.Module]:
    """The text encoder and its layer; TypeError, ValueError naming what there is."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    encoders = [
        name for name in components if name.startswith("text_encoder") and components[name] is not None
    ]
    root, _, path = hookpoint.partition(".")
    if root not in encoders:
        raise ValueError(
            f"hookpoint: {hookpoint!r} begins with none of the pipeline's text encoders "
            f"({', '.join(encoders) or 'it has none'}); expected a name such as {TextSteering._EXAMPLE!r}"
        )
    encoder = lookup.unwrap(getattr(pipe, root))
    for name in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            layer = encoder.get_submodule(name)
        except AttributeError:
            continue
        if name and type(layer).forward is not nn.Module.forward and not isinstance(layer, nn.ModuleList):
            return encoder, layer
    lists = [name for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    known = [f"{root}.{name}.{i}" for name in lists for i in range(len(encoder.get_submodule(name)))]
    near = difflib.get_close_matches(hookpoint, known, n=3, cutoff=0.5)
    raise ValueError(
        f"hookpoint: the text encoder has no layer {hookpoint!r}; "
        + (f"did you mean {', '.join(near)}? " if near else "")
        + f"Layers: {', '.join(known) or 'none'}"
    )


def _states_of(pipe: Any, hookpoint: str, encoder: nn.Module, layer: nn.Module, texts: list[str]) -> Tensor:
    """The layer's output [C, N, d] for C texts, tokenised as the pipeline tokenises its prompts."""
    tokenizer = getattr(pipe, hookpoint.split(".")[0].replace("text_encoder", "tokenizer"))
    tokens = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    device = getattr(pipe, "_execution_device", None) or next(encoder.parameters()).device
    masked = getattr(encoder.config, "use_attention_mask", False)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(
        lambda module, args, output: seen.append(feature_maps.tensor_of(output))
    )
    try:
        encoder(
            tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device) if masked else None,
        )
    finally:
        handle.remove()
    if seen[0].dim() != 3:
        raise ValueError(
            f"hookpoint: {hookpoint!r} returned {tuple(seen[0].shape)}; expected [texts, tokens, d]"
        )
    return seen[0]
