"""What is taken out of a running pipeline: by hand, in every layout, and nothing left behind."""

import pytest
import torch
from torch import nn

from lbdt.activations import Prompt, Site, Source
from lbdt.activations.capture import capture, find_module
from lbdt.activations.generated import Generated
from lbdt.activations.source import shard_count
from tests import toy
from tests.repeats import repeats

OUTPUT, UPDATE = Site(toy.HOOKPOINT), Site(toy.HOOKPOINT, "update")
BLOCK = Site("unet.up_blocks.0.attentions.0.transformer_blocks.0")
TEXT = Site("text_encoder.encoder.layers.0")
PROMPTS = [
    Prompt("a cat", "Cats", "Sketch", 5),
    Prompt("a dog", "Dogs", None, 6),
    Prompt("no", None, "Photo", 7),
    Prompt("a cat", "Cats", None, 8),
    Prompt("ab", None, None, 5),
]


def generated(pipe, sites=(OUTPUT,), prompts=PROMPTS, **settings):
    settings = {"steps": 4, "guidance": 4.0, "prompts_per_shard": 2, "dtype": torch.float32} | settings
    return Generated(pipe, prompts, sites, **settings)


def by_hand(pipe, prompts, hookpoint=toy.HOOKPOINT, steps=4, guidance=4.0):
    """Every call's (timestep, input, output) of a block, all rows, from hooks of the test's own."""
    timesteps, calls = [], []
    handles = [
        pipe.unet.register_forward_pre_hook(lambda m, args: timesteps.append(int(args[1]))),
        find_module(pipe, hookpoint).register_forward_hook(
            lambda m, args, out: calls.append((args[0], out[0] if isinstance(out, tuple) else out))
        ),
    ]
    try:
        pipe(
            [p.text for p in prompts],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(p.seed) for p in prompts],
            output_type="latent",
        )
    finally:
        for handle in handles:
            handle.remove()
    return [(t, *call) for t, call in zip(timesteps, calls, strict=True)]


def tokens(x):
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x


def test_it_is_a_source_with_the_sizes_of_its_sites(pipe):
    source = generated(pipe, (UPDATE, OUTPUT, OUTPUT))
    assert isinstance(source, Source) and source.sites == (OUTPUT, UPDATE)
    assert (source.prompts, shard_count(source), source.width(OUTPUT), source.patches(OUTPUT)) == (
        5,
        3,
        32,
        16,
    )
    assert source.concepts == ("Cats", "Dogs") and source.styles == ("Sketch", "Photo")
    assert source.timesteps == (751, 501, 251, 1)
    shard = source.shard(2, OUTPUT)
    assert (
        shard.x.shape == (1, 4, 16, 32) and shard.concepts.tolist() == [-1] and shard.styles.tolist() == [-1]
    )
    assert source.shard(0, OUTPUT).concepts.tolist() == [0, 1]
    with pytest.raises(IndexError, match="shard 3: expected one of 3"):
        source.shard(3, OUTPUT)
    with pytest.raises(ValueError, match="site: the activations hold"):
        source.shard(0, BLOCK)


@pytest.mark.parametrize("guidance", [4.0, 0.0], ids=["uncond-and-cond", "one-half"])
def test_outputs_and_updates_are_those_of_the_conditional_half(pipe, guidance):
    source = generated(pipe, (OUTPUT, UPDATE), guidance=guidance)
    calls = by_hand(pipe, PROMPTS[:2], guidance=guidance)
    assert tuple(t for t, _, _ in calls) == source.timesteps
    for at, (_, given, out) in enumerate(calls):
        assert out.shape[0] == (4 if guidance else 2)
        assert repeats(source.shard(0, OUTPUT).x[:, at], tokens(out[-2:]))
        assert repeats(source.shard(0, UPDATE).x[:, at], tokens(out[-2:] - given[-2:]))


def test_a_block_on_tokens(pipe):
    source = generated(pipe, (BLOCK,))
    for at, (_, _, out) in enumerate(by_hand(pipe, PROMPTS[:2], BLOCK.hookpoint)):
        assert out.dim() == 3 and repeats(source.shard(0, BLOCK).x[:, at], out[-2:])
    assert source.settings()["sites"][0]["grid"] == [4, 4]


def test_one_pipeline_call_serves_all_sites_and_gives_plain_tensors(pipe):
    source, calls = generated(pipe, (OUTPUT, UPDATE)), []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    first, update = source.shard(0, OUTPUT), source.shard(0, UPDATE)
    handle.remove()
    assert len(calls) == 4 and not first.x.is_inference() and not update.x.requires_grad
    assert repeats(source.run(0)[OUTPUT].x, first.x)


@pytest.mark.parametrize(
    ("wanted", "timesteps", "calls"),
    [
        (None, (751, 501, 251, 1), 4),
        (2, (501, 1), 4),
        (1, (251,), 3),
        ([501, 751], (751, 501), 2),
    ],
    ids=["all", "spread", "middle", "named-stops-early"],
)
def test_the_wanted_timesteps_and_no_step_after_the_last(pipe, wanted, timesteps, calls):
    source, whole, ran = generated(pipe, timesteps=wanted), generated(pipe), []
    assert source.timesteps == timesteps
    handle = pipe.unet.register_forward_hook(lambda *_: ran.append(1))
    x = source.shard(1, OUTPUT).x
    handle.remove()
    assert len(ran) == calls
    assert repeats(x, whole.shard(1, OUTPUT).x[:, [whole.timesteps.index(t) for t in timesteps]])


def test_a_scheduler_that_repeats_a_timestep(tmp_path):
    from diffusers import PNDMScheduler

    pipe = toy.pipeline(tmp_path)
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    source = generated(pipe)
    assert source.timesteps == (751, 501, 251, 1)
    calls = by_hand(pipe, PROMPTS[:2])
    assert [t for t, _, _ in calls] == [751, 501, 501, 251, 1]
    assert repeats(source.shard(0, OUTPUT).x[:, 1], tokens(calls[1][2][-2:]))


def test_drawn_patches_follow_seed_prompt_and_timestep_alone(pipe):
    whole = generated(pipe)
    some = generated(pipe, patches=6, seed=3)
    other = generated(pipe, patches=6, seed=3, prompts_per_shard=3)
    shard = some.shard(0, OUTPUT)
    assert shard.x.shape == (2, 4, 6, 32) and shard.patches.dtype == torch.int32
    assert bool((shard.patches.diff(dim=2) > 0).all())
    index = shard.patches.long().unsqueeze(3).expand_as(shard.x)
    assert repeats(shard.x, whole.shard(0, OUTPUT).x.gather(2, index))
    assert torch.equal(other.shard(0, OUTPUT).patches[:2], shard.patches)
    assert torch.equal(other.shard(1, OUTPUT).patches[:1], some.shard(1, OUTPUT).patches[1:])
    drawn = {tuple(row) for row in shard.patches.flatten(0, 1).tolist()}
    assert len(drawn) == 8  # another draw for each prompt and timestep
    assert not torch.equal(generated(pipe, patches=6, seed=4).shard(0, OUTPUT).patches, shard.patches)
    assert generated(pipe, patches=99).patches(OUTPUT) == 16


def test_every_patch_is_drawn_equally_often(pipe):
    source = generated(pipe, patches=4)
    drawn = source.drawn(OUTPUT, 0, 8000, 501)
    counts = drawn.flatten().bincount(minlength=16).double()
    expected = 8000 * 4 / 16
    # Chi-square of 15 degrees of freedom, times the finite-population factor: 99.9 % lie below 38.
    assert float(((counts - expected) ** 2 / expected).sum()) < 38


def test_text_encoder_states_are_those_of_the_prompts(pipe):
    source = generated(pipe, (TEXT, Site(TEXT.hookpoint, "update")))
    assert source.timesteps == (0,) and source.settings()["sites"][0]["grid"] is None
    inputs = pipe.tokenizer(
        ["a cat", "a dog"], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    seen = []
    handle = find_module(pipe, TEXT.hookpoint).register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        pipe.text_encoder(inputs.input_ids)
    handle.remove()
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert repeats(source.shard(0, TEXT).x[:, 0], expected)


def test_only_the_first_call_of_a_text_encoder_counts(pipe):
    class Receiver:
        begun, taken = 0, 0

        def begin(self, timestep):
            self.begun += 1
            return True

        def take(self, site, x, sample):
            self.taken += 1

        def end(self):
            pass

    receiver, calls = Receiver(), []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), capture(pipe, [TEXT], 1, receiver):
        pipe.encode_prompt("a cat", torch.device("cpu"), 1, True, negative_prompt="a dog")
    handle.remove()
    assert (len(calls), receiver.begun, receiver.taken) == (2, 1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sites": ()}, ValueError, "sites: expected at least one"),
        ({"sites": (OUTPUT, TEXT)}, ValueError, "collect them in two runs"),
        (
            {"sites": (Site("unet.up_blocks.0.attention.0"),)},
            ValueError,
            "nearest: unet.up_blocks.0.attentions",
        ),
        ({"sites": (Site("unet.up_blocks"),)}, ValueError, "no module 'unet.up_blocks' that is called"),
        (
            {"sites": (Site("transformer.a"),)},
            ValueError,
            "has no component 'transformer' to hook; it has text_enc",
        ),
        ({"sites": (Site("unet.conv_in", "update"),)}, ValueError, "so it has no update"),
        ({"sites": (Site("unet.time_proj"),)}, ValueError, r"expected \[B, d, H, W\] or \[B, N, d\]"),
        ({"prompts": []}, ValueError, "prompts: expected at least one"),
        ({"steps": 0}, ValueError, "steps: expected an integer >= 1, got 0"),
        ({"patches": 0}, ValueError, "patches: expected an integer >= 1"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected one of float16, bfloat16, float32"),
        ({"timesteps": 5}, ValueError, r"expected a number of them in \[1, 4\], got 5"),
        ({"timesteps": [500]}, ValueError, "expected some of 751, 501, 251, 1, each once; got 500"),
        ({"call": {"eta_": 1}}, ValueError, "take no eta_"),
        ({"call": {"prompt": "x"}}, ValueError, "call: prompt is set by lbdt"),
        ({"concepts": ["Dogs"]}, ValueError, "concepts: expected each name"),
        ({"pipe": nn.Linear(1, 1)}, TypeError, "pipe: expected a diffusers pipeline, got Linear"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_collected_is_refused(pipe, change, error, message):
    change = dict(change)
    with pytest.raises(error, match=message):
        generated(change.pop("pipe", pipe), **change)
    assert hooks(pipe) == []


def hooks(pipe) -> list[str]:
    found = [(n, m) for model in (pipe.unet, pipe.text_encoder) for n, m in model.named_modules()]
    return [n for n, m in found if m._forward_hooks or m._forward_pre_hooks] + toy.traces(pipe)


def test_the_pipeline_is_as_before_even_after_a_failure(tmp_path):
    pipe = toy.pipeline(tmp_path)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    before, state = toy.images(pipe), torch.get_rng_state()
    source = generated(pipe, (OUTPUT, UPDATE, BLOCK))
    source.shard(0, OUTPUT)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = pipe.unet.conv_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        source.run(1)
    handle.remove()
    assert hooks(pipe) == [] and pipe._progress_bar_config == {"desc": "mine", "disable": True}
    assert torch.equal(torch.get_rng_state(), state) and repeats(toy.images(pipe), before)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e5, torch.float16, "activations up to 100000 overflow float16; use --dtype bfloat16 or float32"),
        (float("nan"), torch.float32, "NaN or infinite activations"),
        (float("-inf"), torch.float32, "NaN or infinite activations"),
        (1e5, torch.bfloat16, None),
    ],
    ids=["overflow", "nan", "inf", "bfloat16-holds-it"],
)
def test_numbers_that_cannot_be_stored_are_refused(pipe, value, dtype, message):
    source = generated(pipe, dtype=dtype)

    def spoil(module, args, output):
        out = output[0].clone()
        out[-1, 3, 0, 0] = value
        return (out,)

    handle = find_module(pipe, toy.HOOKPOINT).register_forward_hook(spoil)
    try:
        if message is None:
            assert source.run(0)[OUTPUT].x[1, 0, 0, 3] == torch.tensor(value).to(dtype)
        else:
            with pytest.raises(ValueError, match=f"site {OUTPUT}: {message}"):
                source.run(0)
    finally:
        handle.remove()


def test_a_compiled_unet_runs_eagerly_for_the_hooks(tmp_path):
    pipe = toy.pipeline(tmp_path)
    plain = generated(pipe).shard(0, OUTPUT).x
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    toy.images(pipe, steps=1)
    assert repeats(generated(pipe).shard(0, OUTPUT).x, plain)


def test_further_arguments_reach_the_pipeline(pipe):
    plain = generated(pipe).shard(0, OUTPUT).x
    other = generated(pipe, call={"negative_prompt": "dog"})
    assert other.settings()["call"] == {"negative_prompt": "dog"}
    assert not torch.equal(other.shard(0, OUTPUT).x, plain)


def test_other_prompts_of_the_same_pipeline_are_as_if_made_anew_and_it_is_fingerprinted_once(
    pipe, monkeypatch
):
    asked = []
    whole = "lbdt.activations.generated.fingerprint"
    monkeypatch.setattr(whole, lambda given: asked.append(given) or {"unet": "0"})
    source = generated(pipe, patches=3)
    part = source.with_prompts(PROMPTS[1:4])
    made = generated(pipe, prompts=PROMPTS[1:4], patches=3, concepts=source.concepts, styles=source.styles)
    assert part.settings() == made.settings() and part.labelled == made.labelled
    for index in range(shard_count(made)):
        for got, expected in zip(part.shard(index, OUTPUT), made.shard(index, OUTPUT), strict=True):
            assert repeats(got, expected)
    assert (source.prompts, part.prompts, len(source.labels()[0])) == (5, 3, 5)
    asked.clear()
    assert source.settings() != part.settings() and source.origin() == source.settings() and not asked
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        source.with_prompts([])
