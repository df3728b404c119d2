"""The rows of a denoiser call and whose they are: a table of the diffusers pipelines, read in the source of diffusers
0.42.

A denoiser call has the rows of all its guidance branches, one branch after the other. Those of a branch are the
images of the pipeline call: all of the first prompt, then all of the second. Where frames are rows too, those of an
image are adjacent. `tests/hooks/test_row_layouts.py` runs every class of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class CallSize(NamedTuple):
    """How many prompts and images a pipeline call has."""

    prompts: int
    """Prompts of the call; start images for a class that takes no prompts."""
    images: int
    """Prompts times images per prompt: rows of one guidance branch."""
    frames: int = 1
    """Rows of a block per row of the denoiser call: an AnimateDiff UNet makes every frame of its input a row."""


class _Entry(NamedTuple):
    """What the table says of a pipeline class."""

    layouts: tuple[tuple[str, ...], ...]
    """Its kinds of denoiser calls, each by its branches in the order of the rows."""
    counted: tuple[str, ...] = ("prompt", "prompt_embeds")
    """The arguments that tell the number of prompts; the first that is not None counts."""
    copies: str | None = "num_images_per_prompt"
    """The argument with the images per prompt; None: one, whatever the argument says."""
    frames: str | None = None
    """The argument with the frames of a video."""
    perturbs: bool = False
    """Whether a copy of "cond" with perturbed attention (PAG) follows, where the call asks for it."""
    skips: bool = False
    """Whether "perturbed" rows may come in a call of their own: SD3 runs "cond" again without some layers."""
    apart: bool = False
    """Whether every branch is a call of its own under `true_cfg_scale`; such calls look the same."""


_OFF = ("cond",)  # no guidance, or the scale is an input of the denoiser, or a callback ended the guidance
_GUIDED = (_OFF, ("uncond", "cond"))

_PLAIN = _Entry(_GUIDED)
_ALONE = _Entry((_OFF,))
_ALONE_OR_APART = _Entry((_OFF,), apart=True)
_PERTURBED = _Entry(_GUIDED, perturbs=True)
_SKIPPING = _Entry(_GUIDED, skips=True)
_START_IMAGES = _Entry(_GUIDED, counted=("image",))
# The middle rows have the start image and the negative prompt, the last ones that prompt and no image.
_EDITED = _Entry((_OFF, ("cond", "image", "uncond")))
# `num_videos_per_prompt` is an argument, but the first lines of __call__ set it to 1.
_ANIMATED = _Entry(_GUIDED, copies=None, frames="num_frames")
_ANIMATED_PERTURBED = _ANIMATED._replace(perturbs=True)

# A row is of the prompt whose text it has. Several start images or masks may be dealt out otherwise: where the prompts
# have several images each, diffusers repeats their batch as a whole, so that row k has image k modulo their number.
#
# Left out:
# - Sana*, AuraFlow, HunyuanDiT*, Lumina*: they repeat their text masks so, and a row has the text of one prompt and the
#   mask of another. Lumina has [cond, uncond], Lumina2 a call per branch.
# - StableDiffusionUpscale, StableDiffusion[XL]Adapter: so do they with the pictures that belong to the prompts.
# - StableDiffusionDiffEdit: its denoiser also inverts pictures and makes masks, outside of __call__.
# - AnimateDiffVideoToVideo*, AnimateDiff*ControlNet: made for one video, in many possible forms.
# - StableUnCLIP*, StableDiffusionLatentUpscale, Kolors*, CogView*, and what diffusers keeps under `deprecated`.
_TABLE: Mapping[str, _Entry] = {
    # Stable Diffusion 1 and 2
    "StableDiffusionPipeline": _PLAIN,
    "StableDiffusionImg2ImgPipeline": _PLAIN,
    "StableDiffusionInpaintPipeline": _PLAIN,
    "StableDiffusionDepth2ImgPipeline": _PLAIN,
    "StableDiffusionInstructPix2PixPipeline": _EDITED,
    "StableDiffusionImageVariationPipeline": _START_IMAGES,
    "LatentConsistencyModelPipeline": _ALONE,
    "LatentConsistencyModelImg2ImgPipeline": _ALONE,
    # In guess mode the ControlNet runs on the "cond" rows only, the UNet on all.
    "StableDiffusionControlNetPipeline": _PLAIN,
    "StableDiffusionControlNetImg2ImgPipeline": _PLAIN,
    "StableDiffusionControlNetInpaintPipeline": _PLAIN,
    # Adaptive scaling lowers the weight of the perturbed rows, to 0 at last; they stay in the call.
    "StableDiffusionPAGPipeline": _PERTURBED,
    "StableDiffusionPAGImg2ImgPipeline": _PERTURBED,
    "StableDiffusionPAGInpaintPipeline": _PERTURBED,
    "StableDiffusionControlNetPAGPipeline": _PERTURBED,
    "StableDiffusionControlNetPAGInpaintPipeline": _PERTURBED,
    # Videos
    "AnimateDiffPipeline": _ANIMATED,
    "AnimateDiffSDXLPipeline": _ANIMATED,
    "AnimateDiffPAGPipeline": _ANIMATED_PERTURBED,
    # Stable Diffusion XL, its refiner and Turbo
    "StableDiffusionXLPipeline": _PLAIN,
    "StableDiffusionXLImg2ImgPipeline": _PLAIN,
    "StableDiffusionXLInpaintPipeline": _PLAIN,
    "StableDiffusionXLInstructPix2PixPipeline": _EDITED,
    "StableDiffusionXLControlNetPipeline": _PLAIN,
    "StableDiffusionXLControlNetImg2ImgPipeline": _PLAIN,
    "StableDiffusionXLControlNetInpaintPipeline": _PLAIN,
    "StableDiffusionXLControlNetUnionPipeline": _PLAIN,
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": _PLAIN,
    "StableDiffusionXLControlNetUnionInpaintPipeline": _PLAIN,
    "StableDiffusionXLPAGPipeline": _PERTURBED,
    "StableDiffusionXLPAGImg2ImgPipeline": _PERTURBED,
    "StableDiffusionXLPAGInpaintPipeline": _PERTURBED,
    "StableDiffusionXLControlNetPAGPipeline": _PERTURBED,
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": _PERTURBED,
    # Stable Diffusion 3
    "StableDiffusion3Pipeline": _SKIPPING,
    "StableDiffusion3Img2ImgPipeline": _PLAIN,
    "StableDiffusion3InpaintPipeline": _PLAIN,
    "StableDiffusion3ControlNetPipeline": _PLAIN,
    "StableDiffusion3ControlNetInpaintingPipeline": _PLAIN,
    "StableDiffusion3PAGPipeline": _PERTURBED,
    "StableDiffusion3PAGImg2ImgPipeline": _PERTURBED,
    # Flux
    "FluxPipeline": _ALONE_OR_APART,
    "FluxImg2ImgPipeline": _ALONE_OR_APART,
    "FluxInpaintPipeline": _ALONE_OR_APART,
    "FluxKontextPipeline": _ALONE_OR_APART,
    "FluxKontextInpaintPipeline": _ALONE_OR_APART,
    "FluxControlNetPipeline": _ALONE_OR_APART,
    "FluxControlNetImg2ImgPipeline": _ALONE,
    "FluxControlNetInpaintPipeline": _ALONE,
    "FluxControlPipeline": _ALONE,
    "FluxControlImg2ImgPipeline": _ALONE,
    "FluxControlInpaintPipeline": _ALONE,
    "FluxFillPipeline": _ALONE,
    # PixArt
    "PixArtAlphaPipeline": _PLAIN,
    "PixArtSigmaPipeline": _PLAIN,
    "PixArtSigmaPAGPipeline": _PERTURBED,
}

KNOWN: tuple[str, ...] = tuple(sorted(_TABLE))
"""The class names of the table."""


def call_size(pipe: Any, arguments: Mapping[str, Any]) -> CallSize | None:
    """Prompts, images and frames of a pipeline call, by the arguments of its `__call__` with the defaults applied.

    None: the class is not in the table, or the arguments do not tell.
    """
    entry = _entry(pipe)
    if entry is None:
        return None
    given = next((arguments[n] for n in entry.counted if arguments.get(n) is not None), None)
    prompts = _count(given)
    copies = 1 if entry.copies is None else arguments.get(entry.copies)
    frames = 1 if entry.frames is None else arguments.get(entry.frames)
    for number in (prompts, copies, frames):
        if not isinstance(number, int) or number < 1:
            return None
    return CallSize(prompts, prompts * copies, frames)


def branches(
    pipe: Any, count: int, arguments: Mapping[str, Any], running: bool = True
) -> tuple[str, ...] | None:
    """Names of the `count` guidance branches of a denoiser call, in the order of its rows; asked while it runs.

    "cond" is the prompt's own; "uncond" has the negative prompt, or nothing; "image" the start image and the negative
    prompt (InstructPix2Pix); "perturbed" is "cond" again, in a denoiser with a part switched off, which guidance
    leads away from. `arguments` as for `call_size`; `running`: whether the pipeline is in this call, so that it tells
    whether it guides.

    None: the class is not in the table, it has no call of so many branches, or the call may be of several kinds.
    """
    entry = _entry(pipe)
    if entry is None or (entry.apart and _guides_apart(arguments)):
        return None
    layouts = entry.layouts
    if entry.perturbs:
        perturbs = _perturbs(pipe, arguments)
        if perturbs is None:
            return None
        if perturbs:
            layouts = tuple((*layout, "perturbed") for layout in layouts)
    if entry.skips and count == 1 and _skips(pipe, arguments):
        return ("perturbed",)
    if (
        running
        and count == 1
        and entry.layouts != (_OFF,)
        and getattr(pipe, "do_classifier_free_guidance", False)
    ):
        return None  # the branches come in calls of their own, or a callback took away half of the rows
    return next((layout for layout in layouts if len(layout) == count), None)


def _entry(pipe: Any) -> _Entry | None:
    """The entry of the first diffusers class of `pipe`; None where a class before it has a call of its own.

    A class with `_lbdt_announces` only wraps the call of the next one.
    """
    for cls in type(pipe).__mro__:
        if vars(cls).get("_lbdt_announces") is True:
            continue
        if cls.__module__.startswith("diffusers."):
            return _TABLE.get(cls.__name__)
        if "__call__" in vars(cls):
            return None
    return None


def _count(given: Any) -> int | None:
    """Prompts, embeddings or images in an argument, counted as the pipelines do."""
    if given is None or isinstance(given, tuple):
        return None
    if isinstance(given, list):
        return len(given)
    shape = getattr(given, "shape", None)
    # Else a string, the prompts by frame of AnimateDiff, or one PIL image.
    return 1 if shape is None else int(shape[0])


def _perturbs(pipe: Any, arguments: Mapping[str, Any]) -> bool | None:
    scale = arguments.get("pag_scale")
    layers = getattr(pipe, "pag_applied_layers", None)
    return None if scale is None or layers is None else scale > 0 and len(layers) > 0


def _skips(pipe: Any, arguments: Mapping[str, Any]) -> bool:
    # Without guidance there is no such call.
    return arguments.get("skip_guidance_layers") is not None and bool(pipe.do_classifier_free_guidance)


def _guides_apart(arguments: Mapping[str, Any]) -> bool:
    scale = arguments.get("true_cfg_scale")
    embeddings = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    negative = arguments.get("negative_prompt") is not None or all(
        arguments.get(name) is not None for name in embeddings
    )
    return scale is not None and scale > 1 and negative
