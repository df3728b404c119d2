"""Pipelines of other kinds: a transformer with two streams, and an SDXL UNet without a guidance half."""

import torch

from lbdt.activations import Prompt, Site
from lbdt.activations.capture import find_module
from lbdt.activations.generated import Generated
from tests import toy
from tests.repeats import repeats

PROMPTS = [Prompt("a cat", "Cats", seed=1), Prompt("a dog", "Dogs", seed=2), Prompt("ab", seed=3)]


def text_encoder(tokenizer, projection=16):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    size = len(tokenizer)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=16,
            intermediate_size=16,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    ).eval()


def vae(scale_latents=4):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=scale_latents,
        sample_size=16,
    ).eval()


def sd3(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = toy.pipeline(folder).tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
        ).eval()
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(),
            text_encoder=text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    return pipe


def sdxl(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = toy.pipeline(folder).tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ).eval()
        pipe = StableDiffusionXLPipeline(
            unet=unet,
            scheduler=EulerDiscreteScheduler(timestep_spacing="trailing"),
            vae=vae(),
            text_encoder=text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            add_watermarker=False,
        )
    return pipe


def recorded(pipe, hookpoint, **call):
    """Inputs and outputs of a block in a call of the pipeline for the first two prompts."""
    calls = []
    handle = find_module(pipe, hookpoint).register_forward_hook(
        lambda m, args, kwargs, out: calls.append((args[0] if args else kwargs["hidden_states"], out)),
        with_kwargs=True,
    )
    try:
        pipe(
            prompt=[p.text for p in PROMPTS[:2]],
            generator=[torch.Generator().manual_seed(p.seed) for p in PROMPTS[:2]],
            output_type="latent",
            **call,
        )
    finally:
        handle.remove()
    return calls


def test_a_transformer_whose_blocks_return_the_text_stream_first(tmp_path):
    pipe = sd3(tmp_path)
    sites = [Site("transformer.transformer_blocks.0", kind) for kind in ("output", "update")]
    size = {"height": 16, "width": 16, "max_sequence_length": 16}
    source = Generated(
        pipe, PROMPTS, sites, steps=3, guidance=4.0, prompts_per_shard=2, dtype=torch.float32, call=size
    )
    assert (source.patches(sites[0]), source.width(sites[0])) == (16, 32)
    assert len(source.timesteps) == 3 and source.timesteps[0] == 1000
    assert source.settings()["sites"][0]["grid"] == [4, 4]
    calls = recorded(pipe, sites[0].hookpoint, num_inference_steps=3, guidance_scale=4.0, **size)
    for at, (given, (text, out)) in enumerate(calls):
        assert text.shape[1] != 16 and out.shape == (4, 16, 32)
        assert repeats(source.shard(0, sites[0]).x[:, at], out[2:])
        assert repeats(source.shard(0, sites[1]).x[:, at], (out - given)[2:])


def test_two_text_encoders_in_one_run(tmp_path):
    pipe = sd3(tmp_path)
    sites = [Site(f"{name}.text_model.encoder.layers.0") for name in ("text_encoder", "text_encoder_2")]
    source = Generated(pipe, PROMPTS, sites, steps=3, guidance=4.0, dtype=torch.float32)
    first, second = (source.shard(0, site).x for site in sites)
    assert first.shape == second.shape == (3, 1, 16, 16) and not torch.equal(first, second)


def test_sdxl_in_one_step_without_guidance(tmp_path):
    pipe, site = sdxl(tmp_path), Site(toy.HOOKPOINT, "update")
    size = {"height": 16, "width": 16}
    source = Generated(
        pipe, PROMPTS, [site], steps=1, guidance=0.0, prompts_per_shard=2, dtype=torch.float32, call=size
    )
    ((given, (out,)),) = recorded(pipe, toy.HOOKPOINT, num_inference_steps=1, guidance_scale=0.0, **size)
    assert out.shape == (2, 32, 4, 4)
    assert repeats(source.shard(0, site).x[:, 0], (out - given).flatten(2).transpose(1, 2))
