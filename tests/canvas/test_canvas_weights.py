"""The shipped EmojiCanvas: it paints what is asked, and its eraser removes a concept and little else."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from lbdt import canvas, cli
from lbdt.canvas.generate import PictureRequest, empty_requests, images, pair_requests, shown
from tests.repeats import repeats

CATS = canvas.OBJECTS.index("Cats")
OTHERS = [
    canvas.OBJECTS.index(name) for name in ("Dogs", "Trees", "Birds", "Flowers", "Towers", "Sandwiches")
]
CASES = [
    PictureRequest((concept,), style, 9000 + i)
    for i, (concept, style) in enumerate(
        [(CATS, style) for style in range(6)] + [(concept, style) for style, concept in enumerate(OTHERS)]
    )
]


@pytest.fixture(scope="module")
def pipe():
    return canvas.load_pipeline()


@pytest.fixture(scope="module")
def base(pipe):
    return images(pipe, CASES)


@pytest.fixture(scope="module")
def erased(pipe):
    """The pictures of `CASES` with the cats erased, and the masks of every step."""
    seeds = [case.seed for case in CASES]
    with canvas.load_eraser().attach(pipe, concepts=["Cats"], seed=seeds, keep_masks=True) as attached:
        pictures = images(pipe, CASES)
    return pictures, attached.masks()


def test_all_weights_together_stay_within_60_mb():
    assert sum(path.stat().st_size for path in canvas.WEIGHTS.rglob("*") if path.is_file()) < 60e6


def test_diffusers_loads_the_pipeline_like_any_other(pipe):
    again = StableDiffusionPipeline.from_pretrained(canvas.WEIGHTS / "pipeline", local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        mine, other = (dict(getattr(p, part).named_parameters()) for p in (pipe, again))
        assert all(p.dtype == torch.float32 and torch.equal(p, other[name]) for name, p in mine.items())


def test_the_pipeline_paints_what_the_prompt_says(base):
    objects, styles = canvas.classify(base)
    assert (objects == shown(CASES)).all(1).sum() >= 11
    assert (styles == torch.tensor([case.style for case in CASES])).sum() >= 11


def test_it_paints_pairs_and_scenes_without_an_object(pipe):
    cases = [*pair_requests([9300])[::13], *empty_requests([9300])]
    objects, styles = canvas.classify(images(pipe, cases))
    assert (objects == shown(cases)).all(1).sum() >= len(cases) - 1
    assert (styles == torch.tensor([case.style for case in cases])).sum() >= len(cases) - 1


def test_erasing_cats_removes_cats_and_keeps_other_objects_and_styles(erased):
    objects, styles = canvas.classify(erased[0])
    assert objects[:6, CATS].sum() <= 1
    assert objects[6:][shown(CASES[6:])].sum() >= 5
    assert (styles == torch.tensor([case.style for case in CASES])).sum() >= 10


def test_the_landscape_outside_of_the_cat_stays(base, erased):
    """Object boxes are 48 pixels wide, so half of the picture holds landscape only."""
    change = (erased[0] - base).abs().mean(dim=(1, 2))[:6]  # [cats, columns]
    outside = torch.minimum(change[:, :64].mean(1), change[:, 64:].mean(1))
    assert (outside < 0.5 * change.amax(dim=1)).all()


def test_the_mask_is_found_on_cats_and_hardly_on_others(erased):
    shares = torch.stack([step.detected.float().mean((1, 2)) for step in erased[1]]).mean(0)  # [cases]
    # A cat stands on nine patches of 64.
    assert 9 / 64 >= shares[:6].mean() > 0.04 > 0.01 > shares[6:].mean()


def test_after_removal_the_pipeline_is_what_it_was(pipe):
    """Of a cat and of something else."""
    before = images(pipe, CASES[5:7], steps=12)
    with canvas.load_eraser().attach(pipe, concepts=["Cats"]):
        assert not torch.equal(images(pipe, CASES[5:7], steps=12)[0], before[0])
    assert repeats(images(pipe, CASES[5:7], steps=12), before)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_scheduler_and_number_of_steps(pipe, scheduler):
    import diffusers

    before = pipe.scheduler
    cases = [PictureRequest((CATS,), style, 9100 + style) for style in range(4)]
    pipe.scheduler = getattr(diffusers, scheduler).from_config(before.config)
    try:
        seen = canvas.classify(images(pipe, cases, steps=12))[0]
        with canvas.load_eraser().attach(pipe, concepts=["Cats"]):
            left = canvas.classify(images(pipe, cases, steps=12))[0]
    finally:
        pipe.scheduler = before
    assert seen[:, CATS].sum() >= 3 and left[:, CATS].sum() <= 1


def test_the_main_job(tmp_path):
    prompt = "An image of Dogs and Cats in Sketch style."
    done = CliRunner().invoke(
        cli.app, ["erase", prompt, "--concept", "Cats", "--json", "--out", str(tmp_path / "erase.png")]
    )
    assert done.exit_code == 0, done.output
    verdict = json.loads(done.stdout)["verdict"]
    assert verdict["without"] == {"objects": ["Cats", "Dogs"], "style": "Sketch"}
    assert verdict["with"] == {"objects": ["Dogs"], "style": "Sketch"}
    assert (tmp_path / "erase.png").stat().st_size > 10_000
