"""Tiny random models: a real StableDiffusionPipeline of a few thousand parameters, and a module with known numbers."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from lbdt.dictionary import ConceptDictionary
from lbdt.editors import ConceptEraser
from lbdt.hooks.lookup import unwrap
from lbdt.sae import SAEConfig, SparseAutoencoder

HOOKPOINT = "unet.up_blocks.0.attentions.0"
DETECT_AT = "unet.mid_block.attentions.0"
WIDTH = 32
CONCEPTS = ("Cats", "Dogs", "Trees")
TIMESTEPS = (999, 666, 333, 1)


def pipeline(folder: Path, tokens: int = 16):
    """16 x 16 pixels, latents 8 x 8, attention on 4 x 4 patches of width 32, texts of `tokens`; weights from seed 0."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, WIDTH),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        )
        tokenizer = _tokenizer(folder, tokens)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokens,
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
            pad_token_id=len(tokenizer) - 1,
        )
        text_encoder = CLIPTextModel(text)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for model in (unet, vae, text_encoder):
        model.eval()
    return pipe


def _tokenizer(folder: Path, length: int = 16):
    from transformers import CLIPTokenizer

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "ab</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def eraser(
    width: int = WIDTH, latents: int = 64, threshold: float = 0.3, bank: bool = False, **settings
) -> ConceptEraser:
    """Latent i belongs to concept i; it is detected where its activation (ReLU; TopK with `k`) is above `threshold`."""
    update, k = settings.pop("update", False), settings.pop("k", None)
    kind = {"activation": "topk", "k": k} if k else {"activation": "relu"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sae = SparseAutoencoder(SAEConfig(d_in=width, num_latents=latents, update=update, **kind))
        sae.requires_grad_(False)
        sae.b_dec.normal_(std=0.1)
    mean = torch.zeros(len(CONCEPTS), len(TIMESTEPS), latents)
    for concept in range(len(CONCEPTS)):
        # The published threshold is the mean over concepts.
        mean[concept, :, concept] = threshold * len(CONCEPTS)
    fired = torch.zeros(latents, dtype=torch.int64)
    fired[: len(CONCEPTS)] = len(TIMESTEPS)  # one patch a timestep, of the latent's own concept
    dictionary = ConceptDictionary(
        CONCEPTS,
        TIMESTEPS,
        mean,
        torch.ones(len(CONCEPTS), len(TIMESTEPS), dtype=torch.int64),
        fired=fired,
        bank=torch.arange(len(TIMESTEPS) * 2.0).view(-1, 2, 1).expand(-1, -1, width) if bank else None,
    )
    settings.setdefault("hookpoint", HOOKPOINT)
    settings.setdefault("selection", {"top_k": 1})
    return ConceptEraser(sae, dictionary, **settings)


def images(pipe, prompts=("cat", "dog"), steps: int = 3, seed: int = 0, guidance: float = 4.0, **call):
    """float32 [B, 3, H, W]; every image starts from its own seed."""
    per = call.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts) * per)]
    return pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="pt",
        **call,
    ).images


def plan_of(pipe):
    """The plan of the editor on HOOKPOINT."""
    hooks = pipe.unet.up_blocks[0].attentions[0]._diffusers_hook.hooks.values()
    return next(hook.plan for hook in hooks if hasattr(hook, "plan"))


def traces(pipe) -> list[str]:
    """Everything that an attachment puts on a pipeline."""
    denoiser = unwrap(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)

    def is_marked(module) -> bool:
        registry = vars(module).get("_diffusers_hook")
        # Some pipelines of diffusers leave an empty registry of their own.
        ours = registry is not None and (registry.hooks or hasattr(registry, "lbdt_created"))
        return bool(ours or {"forward", "__deepcopy__", "__reduce_ex__"} & set(vars(module)))

    found = [name for name, module in denoiser.named_modules() if is_marked(module)]
    found += [name for name in ("encode_prompt", "_lbdt_watch") if name in vars(pipe)]
    return found + (["__class__"] if "_lbdt_announces" in vars(type(pipe)) else [])


class Echo(nn.Module):
    """A block that returns `output`, packed as a tensor, a tuple or a ModelOutput."""

    def __init__(self, width: int, packing: str = "tuple") -> None:
        super().__init__()
        self.in_channels = width
        self.packing = packing

    def forward(self, hidden_states: torch.Tensor, output: torch.Tensor):
        if self.packing == "tensor":
            return output
        if self.packing == "tuple":
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)


class Unet(nn.Module):
    """time_proj and one Echo; called with what the block gets and returns."""

    def __init__(self, width: int, packing: str = "tuple") -> None:
        super().__init__()
        self.config = SimpleNamespace(class_embed_type=None)
        self.time_proj = nn.Identity()
        self.block = Echo(width, packing)
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, timesteps: torch.Tensor, output: torch.Tensor, given: torch.Tensor | None = None):
        self.time_proj(timesteps)
        return self.block(torch.zeros_like(output) if given is None else given, output)


class EchoPipe:
    """What an attachment needs of a pipeline, around `Unet`; call `pipe.unet(timesteps, output)`."""

    def __init__(self, width: int, packing: str = "tuple", guided: bool = False) -> None:
        self.unet = Unet(width, packing)
        self.components = {"unet": self.unet}
        self.layout = ("uncond", "cond") if guided else ("cond",)
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(TIMESTEPS))
