"""What an attachment says of each picture of the pipeline's last call."""

import pytest
import torch

from lbdt import canvas

STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    return canvas.load_pipeline()


def call(pipe, prompts, **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(prompts, generator=generators, num_inference_steps=STEPS, **settings)


def test_each_picture_has_its_own_counts_step_by_step(pipe):
    prompts = [canvas.prompt([name], "Photo") for name in ("Cats", "Dogs", "Cats")]
    sets = [["Cats"], ["Cats"], []]
    with canvas.load_eraser().attach(pipe, concepts=sets, keep_masks=True) as attached:
        with pytest.raises(
            ValueError, match="no call of the pipeline under this attachment is kept; call it before"
        ):
            attached.pictures()
        call(pipe, prompts, guidance_scale=3.0)
        before = len(attached.masks())
        call(pipe, prompts[::-1], guidance_scale=1.0)
        call(pipe, prompts, guidance_scale=1.0)
        masks, report = attached.masks()[2 * before :], attached.pictures()
    assert len(report) == 3 and len(masks) == STEPS
    for image, picture in enumerate(report):
        assert picture.timesteps == tuple(mask.timestep for mask in masks)
        assert picture.detected == tuple(int(mask.detected[image].sum()) for mask in masks)
        assert picture.replaced == tuple(int(mask.replaced[image].sum()) for mask in masks)
    assert sum(report[0].replaced) > 0
    assert sum(report[2].detected) == sum(report[2].replaced) == 0 and not any(report[2].gated)


def test_counts_are_over_the_guidance_branches_and_the_gate_says_what_it_left(pipe):
    with canvas.load_eraser().attach(pipe, concepts=["Cats"]) as attached:
        call(pipe, [canvas.prompt(["Cats"], "Photo")], guidance_scale=3.0)
        whole, (picture,) = attached.report(), attached.pictures()
    patches = [step.patches for step in whole.steps]
    assert picture.detected == tuple(round(s.detected * n) for s, n in zip(whole.steps, patches, strict=True))
    assert picture.replaced == tuple(round(s.replaced * n) for s, n in zip(whole.steps, patches, strict=True))
    with canvas.load_eraser(min_patches=10_000).attach(pipe, concepts=["Cats"]) as attached:
        call(pipe, [canvas.prompt(["Cats"], "Photo")], guidance_scale=3.0)
        (left,) = attached.pictures()
    assert any(left.gated) and sum(left.replaced) == 0


def test_another_attachment_to_compiled_code_ends_what_can_be_said(pipe):
    attached = canvas.load_eraser().attach(pipe, concepts=["Cats"])
    call(pipe, [canvas.prompt(["Cats"], "Photo")])
    attached.remove()
    assert len(attached.pictures()) == 1
    attached.keep_calls()
    with pytest.raises(ValueError, match="no call of the pipeline"):
        attached.pictures()
