"""EmojiCanvas's artifact judges on unedited generations, planted artifacts, and scenes without an object."""

from __future__ import annotations

import pytest
import torch

from lbdt import canvas
from lbdt.canvas import scenes
from lbdt.canvas.generate import empty_requests, images, object_requests, pair_requests
from lbdt.evaluation.metrics.feature_distances import DirectionJudge
from lbdt.evaluation.worlds.canvas_judges import SEEDS, judge_path, unedited_prompts
from lbdt.evaluation.worlds.canvas_world import SEEDS as SCORED
from lbdt.evaluation.worlds.canvas_world import SWEEP_SEEDS, CanvasJudge, canvas_world
from tests.repeats import repeats

SEED = 900_000  # nothing else uses it


@pytest.fixture(scope="module")
def pipe():
    return canvas.load_pipeline()


@pytest.fixture(scope="module")
def clean(pipe):
    """Unedited generations of the sdxl sampling: objects, pairs and empty scenes in all styles, float32 [60, 3, 128,
    128]."""
    cases = [*object_requests([SEED])[::4], *pair_requests([SEED])[2::5], *empty_requests([SEED])]
    sampling = canvas.KINDS["sdxl"]
    return torch.cat(
        [images(pipe, cases[n : n + 20], sampling.steps, sampling.guidance) for n in (0, 20, 40)]
    )


@pytest.fixture(scope="module")
def empty(pipe):
    """Landscapes without an object in every style, through the autoencoder: what a perfect erasure leaves."""
    pictures = [scenes.render((), scenes.STYLES[number % 6], number) for number in range(60)]
    with torch.inference_mode():
        return pipe.vae.decode(pipe.vae.encode(canvas.as_tensor(pictures)).latents).sample.clamp(-1, 1)


def features(pictures, classifier="fault"):
    with torch.inference_mode():
        return canvas.classifiers()[classifier].features(pictures).double()


def artifacts(pictures, kind="sdxl"):
    """Share of float [B, 3, 128, 128] in [-1, 1]."""
    judge = DirectionJudge.load(judge_path(canvas.KINDS[kind]))
    return float(judge.artifacts(features(pictures)).double().mean())


def block(pictures):
    """A green block as large as an object; in Neon, magenta is a colour of the style."""
    pictures = pictures.clone()
    box = pictures[:, :, scenes.FLOOR - scenes.BOX : scenes.FLOOR, 40 : 40 + scenes.BOX]
    box.copy_(torch.tensor([-1.0, 1.0, -1.0]).view(1, 3, 1, 1))
    return pictures


def noise(pictures):
    pictures = pictures.clone()
    drawn = torch.rand(pictures[:, :, 32:112].shape, generator=torch.Generator().manual_seed(0))
    pictures[:, :, 32:112] = 2 * drawn - 1
    return pictures


def shuffled(pictures):
    """The 64 patches in another order."""
    patches = pictures.unflatten(3, (8, 16)).unflatten(2, (8, 16)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    patches = patches[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    return patches.unflatten(1, (8, 8)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def test_few_unedited_generations_are_artifacts(clean):
    assert artifacts(clean) <= 0.05


@pytest.mark.parametrize("spoil", [block, noise, shuffled], ids=["block", "noise", "shuffled"])
def test_spoiled_pictures_are_artifacts(clean, spoil):
    assert artifacts(spoil(clean)) >= 0.9


@pytest.mark.parametrize("kind", canvas.KINDS)
def test_scenes_without_an_object_are_no_artifacts(empty, kind):
    assert artifacts(empty, kind) <= 0.05


def test_a_sampling_has_a_judge_of_its_own_and_the_world_takes_it():
    world = canvas_world()
    paths = {kind: judge_path(sampling) for kind, sampling in canvas.KINDS.items()}
    assert {path.name for path in paths.values()} == {
        "artifacts-20-3.safetensors",
        "artifacts-4-1.safetensors",
    }
    for kind, path in paths.items():
        judge = DirectionJudge.load(path)
        assert judge.direction.shape == (192,)
        assert torch.equal(world.reference(kind).direction, judge.direction)
    assert not set(SEEDS) & {*SCORED, *SWEEP_SEEDS}


def test_another_pipeline_or_other_erasers_are_judged_by_their_own_pictures():
    world = canvas_world()
    assert canvas_world(pipeline=lambda device: None).reference is None
    assert canvas_world(kinds=dict(world.kinds)).reference is None


def test_a_judge_is_fitted_to_objects_pairs_and_empty_scenes():
    prompts = unedited_prompts(SEEDS)
    assert len(prompts) == 3 * (140 + 140 + 35) == len({prompt.seed for prompt in prompts})
    assert sum(" and " in prompt.text for prompt in prompts) == 420
    assert sum(prompt.concept is None for prompt in prompts) == 105


def test_the_judge_is_the_classifiers_and_the_fault_classifiers_features(clean):
    from PIL import Image

    pixels = ((clean[:4] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(part) for part in pixels]
    verdicts = CanvasJudge()(pictures)
    objects, styles = canvas.classify(pictures)
    expected = [objects, styles, features(canvas.as_tensor(pictures)).float()]
    assert repeats([verdicts.objects, verdicts.styles, verdicts.features], expected)
    with pytest.raises(ValueError, match="expects 128 x 128, got 64 x 32"):
        CanvasJudge()([Image.new("RGB", (64, 32))])
