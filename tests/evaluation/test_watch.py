"""Watching a block under an eraser or a steering baseline."""

import pytest
import torch

from lbdt import canvas
from lbdt.activations.capture import find_module
from lbdt.canvas.generate import PictureRequest, images
from lbdt.editors import Steering
from lbdt.evaluation.block_watch import BlockWatch
from lbdt.evaluation.metrics.activation_shift import WatchedRows, compare_settings
from lbdt.hooks.feature_maps import tensor_of
from tests import toy
from tests.repeats import matches, repeats

SEEDS = (0, 1)  # toy.images starts its pictures from these


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


def watched(
    pipe, seeds=SEEDS, prompts=("cat", "dog"), steps=3, first=0, guidance=4.0, **settings
) -> torch.Tensor:
    with BlockWatch(pipe, toy.HOOKPOINT, seeds, **settings) as watch:
        toy.images(pipe, prompts, steps=steps, seed=first, guidance=guidance)
    return watch.rows()


def returned(pipe, **call) -> list[torch.Tensor]:
    """What the UNet's later layers got from the block: [B, d, H, W] of every call."""
    seen = []
    block = find_module(pipe, toy.HOOKPOINT)
    handle = block.register_forward_hook(lambda module, args, output: seen.append(tensor_of(output).clone()))
    toy.images(pipe, **call)
    handle.remove()
    return seen


def test_all_rows_are_the_conditional_half_by_picture_timestep_and_patch(pipe):
    calls = torch.stack([x[2:].flatten(2).transpose(1, 2) for x in returned(pipe)], dim=1)  # [P, T, N, d]
    rows = watched(pipe, patches=None)
    assert rows.dtype == torch.float32 and tuple(rows.shape) == (2 * 3 * 16, toy.WIDTH)
    assert repeats(rows, calls.flatten(0, 2))
    assert repeats(watched(pipe, patches=99), rows)


def test_without_guidance_the_only_half_is_watched(pipe):
    (x,) = returned(pipe, steps=1, guidance=1.0)
    assert repeats(
        watched(pipe, steps=1, guidance=1.0, patches=None), x.flatten(2).transpose(1, 2).flatten(0, 1)
    )


def test_some_rows_are_a_subset_drawn_by_picture_and_timestep(pipe):
    whole = watched(pipe, patches=None).view(2, 3, 16, -1)
    some = watched(pipe, patches=5).view(2, 3, 5, -1)
    places = matches(some.unsqueeze(3), whole.unsqueeze(2)).all(-1).nonzero()[:, 3].view(2, 3, 5)
    assert (places.diff(dim=2) > 0).all()
    assert len({tuple(p) for p in places.flatten(0, 1).tolist()}) == 6
    assert repeats(watched(pipe, patches=5).view_as(some), some)


def test_the_patches_of_a_picture_do_not_depend_on_its_batch(pipe):
    both = watched(pipe, patches=3, steps=2)
    alone = [watched(pipe, (i,), (text,), 2, first=i, patches=3) for i, text in enumerate(("cat", "dog"))]
    swapped = watched(pipe, (1, 0), patches=16, steps=2)
    drawn_swapped = watched(pipe, (1, 0), patches=3, steps=2)

    def places(some, whole):
        return (
            matches(some.view(2, 2, 3, 1, -1), whole.view(2, 2, 1, 16, -1))
            .all(-1)
            .nonzero()[:, 3]
            .view(2, -1)
        )

    of_both = places(both, watched(pipe, patches=None, steps=2))
    assert torch.equal(places(drawn_swapped, swapped), of_both.flip(0))
    for i in range(2):
        whole = watched(pipe, (i,), (("cat", "dog")[i],), 2, first=i, patches=None).view(2, 16, -1)
        at = matches(alone[i].view(2, 3, 1, -1), whole.unsqueeze(1)).all(-1).nonzero()[:, 2]
        assert torch.equal(at, of_both[i])


@pytest.mark.parametrize(
    ("timesteps", "kept"), [(None, [0, 1, 2]), (1, [1]), ([667, 1], [0, 2])], ids=["all", "one", "named"]
)
def test_chosen_timesteps(pipe, timesteps, kept):
    whole = watched(pipe, patches=None).view(2, 3, 16, -1)
    pipe.scheduler.set_timesteps(3)
    assert pipe.scheduler.timesteps.tolist() == [667, 334, 1]
    rows = watched(pipe, patches=None, timesteps=timesteps).view(2, len(kept), 16, -1)
    assert repeats(rows, whole[:, kept])


@pytest.mark.parametrize("first", ["edit", "watch"])
@pytest.mark.parametrize("method", ["per", "steering"])
def test_the_edit_is_seen_whichever_was_put_on_first(pipe, method, first):
    if method == "per":
        editor, settings = (
            toy.eraser(threshold=0.01, update=True, target="update", padding=0),
            {"seed": list(SEEDS)},
        )
    else:
        editor, settings = Steering.from_eraser(toy.eraser(threshold=0.01, update=True), strength=-20.0), {}
    base = watched(pipe, patches=None)
    if first == "edit":
        with editor.attach(pipe, ["Cats"], **settings):
            rows = watched(pipe, patches=None)
            after = torch.stack([x[2:].flatten(2).transpose(1, 2) for x in returned(pipe)], dim=1)
        assert repeats(rows, after.flatten(0, 2))
    else:
        with (
            BlockWatch(pipe, toy.HOOKPOINT, SEEDS, patches=None) as watch,
            editor.attach(pipe, ["Cats"], **settings),
        ):
            toy.images(pipe)
        rows = watch.rows()
    assert editor.report().replaced > 0
    assert not torch.equal(rows.view(2, 3, -1)[:, 0], base.view(2, 3, -1)[:, 0])
    assert repeats(watched(pipe, patches=None), base)


def test_nothing_is_left_and_nothing_changed(pipe):
    before = toy.images(pipe)
    block = find_module(pipe, toy.HOOKPOINT)
    with BlockWatch(pipe, toy.HOOKPOINT, SEEDS) as watch:
        assert block._forward_hooks
        assert repeats(toy.images(pipe), before)
    with pytest.raises(ZeroDivisionError), BlockWatch(pipe, toy.HOOKPOINT, SEEDS):
        raise ZeroDivisionError
    for module in (block, pipe.unet):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert toy.traces(pipe) == []
    kept = watch.rows()
    toy.images(pipe)
    assert torch.equal(watch.rows(), kept)


def test_a_watch_can_be_entered_again(pipe):
    watch = BlockWatch(pipe, toy.HOOKPOINT, SEEDS)
    for steps in (3, 2):
        with watch:
            toy.images(pipe, steps=steps)
        assert len(watch.rows()) == 2 * steps * 8


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"hookpoint": "unet.up_blocks.9"}, ValueError, "site: no module 'unet.up_blocks.9'"),
        (
            {"hookpoint": "text_encoder.layers.0"},
            ValueError,
            "hookpoint: expected a block of the unet or transformer",
        ),
        ({"hookpoint": 3}, TypeError, "hookpoint: expected a name"),
        ({"seeds": []}, TypeError, "seed: expected an integer, or one per"),
        ({"seeds": [0.5]}, TypeError, "seed: expected integers, got 0.5"),
        ({"patches": 0}, ValueError, "patches: expected an integer >= 1, or None for all, got 0"),
        ({"seeds": [1, 2, 3]}, ValueError, "for 3 images"),
        ({"timesteps": [5]}, ValueError, "timesteps: expected some of 667, 334, 1"),
    ],
    ids=["block", "text", "name", "no seeds", "float", "patches", "pictures", "timesteps"],
)
def test_bad_arguments_are_refused(pipe, given, error, text):
    arguments = {"hookpoint": toy.HOOKPOINT, "seeds": SEEDS} | given
    with pytest.raises(error, match=text):
        with BlockWatch(pipe, **arguments):
            toy.images(pipe)
    assert not find_module(pipe, toy.HOOKPOINT)._forward_hooks


def test_a_watch_is_of_one_whole_pipeline_call(pipe):
    with BlockWatch(pipe, toy.HOOKPOINT, SEEDS) as watch:
        with pytest.raises(ValueError, match="ran at 0 of the 0 timesteps"):
            watch.rows()
        toy.images(pipe)
        with pytest.raises(ValueError, match="timestep 667 came after 1, so a second pipeline call"):
            toy.images(pipe)


def test_steering_moves_canvas_activations_further_than_replacement():
    pipe, sampling = canvas.load_pipeline(), canvas.KINDS["saeuron"]
    cases = [PictureRequest((canvas.OBJECTS.index("Cats"),), style, 9300 + style) for style in range(2)]
    seeds = [case.seed for case in cases]
    eraser, steering = canvas.load_eraser("saeuron"), canvas.load_steering("saeuron", strength=-20.0)

    def rows():
        with BlockWatch(pipe, eraser.hookpoint, seeds, patches=None) as watch:
            images(pipe, cases, 4, sampling.guidance)
        return watch.rows()

    base = rows()
    with eraser.attach(pipe, ["Cats"], seed=seeds):
        replaced = rows()
    with steering.attach(pipe, ["Cats"]):
        steered = rows()
    assert repeats(rows(), base)
    before, per, steer = compare_settings(
        base, [WatchedRows("per", {}, replaced), WatchedRows("steering", {"strength": -20.0}, steered)]
    )
    assert base.shape == (2 * 4 * 64, 192)
    assert before["wasserstein"] == 0 < per["wasserstein"] < steer["wasserstein"]
    # The percentiles of 512 rows leave one of them beyond each; donors are rows of the same maps.
    assert before["outside"] <= 100 * 2 / 512 and per["outside"] < steer["outside"] / 5
    assert per["norm wasserstein"] < steer["norm wasserstein"]
