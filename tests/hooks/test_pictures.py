"""What an attachment says of each picture of the pipeline's last call."""

import pytest
import torch

from lbdt import canvas
from lbdt.editors import UnprotectedError

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


def test_a_call_that_ended_by_an_error_has_no_pictures(pipe):
    def broken_off(pipe, step, timestep, kwargs):
        if step:
            raise KeyboardInterrupt
        return kwargs

    with canvas.load_eraser().attach(pipe, concepts=["Cats"]) as attached:
        call(pipe, ["a"])
        with pytest.raises(KeyboardInterrupt):
            call(pipe, ["a", "b"], callback_on_step_end=broken_off)
        with pytest.raises(ValueError, match="no call of the pipeline"):
            attached.pictures()
        call(pipe, ["a"])
        unet = pipe.unet
        try:
            pipe.unet = canvas.load_pipeline().unet
            with pytest.raises(UnprotectedError):
                call(pipe, ["a"])
        finally:
            pipe.unet = unet
        with pytest.raises(ValueError, match="no call of the pipeline"):
            attached.pictures()


def test_what_the_denoiser_does_after_a_call_is_not_in_it(pipe):
    with canvas.load_eraser().attach(pipe, concepts=["Cats"]) as attached:
        call(pipe, [canvas.prompt(["Cats"], "Photo")] * 2, guidance_scale=3.0)
        before = attached.pictures()
        size, width = pipe.unet.config.sample_size, pipe.unet.config.cross_attention_dim
        with torch.no_grad():
            pipe.unet(
                torch.zeros(1, pipe.unet.config.in_channels, size, size), 500, torch.zeros(1, 24, width)
            )
        assert attached.pictures() == before and len(before) == 2


def test_pictures_of_a_switched_off_attachment_say_that_nothing_was_done(pipe):
    with canvas.load_eraser().attach(pipe, concepts=["Cats"]) as attached:
        attached.set(enabled=False)
        call(pipe, [canvas.prompt(["Cats"], "Photo")])
        (picture,) = attached.pictures()
    assert picture.detected == picture.replaced == (0,) * STEPS and not any(picture.gated)


def test_pictures_do_not_depend_on_where_the_ring_begins_anew(pipe):
    with canvas.load_eraser().attach(pipe, concepts=["Cats"]) as attached:
        call(pipe, [canvas.prompt(["Cats"], "Photo")] * 3, guidance_scale=3.0)
        expected, size = attached.pictures(), len(attached._recorder.rows)
        attached._recorder.written[0] = 5 * size - 7
        call(pipe, [canvas.prompt(["Cats"], "Photo")] * 3, guidance_scale=3.0)
        assert [p.timesteps for p in attached.pictures()] == [p.timesteps for p in expected]
        assert [sum(p.replaced) > 0 for p in attached.pictures()] == [True] * 3


def test_another_attachment_to_compiled_code_ends_what_can_be_said(pipe):
    attached = canvas.load_eraser().attach(pipe, concepts=["Cats"])
    call(pipe, [canvas.prompt(["Cats"], "Photo")])
    attached.remove()
    assert len(attached.pictures()) == 1
    attached.keep_calls()
    with pytest.raises(ValueError, match="no call of the pipeline"):
        attached.pictures()
