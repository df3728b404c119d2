"""Tiny random pipelines of many diffusers classes: 16 x 16 pixels, latents 8 x 8, width 32 on 4 x 4 patches.

`BUILD[key](folder)` builds one (a tokenizer's files go to `folder`), `run(pipe, prompts)` calls it, and
`sibling(cls, pipe)` is another class around the same models. Seeded weights, float32, on the CPU, no downloads.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from tests import toy

WIDTH = 32
SIDE = 16  # pixels
FRAMES = 3
TOKENS = 16


def unet(cls: type = diffusers.UNet2DConditionModel, **config) -> nn.Module:
    """A UNet like `toy.pipeline`'s, of any diffusers class with the same arguments; seeded."""
    motion = "Motion" if cls is diffusers.UNetMotionModel else "2D"
    heads = {"num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 8}
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, WIDTH),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock" + motion, "CrossAttnDownBlock" + motion),
        "up_block_types": ("CrossAttnUpBlock" + motion, "UpBlock" + motion),
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
        **({"attention_head_dim": 2} if motion == "2D" else heads),
    }
    with _seeded(0):
        return cls(**{**settings, **config}).eval()


def text_encoder(tokenizer, projected: bool = False, seed: int = 1) -> nn.Module:
    """A CLIP text encoder of width 16, with its projection or without."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    last = len(tokenizer) - 1
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )
    with _seeded(seed):
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(channels: int = 4) -> nn.Module:
    """A variational autoencoder, for the classes that `toy.pipeline`'s is too simple for."""
    with _seeded(8):
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            scaling_factor=1.0,
            shift_factor=0.0,
        ).eval()


def t5() -> tuple[nn.Module, Callable]:
    """A T5 encoder of width 32 and its tokenizer, which makes a token of each letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", " ", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    with _seeded(3):
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(vocabulary),
                d_model=32,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                dropout_rate=0.0,
            )
        )
    return encoder.eval(), fast


def sd(folder: Path, cls: str = "StableDiffusionPipeline", models: dict | None = None, **config):
    """The toy Stable Diffusion, as pipeline class `cls` with more `models`, its UNet with other `config`."""
    pipe = toy.pipeline(folder, TOKENS)
    more = {**({"unet": unet(**config)} if config else {}), **(models or {})}
    return _made(cls, pipe.components, more)


def sdxl(
    folder: Path, cls: str = "StableDiffusionXLPipeline", scheduler=None, refiner: bool = False, **config
):
    """A tiny SDXL with both text encoders; with `refiner` only the second, and the aesthetics score."""
    base = toy.pipeline(folder, TOKENS)
    tokenizer = base.tokenizer
    embedding = 16 + 8 * (5 if refiner else 6)
    models = {
        "vae": base.vae,
        "text_encoder": None if refiner else text_encoder(tokenizer),
        "text_encoder_2": text_encoder(tokenizer, projected=True, seed=2),
        "tokenizer": None if refiner else tokenizer,
        "tokenizer_2": tokenizer,
        "unet": unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=embedding,
            **{"cross_attention_dim": 16 if refiner else 32, **config},
        ),
        "scheduler": scheduler or diffusers.EulerDiscreteScheduler(),
        "add_watermarker": False,
        **({"requires_aesthetics_score": True} if refiner else {}),
    }
    return _made(cls, models)


def controlnet(folder: Path):
    """The toy Stable Diffusion with a ControlNet on pictures, whose zero convolutions are not zero."""
    models = sd(folder).components
    with _seeded(4):
        net = diffusers.ControlNetModel.from_unet(models["unet"], conditioning_embedding_out_channels=(8, 8))
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return _made("StableDiffusionControlNetPipeline", models, {"controlnet": net.eval()})


def image_variation(folder: Path):
    """A tiny StableDiffusionImageVariationPipeline: its prompts are pictures."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
    )
    with _seeded(5):
        encoder = CLIPVisionModelWithProjection(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    more = {"image_encoder": encoder, "feature_extractor": processor}
    return _made("StableDiffusionImageVariationPipeline", sd(folder).components, more)


def animatediff(folder: Path):
    """A tiny AnimateDiff; every block of its UNet has the frames as rows."""
    with _seeded(6):
        adapter = diffusers.MotionAdapter(
            block_out_channels=(16, WIDTH),
            motion_layers_per_block=1,
            motion_mid_block_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            motion_max_seq_length=8,
        )
    more = {"unet": unet(diffusers.UNetMotionModel), "motion_adapter": adapter.eval()}
    return _made("AnimateDiffPipeline", sd(folder).components, more)


def sd3(folder: Path, **config):
    """A tiny Stable Diffusion 3 without its third text encoder."""
    base = toy.pipeline(folder, TOKENS)
    settings = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
    }
    with _seeded(0):
        transformer = diffusers.SD3Transformer2DModel(**{**settings, **config}).eval()
    models = {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": base.vae,
        "text_encoder": text_encoder(base.tokenizer, projected=True),
        "tokenizer": base.tokenizer,
        "text_encoder_2": text_encoder(base.tokenizer, projected=True, seed=2),
        "tokenizer_2": base.tokenizer,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    return _made("StableDiffusion3Pipeline", models)


def flux(folder: Path, **config):
    """A tiny Flux whose transformer has the guidance scale as an input."""
    base = toy.pipeline(folder, TOKENS)
    encoder, tokenizer = t5()
    settings = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    with _seeded(0):
        transformer = diffusers.FluxTransformer2DModel(**{**settings, **config}).eval()
    models = {
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": base.vae,
        "text_encoder": text_encoder(base.tokenizer),
        "tokenizer": base.tokenizer,
        "text_encoder_2": encoder,
        "tokenizer_2": tokenizer,
    }
    return _made("FluxPipeline", models)


def pixart(folder: Path):
    """A tiny PixArt."""
    encoder, tokenizer = t5()
    with _seeded(0):
        transformer = diffusers.PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=32,
            caption_channels=32,
            use_additional_conditions=False,
        ).eval()
    models = {
        "transformer": transformer,
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        "vae": toy.pipeline(folder, TOKENS).vae,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
    }
    return _made("PixArtAlphaPipeline", models)


def _turbo(folder: Path):
    return sdxl(folder, scheduler=diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"))


def _lcm(folder: Path):
    models = {"scheduler": diffusers.LCMScheduler()}
    return sd(folder, "LatentConsistencyModelPipeline", models, time_cond_proj_dim=8)


BUILD: dict[str, Callable[[Path], diffusers.DiffusionPipeline]] = {
    "sd": sd,
    "img2img": lambda folder: sd(folder, "StableDiffusionImg2ImgPipeline"),
    "inpaint": lambda folder: sd(folder, "StableDiffusionInpaintPipeline", in_channels=9),
    "controlnet": controlnet,
    "pag": lambda folder: sd(folder, "StableDiffusionPAGPipeline", {"pag_applied_layers": "mid"}),
    "instruct-pix2pix": lambda folder: sd(folder, "StableDiffusionInstructPix2PixPipeline", in_channels=8),
    "image-variation": image_variation,
    "lcm": _lcm,
    "animatediff": animatediff,
    "sdxl": sdxl,
    "sdxl-refiner": lambda folder: sdxl(folder, "StableDiffusionXLImg2ImgPipeline", refiner=True),
    "sdxl-turbo": _turbo,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
}

# A joint block of SD3 and Flux returns its text first; its attention the image.
SITE: dict[str, str] = {
    **dict.fromkeys(BUILD, toy.HOOKPOINT),
    "sd3": "transformer.transformer_blocks.0.attn",
    "flux": "transformer.transformer_blocks.0.attn",
    "pixart": "transformer.transformer_blocks.0",
}


def sibling(cls: str, pipe, **models):
    """Another pipeline class around the models of `pipe`, and `models`."""
    return _made(cls, pipe.components, models)


def denoiser(pipe) -> nn.Module:
    """The UNet or transformer."""
    return pipe.unet if "unet" in pipe.components else pipe.transformer


def arguments(pipe, prompts: Sequence[str] | None, seed: int = 0, **call) -> dict:
    """What a call of `pipe` needs beside `call`, as its class asks for it; `prompts` None: it has embeddings.

    All prompts get one start image; a class without prompts gets a picture of each text's own.
    """
    known = inspect.signature(_diffusers(type(pipe)).__call__).parameters
    count = len(call["prompt_embeds"]) if prompts is None else len(prompts)
    videos = "num_frames" in known
    images = count if videos else count * call.get("num_images_per_prompt", 1)
    picture = _picture("start")
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    wanted = {
        "prompt": None if prompts is None else list(prompts),
        "image": picture if "prompt" in known else torch.cat([_picture(text) for text in prompts]),
        "mask_image": mask,
        "control_image": picture,
        "control_mask": mask,
        "depth_map": picture[:, 0],
        "strength": 0.7,
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "max_sequence_length": TOKENS,
        "clean_caption": False,
        "use_resolution_binning": False,
        "max_area": SIDE * SIDE,
        "_auto_resize": False,
        "num_inference_steps": 3,
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(images)],
        "output_type": "pt",
    }
    return {**{name: value for name, value in wanted.items() if name in known}, **call}


def run(pipe, prompts: Sequence[str] | None = ("cat", "dog"), guidance: float = 4.0, **call) -> Tensor:
    """Images [B, 3, H, W], or frames [B, F, 3, H, W] of AnimateDiff; every image starts from its own seed."""
    if "guidance_scale" not in call:
        call["guidance_scale"] = guidance
    out = pipe(**arguments(pipe, prompts, **call))
    return out.frames if hasattr(out, "frames") else out.images


def _picture(text: str) -> Tensor:
    return torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(sum(map(ord, text))))


def _diffusers(cls: type) -> type:
    return next(c for c in cls.__mro__ if c.__module__.startswith("diffusers."))


def _made(cls: str, models: dict, more: dict | None = None):
    """A pipeline of the class from those of the models that it takes."""
    kind = getattr(diffusers, cls)
    known = inspect.signature(kind.__init__).parameters
    made = {**models, **(more or {})}
    if "requires_safety_checker" in known:
        made["requires_safety_checker"] = False
    for name, parameter in known.items():
        if name != "self" and name not in made and parameter.default is inspect.Parameter.empty:
            made[name] = None
    pipe = kind(**{name: part for name, part in made.items() if name in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _seeded(seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
