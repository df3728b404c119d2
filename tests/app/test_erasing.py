"""A picture as it emerges: its events, its masks, cancelling it, and visitors at the same time."""

import itertools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lbdt.app.drawing import draw
from lbdt.app.erasing import EmergingStep, ErasedPicture, PatchMask, emerge, overlay
from lbdt.app.previews import CHEAP, Previews
from lbdt.app.settings import PictureSettings
from lbdt.app.streaming import Waiting, turns_of
from lbdt.editors import Steering
from tests import toy
from tests.repeats import repeats

STEPS = 3
ASKED = PictureSettings("a cat", ("Cats",), model="pipe", eraser="eraser", steps=STEPS, guidance=3, seed=5)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


def never() -> bool:
    return False


def pictures_of(pipe, editor, settings):
    """The pictures without and with, and the masks, as a script of one's own would make them."""
    made = settings.resolved(editor, pipe)

    def image():
        generator = torch.Generator().manual_seed(made.seed)
        return pipe(
            made.prompt, num_inference_steps=made.steps, guidance_scale=made.guidance, generator=generator
        ).images[0]

    without = image()
    with made.applied(editor).attach(pipe, list(made.concepts), seed=made.seed, keep_masks=True) as attached:
        return without, image(), attached.masks()


@pytest.mark.parametrize(
    ("settings", "steered"),
    [
        ({}, False),
        ({"padding": 0, "source": "mean", "avoid": "known", "concepts": ("Cats", "Dogs")}, False),
        ({"min_patches": 16}, False),
        ({"guidance": 1}, False),
        ({"method": "steering", "strength": -3.0}, True),
    ],
    ids=["defaults", "all", "gated", "no-guidance", "steering"],
)
def test_the_events_are_those_of_both_pictures(pipe, settings, steered):
    editor = toy.eraser(bank=True)
    editor = Steering.from_eraser(editor, strength=-1.0) if steered else editor
    asked = replace(ASKED, **settings)
    without, erased, masks = pictures_of(pipe, editor, asked)
    *steps, last = emerge(pipe, editor, asked, cancelled=never)
    assert [(e.half, e.step, e.steps) for e in steps] == [
        (half, step, STEPS) for half in ("without", "with") for step in range(STEPS)
    ]
    times = [mask.timestep for mask in masks]
    assert [e.timestep for e in steps] == times + times
    assert all(e.mask is None for e in steps[:STEPS])
    for event, mask in zip(steps[STEPS:], masks, strict=True):
        assert repeats(event.mask.detected, mask.detected[0])
        assert repeats(event.mask.replaced, mask.replaced[0])
        assert event.mask.counts() == tuple(int(m.sum()) for m in (event.mask.detected, event.mask.replaced))
    assert all(e.preview.size == (16, 16) and e.preview.mode == "RGB" for e in steps)
    for half in (steps[:STEPS], steps[STEPS:]):
        assert 0 < half[0].seconds < half[1].seconds < half[2].seconds
    assert isinstance(last, ErasedPicture) and last.seconds_with >= steps[-1].seconds
    assert repeats(last.without, without) and repeats(last.erased, erased)
    assert last.settings == asked.resolved(editor, pipe)
    assert len(last.report.steps) == STEPS
    assert toy.traces(pipe) == []
    assert (last.without.tobytes() != last.erased.tobytes()) == (asked.min_patches is None)


def test_the_last_preview_is_the_picture(pipe):
    *steps, last = emerge(pipe, toy.eraser(), ASKED, cancelled=never)
    assert repeats(steps[STEPS - 1].preview, last.without) and repeats(steps[-1].preview, last.erased)


@pytest.mark.parametrize(
    ("every", "shown"),
    [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2, 3]), (9, [0, 3])],
    ids=["none", "all", "2", "9"],
)
def test_previews_come_as_often_as_asked_and_at_the_end(pipe, every, shown):
    events = list(emerge(pipe, toy.eraser(), replace(ASKED, steps=4), cancelled=never, preview_every=every))
    assert [e.step for e in events[:4] if e.preview is not None] == shown


@pytest.mark.parametrize("ended", ["cancelled", "closed"])
@pytest.mark.parametrize("after", range(2 * STEPS))
def test_a_picture_that_is_given_up_leaves_the_pipeline_as_it_was(pipe, after, ended):
    made = ASKED.resolved(toy.eraser(), pipe)
    before, _ = draw(pipe, made)
    asked = itertools.count()  # once before the first step, then after each
    events = emerge(pipe, toy.eraser(), ASKED, cancelled=lambda: ended == "cancelled" and next(asked) > after)
    seen = list(itertools.islice(events, after))
    if ended == "closed":
        events.close()
    assert list(events) == [] and [e.step for e in seen] == [place % STEPS for place in range(after)]
    assert toy.traces(pipe) == []
    assert repeats(draw(pipe, made)[0], before)
    *_, last = emerge(pipe, toy.eraser(), ASKED, cancelled=never, preview_every=0)
    assert repeats(last.without, before)


def test_one_that_is_cancelled_from_the_start_has_no_event(pipe):
    assert list(emerge(pipe, toy.eraser(), ASKED, cancelled=lambda: True)) == []


def test_visitors_at_the_same_time_never_mix(pipe):
    asked = [
        replace(ASKED, seed=seed, prompt=prompt, concepts=(concept,))
        for seed, prompt, concept in ((1, "a cat", "Cats"), (2, "dogs", "Dogs"), (3, "ab", "Trees"))
    ]
    editor = toy.eraser()
    expected = [pictures_of(pipe, editor, settings) for settings in asked]
    found = [[] for _ in asked]
    threads = [
        threading.Thread(
            target=lambda place=place: found[place].extend(
                emerge(pipe, editor, asked[place], cancelled=never)
            )
        )
        for place in range(len(asked))
    ]
    with turns_of(pipe).turn(never):  # so that all of them have to wait
        for thread in threads:
            thread.start()
        while not all(found):
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    for events, (without, erased, masks) in zip(found, expected, strict=True):
        assert isinstance(events[0], Waiting)
        steps = [event for event in events if isinstance(event, EmergingStep)]
        assert len(steps) == 2 * STEPS
        assert repeats(events[-1].without, without) and repeats(events[-1].erased, erased)
        assert repeats([e.mask.detected for e in steps[STEPS:]], [m.detected[0] for m in masks])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"concepts": ("cat",)}, ValueError, "did you mean 'Cats'"),
        ({"method": "steering"}, TypeError, "takes an editor of kind steering"),
        ({"digest": "0" * 64}, ValueError, "of another eraser"),
    ],
    ids=["concept", "method", "digest"],
)
def test_what_cannot_be_made_is_refused_at_once(pipe, change, kind, message):
    with pytest.raises(kind, match=message):
        emerge(pipe, toy.eraser(), replace(ASKED, **change), cancelled=never)


@pytest.mark.parametrize("every", [-1, True, 1.0], ids=str)
def test_a_bad_number_of_previews_is_refused_at_once(pipe, every):
    with pytest.raises(ValueError, match="preview_every: expected a whole number >= 0"):
        emerge(pipe, toy.eraser(), ASKED, cancelled=never, preview_every=every)


def test_an_error_within_the_pipeline_reaches_the_visitor_and_frees_it(pipe):
    wrong = toy.eraser(hookpoint="unet.up_blocks.9")
    events = emerge(pipe, wrong, ASKED, cancelled=never)
    with pytest.raises(ValueError, match=r"unet\.up_blocks\.9"):
        list(events)
    assert len(list(emerge(pipe, toy.eraser(), ASKED, cancelled=never))) == 2 * STEPS + 1


def test_the_progress_bar_is_what_it_was(tmp_path):
    own = toy.pipeline(tmp_path)
    own.set_progress_bar_config(desc="mine", disable=True)
    list(emerge(own, toy.eraser(), ASKED, cancelled=never))
    assert own._progress_bar_config == {"desc": "mine", "disable": True}


def mask_of(height: int, width: int, detected=(), replaced=()) -> PatchMask:
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    for number, places in enumerate((detected, replaced)):
        for place in places:
            masks[number][place] = True
    return PatchMask(*masks)


def test_an_overlay_is_red_where_detected_and_amber_where_padded():
    grey = Image.new("RGB", (50, 30), (100, 100, 100))
    made = overlay(grey, mask_of(3, 5, detected=[(1, 2)], replaced=[(1, 2), (1, 3)]))
    assert made.size == grey.size and grey.getpixel((25, 15)) == (100, 100, 100)
    red, amber, left = (made.getpixel(place) for place in ((25, 15), (35, 15), (5, 5)))
    assert red[0] > 120 and red[1] < 90 and amber[0] > 120 and amber[1] > 110 > amber[2]
    assert left == (100, 100, 100)


@pytest.mark.parametrize("mask", [None, mask_of(4, 4)], ids=["none", "empty"])
def test_without_a_mask_the_picture_stays(mask):
    picture = Image.new("L", (8, 8), 7)
    made = overlay(picture, mask)
    assert made.mode == "RGB" and made.getcolors() == [(64, (7, 7, 7))]


def test_a_full_mask_covers_the_picture():
    everywhere = [(row, column) for row in range(2) for column in range(3)]
    made = overlay(Image.new("RGB", (30, 20)), mask_of(2, 3, everywhere, everywhere))
    assert len(made.getcolors()) == 1 and made.getpixel((0, 0))[0] > 60


class LinearVae(nn.Module):
    """An autoencoder of one colour a latent: channels are a known mixture of the colours, `factor` pixels a side."""

    def __init__(self, channels: int, factor: int, cheap: bool, bad: bool = False) -> None:
        super().__init__()
        self.decoder = nn.Linear(1, 1)
        if not cheap:
            self.decoder.extra = nn.Parameter(torch.empty(CHEAP, device="meta"))
        self.mix = nn.Parameter(torch.randn(channels, 3, generator=torch.Generator().manual_seed(0)))
        self.factor, self.bad = factor, bad
        blocks = (1,) * (1 + factor.bit_length() - 1)
        self.config = SimpleNamespace(scaling_factor=0.25, shift_factor=0.5, block_out_channels=blocks)

    def encode(self, x):
        if self.bad:
            raise NotImplementedError
        small = nn.functional.avg_pool2d(x, self.factor)
        return SimpleNamespace(latents=torch.einsum("lc,bchw->blhw", self.mix, small) + 1)

    def decode(self, z, return_dict):
        return (torch.einsum("lc,blhw->bchw", torch.linalg.pinv(self.mix).t(), z - 1),)


class Pipe:
    """What previews need of a pipeline."""

    def __init__(self, vae) -> None:
        self.vae = vae


def latents_of(vae, pixels):
    """The latents as a denoiser has them, of colours in [-1, 1]."""
    return (torch.einsum("lc,bchw->blhw", vae.mix, pixels) + 1 - 0.5) * 0.25


@pytest.mark.parametrize("cheap", [True, False], ids=["decoded", "linear"])
@pytest.mark.parametrize("channels", [4, 16])
def test_a_preview_has_the_colours_of_the_latents(cheap, channels):
    vae = LinearVae(channels, 8, cheap)
    pixels = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    pipe = Pipe(vae)
    made = Previews(pipe).of(latents_of(vae, pixels).detach())
    assert made.size == (7, 5)
    wanted = ((pixels[0] / 2 + 0.5) * 255).permute(1, 2, 0)
    found = torch.from_numpy(np.array(made))
    assert (found - wanted).abs().max() < 2


@pytest.mark.parametrize(
    ("vae", "latents"),
    [
        (None, torch.zeros(1, 4, 2, 2)),
        (LinearVae(4, 8, cheap=False, bad=True), torch.zeros(1, 4, 2, 2)),
        (LinearVae(4, 8, cheap=False), torch.zeros(1, 64, 16)),
        (LinearVae(4, 8, cheap=False), torch.zeros(1, 5, 2, 2)),
        (LinearVae(4, 8, cheap=False), None),
    ],
    ids=["no-vae", "no-encoder", "packed", "channels", "no-latents"],
)
def test_where_latents_cannot_be_shown_there_is_no_preview(vae, latents):
    pipe = Pipe(vae)
    assert Previews(pipe).of(latents) is None


def test_latents_that_are_not_finite_are_grey():
    vae = LinearVae(4, 8, cheap=False)
    pipe = Pipe(vae)
    assert Previews(pipe).of(torch.full((1, 4, 2, 2), torch.nan)).getcolors() == [(4, (128, 128, 128))]
