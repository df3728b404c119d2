"""EmojiCanvas's artifact judges on unedited generations, planted artifacts, and scenes without an object."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lbdt import canvas
from lbdt.canvas import scenes
from lbdt.canvas.generate import images, object_requests
from lbdt.evaluation.metrics.feature_distances import FeatureJudge
from lbdt.evaluation.worlds.canvas_judges import SEEDS, judge_path
from lbdt.evaluation.worlds.canvas_world import SEEDS as SCORED
from lbdt.evaluation.worlds.canvas_world import SWEEP_SEEDS, CanvasJudge, canvas_world
from tests.repeats import repeats

SEED = 900_000  # nothing else uses it


@pytest.fixture(scope="module")
def pipe():
    return canvas.load_pipeline()


@pytest.fixture(scope="module")
def clean(pipe):
    """Unedited generations of the sdxl sampling: every object in three styles, float32 [60, 3, 128, 128]."""
    cases = [case for case in object_requests([SEED]) if (case.concept + case.style) % 2 == 0]
    sampling = canvas.KINDS["sdxl"]
    return torch.cat(
        [images(pipe, cases[n : n + 20], sampling.steps, sampling.guidance) for n in (0, 20, 40)]
    )


@pytest.fixture(scope="module")
def empty(pipe):
    """Landscapes without an object in every style, through the autoencoder: what a perfect erasure leaves."""
    pictures = []
    for number in range(60):
        drawn = np.random.default_rng(number)
        x, y = scenes.PLACES[number % 2]
        landscape = scenes._landscape(drawn, horizon=y + scenes.BOX - scenes.GRID)
        pictures.append(scenes._stylize(landscape, scenes.STYLES[number % 6]))
    with torch.inference_mode():
        return pipe.vae.decode(pipe.vae.encode(canvas.as_tensor(pictures)).latents).sample.clamp(-1, 1)


def features(pictures, classifier):
    with torch.inference_mode():
        return canvas.classifiers()[classifier].features(pictures).double()


def artifacts(pictures, kind="sdxl"):
    """Share of float [B, 3, 128, 128] in [-1, 1]."""
    judge = FeatureJudge.load(judge_path(canvas.KINDS[kind]))
    return float(judge.artifacts(features(pictures, 1)).double().mean())


def magenta(pictures):
    pictures = pictures.clone()
    pictures[:, :, 32:112] = torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1)
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


@pytest.mark.parametrize(
    ("spoil", "least"),
    [(magenta, 0.95), (noise, 0.95), (shuffled, 0.5)],
    ids=["magenta", "noise", "shuffled"],
)
def test_spoiled_pictures_are_artifacts(clean, spoil, least):
    assert artifacts(spoil(clean)) >= least


@pytest.mark.parametrize("kind", canvas.KINDS)
def test_scenes_without_an_object_are_mostly_no_artifacts(empty, kind):
    assert artifacts(empty, kind) < 0.4


def test_features_of_the_object_classifier_would_know_that_the_object_is_gone(clean, empty):
    """An empty scene is as near to the next unedited generation as those are to each other in the style classifier's
    features, where the judges look; in the object classifier's it is much farther."""
    ratios = []
    for classifier in (0, 1):
        known, given = (features(pictures, classifier) for pictures in (clean, empty))
        between = torch.cdist(known, known).fill_diagonal_(torch.inf).min(dim=1).values.median()
        ratios.append(float(torch.cdist(given, known).min(dim=1).values.median() / between))
    assert ratios[0] > 1.3 and ratios[1] < 1.1


def test_a_sampling_has_a_judge_of_its_own_and_the_world_takes_it():
    world = canvas_world()
    paths = {kind: judge_path(sampling) for kind, sampling in canvas.KINDS.items()}
    assert {path.name for path in paths.values()} == {
        "artifacts-20-3.safetensors",
        "artifacts-4-1.safetensors",
    }
    for kind, path in paths.items():
        judge = FeatureJudge.load(path)
        assert judge.mean.shape == (192,) and torch.equal(world.reference(kind).mean, judge.mean)
    assert not set(SEEDS) & {*SCORED, *SWEEP_SEEDS}


def test_another_pipeline_or_other_erasers_are_judged_by_their_own_pictures():
    world = canvas_world()
    assert canvas_world(pipeline=lambda device: None).reference is None
    assert canvas_world(kinds=dict(world.kinds)).reference is None


def test_the_judge_is_the_two_classifiers_and_the_style_classifiers_features(clean):
    from PIL import Image

    pixels = ((clean[:4] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(part) for part in pixels]
    verdicts = CanvasJudge()(pictures)
    objects, styles = canvas.classify(pictures)
    expected = [
        objects.unsqueeze(1) == torch.arange(20),
        styles,
        features(canvas.as_tensor(pictures), 1).float(),
    ]
    assert repeats([verdicts.objects, verdicts.styles, verdicts.features], expected)
    with pytest.raises(ValueError, match="expects 128 x 128, got 64 x 32"):
        CanvasJudge()([Image.new("RGB", (64, 32))])
