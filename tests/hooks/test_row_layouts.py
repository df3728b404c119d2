"""The table of row layouts says what the denoisers of the real pipelines get, class by class."""

import inspect
from typing import NamedTuple

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

from lbdt.hooks import row_layouts
from lbdt.hooks.row_layouts import CallSize
from tests import tiny_pipelines as tiny

PROMPTS = ("cat", "dog")
NEGATIVE = ("tree", "bush")
CLOSE = 1e-5


class Call(NamedTuple):
    """What the denoiser was called with, and what the table said of that call while it ran."""

    sample: Tensor
    given: dict
    branches: tuple[str, ...] | None

    @property
    def texts(self) -> Tensor:
        return self.given["encoder_hidden_states"]


def bound(pipe, call: dict) -> dict:
    found = inspect.signature(type(pipe).__call__).bind(pipe, **call)
    found.apply_defaults()
    return found.arguments


def parameters(pipe) -> set[str]:
    return set(inspect.signature(type(pipe).__call__).parameters)


def denoise(pipe, prompts=PROMPTS, guidance: float = 4.0, **call) -> tuple[CallSize, list[Call]]:
    """The table's size of a pipeline call with two images per prompt, and its denoiser calls."""
    known = parameters(pipe)
    copies = "num_videos_per_prompt" if "num_frames" in known else "num_images_per_prompt"
    call = {copies: 2, "guidance_scale": guidance, **call}
    if "Union" in type(pipe).__name__:
        call["control_mode"] = 0
    if prompts is not None and "negative_prompt" in known:
        call.setdefault("negative_prompt", list(NEGATIVE[: len(prompts)]))
    call = tiny.arguments(pipe, prompts, **{name: value for name, value in call.items() if name in known})
    arguments = bound(pipe, call)
    size, calls = row_layouts.call_size(pipe, arguments), []

    def note(module, args, kwargs):
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        sample = next(iter(given.values()))
        count, rest = divmod(len(sample), size.images)
        assert rest == 0
        calls.append(Call(sample, given, row_layouts.branches(pipe, count, arguments)))

    with tiny.denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True):
        pipe(**call)
    assert calls
    return size, calls


def alone(pipe, text: str, **call) -> Call:
    """The denoiser call of one image of one prompt, without guidance: its one row needs no table."""
    one = {"num_images_per_prompt": 1, "pag_scale": 0.0, "num_inference_steps": 2, "output_type": "latent"}
    _, calls = denoise(pipe, (text,), 0.0, **{**call, **one})
    assert len(calls[0].sample) == 1
    return calls[0]


def references(pipe, **call) -> dict[str, Tensor]:
    """The embedding of each prompt, as the pipeline makes it of that prompt alone."""
    found = {text: alone(pipe, text, **call).texts[0] for text in PROMPTS + NEGATIVE}
    if "prompt" not in parameters(pipe):
        found |= dict.fromkeys(NEGATIVE, torch.zeros_like(found["cat"]))
    return found


def read(texts: Tensor, known: dict[str, Tensor]) -> list[set[str]]:
    """Which prompts each row may be of."""
    return [{name for name, text in known.items() if (row - text).abs().max() < CLOSE} for row in texts]


def expected(size: CallSize, names: tuple[str, ...], known: dict[str, Tensor]) -> list[set[str]]:
    """The prompts of the rows, if the table is right."""
    per = size.images // size.prompts
    rows = []
    for name in names:
        for image in range(size.images):
            text = (PROMPTS if name in ("cond", "perturbed") else NEGATIVE)[image // per]
            rows += size.frames * read(known[text][None], known)
    return rows


def agree(pipe, guided: bool, names: tuple[str, ...], **call) -> list[Call]:
    """Asserts that the table says `names` of every denoiser call, and that the rows have those prompts."""
    known = references(pipe, **call)
    assert read(torch.stack([known[text] for text in PROMPTS]), known) == [{"cat"}, {"dog"}]
    assert not {"cat", "dog"} & set().union(*read(torch.stack([known[text] for text in NEGATIVE]), known))
    size, calls = denoise(pipe, guidance=4.0 if guided else 0.0, **call)
    assert size.prompts == len(PROMPTS)
    for one in calls:
        assert one.branches == names
        assert len(one.sample) == len(names) * size.images
        assert len(one.texts) == len(names) * size.images * size.frames
        assert read(one.texts, known) == expected(size, names, known)
        # Each branch has the same images in the same order; Flux packs its latents, and has one branch.
        noise = one.sample[:, :4].unflatten(0, (len(names), size.images))
        assert torch.equal(noise, noise[:1].expand_as(noise))
    return calls


OFF = ("cond",)
GUIDED = ("uncond", "cond")
# By key of BUILD: the branches under guidance and without.
LAYOUTS = {
    **dict.fromkeys(tiny.BUILD, (GUIDED, OFF)),
    "instruct-pix2pix": (("cond", "image", "uncond"), OFF),
    "pag": (("uncond", "cond", "perturbed"), ("cond", "perturbed")),
    "lcm": (OFF, OFF),
    "flux": (OFF, OFF),
}


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("key", LAYOUTS)
def test_the_rows_have_the_prompts_that_the_table_says(key, guided, tmp_path):
    pipe = tiny.BUILD[key](tmp_path)
    agree(pipe, guided, LAYOUTS[key][not guided])


# What a class needs of a tiny pipeline beside its family's models: UNets for what it feeds them.
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "cross_attention_dim": 32,
}


def build(cls: str, folder):
    """A tiny pipeline of any class of the table."""
    families = {"XL": "sdxl", "Diffusion3": "sd3", "Flux": "flux", "PixArt": "pixart", "Latent": "lcm"}
    family = next((key for part, key in {"Animate": "animatediff", **families}.items() if part in cls), "sd")
    pipe = tiny.BUILD["image-variation" if "Variation" in cls else family](folder)
    xl = XL if family == "sdxl" else {}
    models = {"vae": tiny.vae()} if family in ("flux", "sd3") and "Control" in cls else {}
    if "InstructPix2Pix" in cls:
        models["unet"] = tiny.unet(in_channels=8, **xl)
    elif "Depth2Img" in cls:
        models["unet"] = tiny.unet(in_channels=5)
    elif "Animate" in cls and "XL" in cls:
        models = {k: v for k, v in tiny.BUILD["sdxl"](folder).components.items() if k != "unet"}
        models["unet"] = tiny.unet(diffusers.UNetMotionModel, **XL)
    elif cls.startswith("FluxControl") and "Net" not in cls:
        pipe = tiny.flux(folder, in_channels=32, out_channels=16)
    elif "FluxFill" in cls:
        pipe = tiny.flux(folder, in_channels=48, out_channels=16)
    elif cls == "StableDiffusion3InpaintPipeline":
        pipe = tiny.sd3(folder, in_channels=16, out_channels=16)
        models["vae"] = tiny.vae(16)
    if "PAG" in cls:
        models["pag_applied_layers"] = "mid" if "unet" in pipe.components else r"blocks\.0"
    if "ControlNet" in cls:
        models["controlnet"] = controlnet(cls, pipe)
    return tiny.sibling(cls, pipe, **models)


def controlnet(cls: str, pipe):
    """A small net on pictures; its weights do not matter to the rows."""
    if "Diffusion3" in cls:
        more = 1 if "Inpaint" in cls else 0
        return diffusers.SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_extra_conditioning_channels=more
        )
    if "Flux" in cls:
        heads = {"attention_head_dim": 16, "num_attention_heads": 2}
        return diffusers.FluxControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_single_layers=1, **heads
        )
    net = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
    if "Union" in cls:
        more = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
        return diffusers.ControlNetUnionModel.from_config({**net.config, **more})
    return net


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("cls", row_layouts.KNOWN)
def test_every_class_of_the_table(cls, guided, tmp_path):
    like = {"PAG": "pag", "InstructPix2Pix": "instruct-pix2pix", "Flux": "flux", "LatentConsistency": "lcm"}
    key = next((key for part, key in like.items() if part in cls), "sd")
    agree(build(cls, tmp_path), guided, LAYOUTS[key][not guided])


def test_the_table_is_sorted_and_has_every_tiny_pipeline(tmp_path):
    assert list(row_layouts.KNOWN) == sorted(set(row_layouts.KNOWN))
    assert {type(make(tmp_path)).__name__ for make in tiny.BUILD.values()} <= set(row_layouts.KNOWN)


@pytest.mark.parametrize("scale", [0.0, 3.0], ids=["without_pag", "with_pag"])
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_the_perturbed_rows_are_those_without_self_attention(guided, scale, tmp_path):
    pipe = tiny.BUILD["pag"](tmp_path)
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    off = []

    def note(module, args, output):
        plain = module.to_out[0](module.to_v(args[0]))
        off.append([bool(far < CLOSE) for far in (output - plain).abs().amax((1, 2))])

    attention.register_forward_hook(note)
    size, calls = denoise(pipe, guidance=4.0 if guided else 0.0, pag_scale=scale)
    names = LAYOUTS["pag"][not guided]
    for one, rows in zip(calls, off, strict=True):
        assert one.branches == (names if scale else names[:-1])
        assert rows == [name == "perturbed" for name in one.branches for _ in range(size.images)]


def test_perturbed_rows_stay_where_adaptive_scaling_has_turned_them_off(tmp_path):
    pipe = tiny.BUILD["pag"](tmp_path)
    calls = agree(pipe, True, LAYOUTS["pag"][0], pag_adaptive_scale=0.005)
    scales = [float(pipe._get_pag_scale(one.given["timestep"])) for one in calls]
    assert scales[0] > 0 and scales[-1] == 0


@pytest.mark.parametrize("cls", [name for name in row_layouts.KNOWN if "InstructPix2Pix" in name])
def test_only_the_last_rows_of_instruct_pix2pix_have_no_start_image(cls, tmp_path):
    size, calls = denoise(build(cls, tmp_path))
    for one in calls:
        rows = [bool(start.any()) for start in one.sample[:, 4:]]
        assert rows == [name != "uncond" for name in one.branches for _ in range(size.images)]


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_the_unet_has_all_rows_in_the_guess_mode_of_a_controlnet(guided, tmp_path):
    pipe = tiny.BUILD["controlnet"](tmp_path)
    agree(pipe, guided, LAYOUTS["controlnet"][not guided], guess_mode=True)


def test_a_unet_that_embeds_the_guidance_scale_has_one_branch(tmp_path):
    agree(tiny.sd(tmp_path, time_cond_proj_dim=8), True, OFF)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_the_skip_layer_call_of_sd3_has_the_prompts_rows_again(guided, tmp_path):
    pipe = tiny.BUILD["sd3"](tmp_path)
    known = references(pipe)
    settings = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0, "skip_layer_guidance_stop": 1}
    size, calls = denoise(pipe, guidance=4.0 if guided else 0.0, **settings)
    skipping = [one for one in calls if "skip_layers" in one.given]
    assert len(skipping) == (2 if guided else 0)  # of 3 steps; the first is not after the start
    for one in calls:
        wanted = ("perturbed",) if "skip_layers" in one.given else LAYOUTS["sd3"][not guided]
        assert one.branches == wanted
        assert read(one.texts, known) == expected(size, wanted, known)


@pytest.mark.parametrize("cls", [name for name in row_layouts.KNOWN if name.startswith("Flux")])
def test_calls_apart_by_branch_are_not_told(cls, tmp_path):
    pipe = build(cls, tmp_path)
    known = references(pipe)
    _, calls = denoise(pipe, true_cfg_scale=2.0)
    texts = [read(one.texts, known)[0] for one in calls]
    apart = "true_cfg_scale" in parameters(pipe)
    assert texts == ([{"cat"}, {"tree"}] if apart else [{"cat"}]) * (len(calls) // (1 + apart))
    assert {one.branches for one in calls} == {None if apart else OFF}
    if apart:
        _, calls = denoise(pipe, true_cfg_scale=2.0, negative_prompt=None)
        assert {one.branches for one in calls} == {OFF}


def embedded(pipe, texts, negative: str = "") -> dict[str, Tensor]:
    """The arguments of a call with the embeddings of these texts in place of the texts."""
    given = [alone(pipe, text).given for text in texts]
    names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    names["encoder_attention_mask"] = "prompt_attention_mask"
    found = {names[k]: torch.cat([one[k] for one in given]) for k in names if given[0].get(k) is not None}
    more = [one.get("added_cond_kwargs") or {} for one in given]
    if "text_embeds" in more[0]:
        found["pooled_prompt_embeds"] = torch.cat([one["text_embeds"] for one in more])
    if "num_frames" in parameters(pipe):
        found["prompt_embeds"] = found["prompt_embeds"][:: tiny.FRAMES]
    return {negative + name: value for name, value in found.items()}


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("key", [k for k in tiny.BUILD if k != "image-variation"])
def test_embeddings_count_as_prompts(key, guided, tmp_path):
    pipe = tiny.BUILD[key](tmp_path)
    known = references(pipe)
    call = {**embedded(pipe, PROMPTS), **embedded(pipe, NEGATIVE, "negative_"), "negative_prompt": None}
    if key in ("sd3", "flux"):  # they take embeddings by image
        call["num_images_per_prompt"] = 1
    size, calls = denoise(pipe, None, 4.0 if guided else 0.0, **call)
    assert size.prompts == 2
    for one in calls:
        assert one.branches == LAYOUTS[key][not guided]
        assert read(one.texts, known) == expected(size, one.branches, known)


ENDING = ["sd", "img2img", "instruct-pix2pix", "animatediff", "sdxl", "sdxl-refiner", "sd3"]


@pytest.mark.parametrize("key", ENDING)
def test_guidance_that_a_callback_ends_leaves_the_prompts_rows(key, tmp_path):
    pipe = tiny.BUILD[key](tmp_path)
    known = references(pipe)
    guided = LAYOUTS[key][0]
    names = {"image_latents", "prompt_embeds", "pooled_prompt_embeds", "add_text_embeds", "add_time_ids"}
    names = sorted(names & set(pipe._callback_tensor_inputs))

    def end(pipe, step, timestep, given):
        if step == 0:
            pipe._guidance_scale = 0.0
            return {k: v.chunk(len(guided))[guided.index("cond")] for k, v in given.items()}
        return {}

    size, calls = denoise(pipe, callback_on_step_end=end, callback_on_step_end_tensor_inputs=names)
    assert [one.branches for one in calls] == [guided] + [OFF] * (len(calls) - 1)
    assert len(calls) > 1
    for one in calls:
        assert read(one.texts, known) == expected(size, one.branches, known)


def bare(cls: type):
    """A pipeline without its models: the table asks for none."""
    return object.__new__(cls)


@pytest.mark.parametrize(
    ("cls", "call", "size"),
    [
        ("StableDiffusionPipeline", {"prompt": "cat", "num_images_per_prompt": 3}, (1, 3, 1)),
        ("StableDiffusionPipeline", {"prompt": ["cat", "dog"]}, (2, 2, 1)),
        ("StableDiffusionPipeline", {"prompt_embeds": torch.zeros(3, 4, 5)}, (3, 3, 1)),
        ("StableDiffusionPipeline", {}, None),
        ("StableDiffusionPipeline", {"prompt": []}, None),
        ("StableDiffusionPipeline", {"prompt": ("cat", "dog")}, None),
        ("StableDiffusionPipeline", {"prompt": "cat", "num_images_per_prompt": 0}, None),
        ("StableDiffusionImageVariationPipeline", {"image": Image.new("RGB", (16, 16))}, (1, 1, 1)),
        ("StableDiffusionImageVariationPipeline", {"image": [Image.new("RGB", (16, 16))] * 2}, (2, 2, 1)),
        ("AnimateDiffPipeline", {"prompt": {0: "cat", 8: "dog"}, "num_videos_per_prompt": 2}, (1, 1, 16)),
    ],
    ids="text texts embeddings nothing none_of_them tuple no_images picture pictures by_frame".split(),
)
def test_the_size_of_a_call(cls, call, size):
    pipe = bare(getattr(diffusers, cls))
    assert row_layouts.call_size(pipe, bound(pipe, call)) == size


COUNTS = {"StableDiffusionPipeline": (1, 2), "LatentConsistencyModelPipeline": (1,), "FluxPipeline": (1,)}
COUNTS |= {"StableDiffusionInstructPix2PixPipeline": (1, 3), "StableDiffusionPAGPipeline": (2, 3)}


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("cls", COUNTS)
def test_another_number_of_branches_is_not_known(cls, count):
    pipe = bare(getattr(diffusers, cls))
    pipe.pag_applied_layers = ["mid"]
    found = row_layouts.branches(pipe, count, bound(pipe, {}))
    assert (found and len(found)) == (count if count in COUNTS[cls] else None)


Plain = diffusers.StableDiffusionPipeline
OWN = {"__call__": lambda self, prompt: None}
Own = type("StableDiffusionPipeline", (Plain,), OWN)
Mixin = type("Mixin", (), OWN)
ANNOUNCES = {**OWN, "_lbdt_announces": True}


@pytest.mark.parametrize(
    ("cls", "known"),
    [
        (type("Mine", (Plain,), {}), True),
        (Own, False),
        (type("Mine", (Mixin, Plain), {}), False),
        (type("StableDiffusionPipeline", (Plain,), ANNOUNCES), True),
        (type("Mine", (Own,), ANNOUNCES), False),
        (type("Mine", (type("Announcing", (Plain,), ANNOUNCES),), OWN), False),
        (diffusers.StableDiffusionUpscalePipeline, False),
        (object, False),
    ],
    ids="own_name own_call mixed_in announcing around_own own_around unlisted no_pipeline".split(),
)
def test_a_class_with_a_call_of_its_own_is_not_known(cls, known):
    pipe, call = bare(cls), bound(bare(Plain), {"prompt": "cat"})
    assert (row_layouts.call_size(pipe, call) is not None) is known
    assert (row_layouts.branches(pipe, 2, call) is not None) is known
