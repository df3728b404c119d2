"""Start noise that pictures draw in turn from one generator, as the published scripts do."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from lbdt.activations.prompts import Prompt
from lbdt.evaluation.generation import generate
from lbdt.evaluation.start_noise import RunNoise
from lbdt.evaluation.worlds import unlearncanvas as uc
from lbdt.evaluation.worlds.unlearncanvas import OBJECTS, PHOTO, THEMES, run_noise
from tests import toy
from tests.evaluation import small
from tests.repeats import repeats


def pipe_of(shape=(4, 8, 8), dtype=torch.float32):
    channels, height, width = shape
    size = height if height == width else (height, width)
    config = SimpleNamespace(in_channels=channels, sample_size=size)
    return SimpleNamespace(unet=SimpleNamespace(config=config, dtype=dtype))


CALLS = [["a", "b", "p"], ["c", "d", "p"]]
"""Two calls; "p" is asked for in both, as the published scripts ask for objects without a style."""


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((4, 64, 64), torch.float32, id="sd15"),
        pytest.param((4, 64, 64), torch.float16, id="sd15-half"),
        pytest.param(
            (3, 5, 7), torch.float32, id="odd-and-not-square"
        ),  # no multiple of 16: a call's draw is one
        pytest.param((1, 1, 1), torch.float64, id="one-value"),
    ],
)
def test_a_picture_takes_its_place_in_the_draws_of_one_generator(shape, dtype):
    generator = torch.Generator().manual_seed(188)
    first, second = (torch.randn(3, *shape, generator=generator, dtype=dtype) for _ in CALLS)
    wanted = {"a": first[0], "b": first[1], "c": second[0], "d": second[1], "p": second[2]}
    got = RunNoise(CALLS).latents(pipe_of(shape, dtype), [Prompt(text, seed=188) for text in wanted])
    assert got.dtype == dtype and got.device.type == "cpu"
    assert torch.equal(got, torch.stack(list(wanted.values())))


def test_it_depends_on_seed_and_place_alone():
    noise, pipe = RunNoise(CALLS), pipe_of()
    prompts = [Prompt(text, seed=seed) for seed in (2, 1) for text in ("p", "a", "d", "a")]
    torch.manual_seed(99)
    together = noise.latents(pipe, prompts)
    alone = torch.cat([noise.latents(pipe, [prompt]) for prompt in reversed(prompts)]).flip(0)
    assert torch.equal(together, alone) and torch.equal(together[1], together[3])
    assert len({tuple(row.flatten().tolist()) for row in together}) == 6


def test_donors_are_drawn_by_another_seed_for_each_picture():
    noise = RunNoise(CALLS)
    seeds = [noise.donor_seed(Prompt(text, seed=seed)) for seed in (0, 1, 188) for text in "abcdp"]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert 0 <= noise.donor_seed(Prompt("p", seed=2**63 - 1)) < 2**63


def test_a_prompt_of_another_run_is_refused():
    with pytest.raises(ValueError, match="'x' is not in the run whose noise it should draw"):
        RunNoise(CALLS).latents(pipe_of(), [Prompt("x")])
    with pytest.raises(ValueError, match="calls: expected one prompt or more"):
        RunNoise([])


def test_the_published_script_draws_theme_by_theme_the_plain_prompts_each_time():
    """Its loop, once more: 40 prompts a call, whose plain pictures every call writes over."""
    pipe, generator, wanted = pipe_of((1, 2, 2)), torch.Generator().manual_seed(188), {}
    for theme in [theme for theme in THEMES if theme != PHOTO]:
        drawn = torch.randn(40, 1, 2, 2, generator=generator)
        for place, thing in enumerate(OBJECTS):
            wanted[thing, theme], wanted[thing, None] = drawn[place], drawn[20 + place]
    rows = uc.prompts(188)
    got = run_noise().latents(pipe, rows)
    assert len(rows) == len(wanted) == 1020
    assert torch.equal(got, torch.stack([wanted[row.concept, row.style] for row in rows]))
    assert len({tuple(row.flatten().tolist()) for row in got}) == 1020
    swapped = [*uc.prompts(188, "style"), *uc.unstyled(188)]
    again = torch.stack([wanted[row.style, row.concept] for row in swapped])
    assert torch.equal(run_noise().latents(pipe, swapped), again)


def test_the_official_script_draws_one_picture_a_call_photographs_among_them():
    pipe, generator = pipe_of((1, 4, 4)), torch.Generator().manual_seed(1)
    wanted = {(o, t): torch.randn(1, 1, 4, 4, generator=generator)[0] for t in THEMES for o in OBJECTS}
    rows = uc.prompts(1, "object", "official")
    got = run_noise("official").latents(pipe, rows)
    assert torch.equal(got, torch.stack([wanted[row.concept, row.style] for row in rows]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def drawing(world):
    """The small world, whose prompts of a seed all carry it, and draw in turn."""
    texts = [prompt.text for prompt in world.prompts(1)]

    def prompts(seed):
        return [dataclasses.replace(prompt, seed=seed) for prompt in world.prompts(seed)]

    return dataclasses.replace(
        world, prompts=prompts, noise=RunNoise([texts[:4], texts[4:]]), pairs=None, empty=None
    )


@pytest.mark.parametrize("method", ["base", "negative", "uce", "steering", "per"])
def test_every_method_starts_from_the_picture_s_noise_in_any_batch(folder, tmp_path, method):
    world = drawing(small.world(folder, kinds={"toy": small.kind(guidance=3.0)}))
    run = small.evaluation(tmp_path, world)
    series = {each.method: each for each in run.plans["toy"].scored(-1.0)}[method]
    jobs = series.jobs[:5]
    editors = series.editors()
    pictures, tensors, _ = generate(run.pipe, series, editors, jobs, None, world.noise)
    alone = [generate(run.pipe, series, editors, [job], None, world.noise)[0][0] for job in jobs]
    assert repeats(pictures, alone)
    assert tensors["seeds"].tolist() == [world.noise.donor_seed(job.prompt) for job in jobs]
    if method == "base":
        call = {"num_inference_steps": 2, "guidance_scale": 3.0}
        for job, picture in zip(jobs, pictures, strict=True):
            latents = world.noise.latents(run.pipe, [job.prompt])
            assert repeats(run.pipe(job.prompt.text, latents=latents, **call).images[0], picture)


def test_a_folder_of_the_other_noise_is_refused(folder, tmp_path):
    world = drawing(small.world(folder, sweep_seeds=()))
    run = small.evaluation(tmp_path, world, seeds=(1,), concepts=(toy.CONCEPTS[0],))
    (series,) = [each for each in run.plans["toy"].scored(None) if each.method == "base"]
    run.make("base", [series])
    assert json.loads((tmp_path / series.name / "series.json").read_text())["noise"] == "run"
    assert run.about()["noise"] == "run"
    other = small.evaluation(
        tmp_path, dataclasses.replace(world, noise=None), seeds=(1,), concepts=(toy.CONCEPTS[0],)
    )
    assert other.about()["noise"] == "prompt"
    with pytest.raises(ValueError, match="noise differ"):
        other.make("base", [series])
