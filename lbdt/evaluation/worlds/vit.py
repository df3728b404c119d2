"""UnlearnCanvas' classifiers: timm's `vit_large_patch16_224.augreg_in21k` with a head of 51 or 20 outputs
(METHOD.md, 8.2), computed by transformers' ViT, so that neither timm nor torchvision is needed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbdt.evaluation.evaluated_world import Verdicts, one_seen
from lbdt.formats.pth import read_pth
from lbdt.runs.digests import sha256
from lbdt.runs.files import check_tensors, open_tensors, read_tensors, require_floats
from lbdt.runs.reading import listed

if TYPE_CHECKING:
    from PIL import Image

_HEAD = 64
"""timm's ViTs have heads of this width."""
_EPSILON = 1e-6
"""timm's layer norms, where transformers' default is 1e-12."""
_MAX_ENTRIES = 4096
"""ViT-L has 296 tensors, and its optimizer's may lie beside them."""
_BATCH = 32
_KEY = "model_state_dict"
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""timm's names and those of transformers' files, which every version of transformers reads. `attn.qkv` is split."""


class ViTClassifier:
    """A classifier of pictures: class logits, and the class token after the final norm, which they are linear in."""

    def __init__(self, model: Any, name: str) -> None:
        """`model`: a transformers `ViTForImageClassification`; `name`: for reports."""
        self.model, self.name = model.eval().requires_grad_(False), name
        self.side = model.config.image_size

    @property
    def classes(self) -> int:
        """Outputs of the head."""
        return self.model.classifier.out_features

    def to(self, device: torch.device) -> ViTClassifier:
        """Itself, on a device."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """float32 logits [n, classes] and class tokens [n, width], both on the CPU."""
        device = self.model.classifier.weight.device
        logits, tokens = [torch.zeros(0, self.classes)], [torch.zeros(0, self.model.config.hidden_size)]
        for first in range(0, len(pictures), _BATCH):
            x = preprocess(pictures[first : first + _BATCH], self.side).to(device)
            token = self.model.vit(pixel_values=x).last_hidden_state[:, 0]
            logits.append(self.model.classifier(token).cpu())
            tokens.append(token.cpu())
        return torch.cat(logits), torch.cat(tokens)


class ViTJudge:
    """The two classifiers as an evaluation's judge.

    Its features are the class token of the one that does not know what is erased (see
    `lbdt.evaluation.metrics.feature_distances.FeatureJudge`): the style classifier's, or the object classifier's where
    styles are erased."""

    single_label = True

    def __init__(
        self, objects: ViTClassifier, styles: ViTClassifier, swapped: Mapping[int, int] | None = None
    ) -> None:
        """`swapped`: the themes are what is erased: their class -> the world's index; in others nothing is seen."""
        self.objects, self.styles, self.swapped = objects, styles, swapped
        self.name = f"UnlearnCanvas ViT: objects {objects.name}, styles {styles.name}"
        self.name += "" if swapped is None else "; styles are what is erased"
        what, known = ("style", styles) if swapped is None else ("object", objects)
        self.features_name = (
            f"class token of the UnlearnCanvas {what} classifier ({known.name}), after the final norm"
        )

    def __call__(self, pictures: Sequence[Image.Image]) -> Verdicts:
        """The verdicts on RGB pictures of any size."""
        (things, of_objects), (themes, of_styles) = self.objects(pictures), self.styles(pictures)
        things, themes = things.argmax(-1), themes.argmax(-1)
        if self.swapped is None:
            return Verdicts(one_seen(things, self.objects.classes), themes, of_styles)
        table = torch.tensor([self.swapped.get(i, -1) for i in range(self.styles.classes)])
        return Verdicts(one_seen(table[themes], 1 + max(self.swapped.values())), things, of_objects)


def preprocess(pictures: Sequence[Image.Image], side: int = 224) -> Tensor:
    """float32 [n, 3, side, side] in [-1, 1]: RGB, resized by PIL's bilinear filter (torchvision's `Resize` of a PIL
    picture), (x / 255 - 0.5) / 0.5."""
    import numpy as np
    from PIL import Image

    if not len(pictures):
        return torch.zeros(0, 3, side, side)
    resized = [picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR) for picture in pictures]
    x = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized]))
    return (x.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def load_vit(path: str | os.PathLike[str], classes: int | None = None) -> ViTClassifier:
    """The classifier in a file of timm's tensors: `torch.save`'s, bare or under "model_state_dict", or safetensors.

    Depth, width, patch and image size are the tensors' own; heads are 64 wide. Computed in float32.

    Raises:
        ValueError: an unreadable or refused file, a tensor that is missing, unknown, misshapen or not finite, another
            number of classes.
    """
    path = Path(path)
    tensors = _read(path)
    sizes = _sizes(path, tensors)
    check_tensors(path, tensors, _shapes(**sizes))
    if classes is not None and sizes["classes"] != classes:
        raise ValueError(
            f"{path}: expected a classifier of {classes} classes, got {sizes['classes']}; UnlearnCanvas' style "
            f"classifier (style50.pth) has 51, that of objects (style50_cls.pth) 20"
        )
    # Verdicts are kept under the name, and many checkpoints are called style50.pth.
    head = tensors["head.weight"].float().contiguous().numpy().tobytes()
    return ViTClassifier(_build(tensors, **sizes), f"{path.name} ({sha256(head)[:8]})")


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path, _stored_shapes(path))
    state = read_pth(path, _MAX_ENTRIES)
    if isinstance(state, Mapping) and _KEY in state:
        state = state[_KEY]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path}: expected timm's tensors by name, or a dictionary with them under {_KEY!r}, got "
            f"{type(state).__name__} of {listed(state) if isinstance(state, Mapping) else 'no names'}"
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with open_tensors(path, "a classifier's tensors") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _sizes(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """What the tensors say of the model; ValueError where they say nothing that timm's ViT could be."""
    wanted = {"pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2, "head.weight": 2}
    for name, dimensions in wanted.items():
        if name not in tensors or tensors[name].dim() != dimensions:
            found = list(tensors[name].shape) if name in tensors else f"only {listed(sorted(tensors), 8)}"
            raise ValueError(
                f"{path}: expected a timm ViT with {name} of {dimensions} dimensions, got {found}; is it one of "
                f"UnlearnCanvas' classifiers?"
            )
    require_floats(path, tensors)
    classes, width = tensors["head.weight"].shape
    patches = tensors["pos_embed"].shape[1] - 1
    grid = math.isqrt(max(patches, 0))
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    if not classes or width < _HEAD or width % _HEAD or not grid or grid * grid != patches or not patch:
        raise ValueError(
            f"{path}: expected a width that is a multiple of {_HEAD}, and a square number of patches and the class "
            f"token, got width {width}, {patches + 1} positions, patches of {patch} pixels, {classes} classes"
        )
    return {
        "classes": classes,
        "width": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "hidden": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "patch": patch,
        "grid": grid,
    }


def _shapes(
    classes: int, width: int, depth: int, hidden: int, patch: int, grid: int
) -> dict[str, tuple[int, ...]]:
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, grid * grid + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    outputs = {"norm1": (), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": ()}
    outputs |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for block in range(depth):
        for name, shape in outputs.items():
            shapes[f"blocks.{block}.{name}.weight"] = shape or (width,)
            shapes[f"blocks.{block}.{name}.bias"] = (shape or (width,))[:1]
    for name, shape in {"norm": (width,), "head": (classes, width)}.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _build(
    tensors: Mapping[str, Tensor], classes: int, width: int, depth: int, hidden: int, patch: int, grid: int
) -> Any:
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // _HEAD,
        intermediate_size=hidden,
        hidden_act="gelu",
        layer_norm_eps=_EPSILON,
        image_size=patch * grid,
        patch_size=patch,
        num_labels=classes,
    )
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = ViTForImageClassification.from_pretrained(
            None, config=config, state_dict=_renamed(tensors, depth), output_loading_info=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:  # never by a bad file, which was refused before
        raise RuntimeError(f"transformers did not take timm's tensors as they are: {wrong}; report this")
    return model


def _renamed(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    state = {
        "vit.embeddings.cls_token": tensors["cls_token"],
        "vit.embeddings.position_embeddings": tensors["pos_embed"],
    }
    pairs = {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm"}
    pairs["head"] = "classifier"
    for block in range(depth):
        ours, theirs = f"blocks.{block}.", f"vit.encoder.layer.{block}."
        pairs |= {ours + name: theirs + other for name, other in _BLOCK.items()}
        for end in ("weight", "bias"):
            parts = tensors[f"{ours}attn.qkv.{end}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                state[f"{theirs}attention.attention.{name}.{end}"] = part
    for name, other in pairs.items():
        state |= {f"{other}.{end}": tensors[f"{name}.{end}"] for end in ("weight", "bias")}
    return {name: tensor.float().contiguous() for name, tensor in state.items()}
