"""Trains EmojiCanvas from nothing: `python -m lbdt.canvas.train STAGE --work DIR`.

Every stage is seeded and resumable: run the same command again after it was stopped. `lbdt/canvas/README.md` has
the settings of the shipped weights and what was tried beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lbdt.canvas import WEIGHTS, models
from lbdt.canvas.scenes import OBJECTS, STYLES, prompt
from lbdt.canvas.train_judges import train_judges
from lbdt.canvas.trainers import (
    HELD_OUT_SEED,
    TRAIN_SEED,
    Muon,
    adamw,
    autoencoder,
    cached_scenes,
    minimise,
    save_tensors,
    to_float,
)
from lbdt.runs.files import write_file

STYLE_DROP, PROMPT_DROP = 0.1, 0.1
TIMESTEP_POWER = 0.6


def train_vae(work: Path, steps: int, count: int, start: Path | None) -> None:
    """Trains the autoencoder by L1 + MSE, with noise of 0.05 on the latents so that it forgives the UNet's errors.

    `start`: an autoencoder's folder whose encoder is kept, so that the latents of scenes do not change, and whose
    decoder goes on learning, on scenes as the UNet paints them; None: both from nothing, on objects anywhere.
    """
    from diffusers import AutoencoderTiny

    anywhere = start is None
    images, _, _ = cached_scenes(work, count, TRAIN_SEED, anywhere=anywhere)
    torch.manual_seed(0)
    vae = models.build_vae() if start is None else AutoencoderTiny.from_pretrained(start)
    vae.to(memory_format=torch.channels_last).train()
    if start is not None:
        vae.encoder.requires_grad_(False)
    net = vae if start is None else vae.decoder

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        x = to_float(images[torch.randint(len(images), (16,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x).latents
            y = vae.decode(z + 0.05 * torch.randn(z.shape, generator=generator)).sample.float()
        return F.l1_loss(y, x) + F.mse_loss(y, x)

    minimise("vae", work, net, steps, loss, [adamw(net.parameters(), 2e-3)], ema=0.995)
    vae.eval()
    held_out = to_float(cached_scenes(work, 240, HELD_OUT_SEED, anywhere=anywhere)[0])
    with torch.no_grad():
        z = torch.cat([vae.encode(b).latents for b in held_out.split(16)])
        y = torch.cat([vae.decode(b).sample for b in z.split(16)]).clamp(-1, 1)
    psnr = -10 * ((y - held_out) / 2).square().mean(dim=(1, 2, 3)).log10().mean().item()
    if start is None:
        vae.register_to_config(scaling_factor=1.0 / z.std().item())
    print(
        f"vae: {psnr:.2f} dB on held-out scenes, latent std {z.std().item():.3f}, mean {z.mean().item():.3f}"
    )
    vae.save_pretrained(work / "vae")


def encode_scenes(work: Path, count: int) -> None:
    """Writes scaled latents of the training scenes, float16 [count, 4, 32, 32], with their labels."""
    images, objects, styles = cached_scenes(work, count, TRAIN_SEED)
    vae = autoencoder(work).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = torch.cat([vae.encode(to_float(part)).latents.float() for part in images.split(64)])
        z = z * vae.config.scaling_factor
    print(f"latents: mean {z.mean().item():.3f}, std {z.std().item():.3f}")
    save_tensors({"latents": z.half(), "objects": objects, "styles": styles}, work / "latents.safetensors")


class TextToLatent(torch.nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, text_encoder: torch.nn.Module, unet: torch.nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet


def train_unet(
    work: Path, name: str, layout: str, widths: tuple[int, ...], steps: int, batch: int, start: Path | None
) -> None:
    """Trains UNet and text encoder by v-prediction, more on noisy timesteps; drops 10 % of prompts, 10 % of styles.

    `start`: a pipeline's folder to start from, with its layout; None: from nothing.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    data = load_file(work / "latents.safetensors")
    latents, objects, styles = (data[k] for k in ("latents", "objects", "styles"))
    tokenizer = models.build_tokenizer(work / "tokenizer")
    scheduler = models.build_scheduler()
    torch.manual_seed(0)
    text_encoder = models.build_text_encoder(len(tokenizer), tokenizer.eos_token_id)
    unet = models.build_unet(layout, widths)
    if start:
        begin_from(start, unet, text_encoder, tokenizer)
    # NCHW: bfloat16 group norm on CPU is 4 to 8 times slower in channels_last, which outweighs the faster convolutions.
    # On CPU the fused attention's backward pass costs more than the plain products at 64 patches.
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    net = TextToLatent(text_encoder, unet)
    names = (None, *OBJECTS)
    texts = [
        prompt([name for name in pair if name], s)
        for pair in itertools.product(names, names)
        for s in (*STYLES, None)
    ] + [""]
    ids = tokenizer(texts, padding="max_length", max_length=models.TOKENS, return_tensors="pt").input_ids

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(latents), (batch,), generator=generator)
        x, shown = latents[index].float(), objects[index] + 1
        u = torch.rand(batch, generator=generator)
        row = (shown[:, 0] * len(names) + shown[:, 1]) * (len(STYLES) + 1)
        row = row + torch.where(u < STYLE_DROP, len(STYLES), styles[index])
        row = torch.where(u > 1 - PROMPT_DROP, len(texts) - 1, row)
        # One draw per equal slice of the schedule: less variance between batches than independent ones. The power
        # favours noisy steps, where the prompt and not the picture says what to paint.
        slices = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        t = (1000 * slices**TIMESTEP_POWER).long().clamp(max=999)
        noise = torch.randn(x.shape, generator=generator)
        noisy, target = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            used, place = row.unique(return_inverse=True)
            context = text_encoder(ids[used]).last_hidden_state[place]
            v = unet(noisy, t, context).sample
        return F.mse_loss(v.float(), target)

    minimise(name, work, net, steps, loss, unet_optimizers(net), ema=0.999)
    unet.set_attn_processor(AttnProcessor2_0())
    StableDiffusionPipeline(
        vae=autoencoder(work),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(work / f"pipeline-{name}")


def begin_from(start: Path, unet: torch.nn.Module, text_encoder: torch.nn.Module, tokenizer) -> None:
    """Copies the weights of the pipeline in `start` into new models; a token's embedding is the mean of those that its
    text had."""
    from transformers import CLIPTokenizer

    unet.load_state_dict(load_float(start / "unet/diffusion_pytorch_model.safetensors"))
    old = load_float(start / "text_encoder/model.safetensors")
    (key,) = (k for k in old if k.endswith("token_embedding.weight"))
    before = CLIPTokenizer.from_pretrained(start / "tokenizer")
    known = before.get_vocab()
    table = torch.empty(len(tokenizer), old[key].shape[1])
    for token, row in tokenizer.get_vocab().items():
        pieces = [known[token]] if token in known else None
        pieces = pieces or before(token.removesuffix("</w>"), add_special_tokens=False).input_ids
        table[row] = old[key][pieces].mean(0)
    text_encoder.load_state_dict(old | {key: table})


def load_float(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in float32 where they are of lower precision."""
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}


def unet_optimizers(net: TextToLatent) -> list[torch.optim.Optimizer]:
    """Muon for the UNet's matrices, AdamW for the rest, slowly for the text encoder.

    At the UNet's rate the text encoder unlearns the words for objects while only the style lowers the loss: the outputs
    of two objects' tokens drifted from 4.0 apart to 0.7 in 5,000 steps.
    """
    inner = {
        k: p
        for k, p in net.unet.named_parameters()
        if p.ndim >= 2 and not k.startswith(("conv_in", "conv_out"))
    }
    rest = [p for k, p in net.unet.named_parameters() if k not in inner]
    groups = [
        {"params": rest},
        {"params": list(net.text_encoder.parameters()), "lr": 1e-4, "weight_decay": 0.0},
    ]
    return [Muon(inner.values(), lr=0.02), adamw(groups, 1.5e-3)]


def release_pipeline(work: Path, name: str) -> None:
    """Copies the pipeline into the package, weights in float16."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(work / f"pipeline-{name}", local_files_only=True)
    pipe.to(torch.float16).save_pretrained(WEIGHTS / "pipeline")
    for path in WEIGHTS.glob("pipeline/**/*.json"):
        settings = json.loads(path.read_text())
        if path.name in ("model_index.json", "config.json"):
            settings.pop("_name_or_path", None)  # a folder of this machine
            if path.parent.name == "text_encoder":
                # Else transformers would compute in the files' float16, unlike diffusers.
                settings["dtype"] = "float32"
            if path.parent.name == "vae":
                # diffusers writes it, and warns of it when it is read again.
                settings.pop("block_out_channels", None)
            write_file(path, (json.dumps(settings, indent=2) + "\n").encode())


def release_judges(work: Path) -> None:
    """Copies the judges into the package."""
    for judge in models.CLASSIFIERS:
        file = f"{judge}_classifier.safetensors"
        save_tensors(load_file(work / file), WEIGHTS / "judges" / file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("vae", "classifiers", "latents", "unet", "release"))
    parser.add_argument("--work", type=Path, required=True, help="folder for caches, checkpoints and results")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--count", type=int, default=18000, help="training scenes")
    parser.add_argument("--name", default="unet")
    parser.add_argument("--judge", choices=models.CLASSIFIERS, help="train this one only")
    parser.add_argument("--layout", default="bottleneck", choices=("bottleneck", "two_levels", "up_only"))
    parser.add_argument("--widths", type=int, nargs=3, default=(32, 64, 192))
    parser.add_argument(
        "--start",
        type=Path,
        help="begin with the weights of this pipeline's folder (of unet), or this autoencoder's (of vae)",
    )
    parser.add_argument("--batch", type=int, default=40)
    args = parser.parse_args()
    if args.stage == "vae":
        train_vae(args.work, args.steps or 1300, args.count, args.start)
    elif args.stage == "classifiers":
        train_judges(args.work, args.steps or 1200, 9000, args.judge)
    elif args.stage == "latents":
        encode_scenes(args.work, args.count)
    elif args.stage == "release":
        release_pipeline(args.work, args.name)
        release_judges(args.work)
    else:
        widths, steps = tuple(args.widths), args.steps or 4000
        train_unet(args.work, args.name, args.layout, widths, steps, args.batch, args.start)


if __name__ == "__main__":
    main()
