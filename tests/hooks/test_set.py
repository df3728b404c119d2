"""`handle.set`: other concepts, seeds and off, written in place; and attaching again to compiled UNets."""

import random

import pytest
import torch

from lbdt import Steering
from tests import toy
from tests.repeats import repeats

SETS = (["Cats"], ["Dogs"], ["Trees"], ["Cats", "Trees"], [["Dogs"], []])


@pytest.fixture
def pipe(tmp_path):
    return toy.pipeline(tmp_path)


def tensors(pipe) -> dict[str, int]:
    """The addresses of what the hook of the block reads."""
    hooks = pipe.unet.up_blocks[0].attentions[0]._diffusers_hook.hooks.values()
    plan = next(iter(hooks)).plan
    return {
        name: getattr(plan, name).data_ptr()
        for name in ("latents", "thresholds", "enabled", "seeds", "weight")
    }


def alone(pipe, concepts, seed=0):
    with toy.eraser().attach(pipe, concepts, seed=seed):
        return toy.images(pipe)


def test_what_is_set_is_what_attach_would_have_done(pipe):
    base = toy.images(pipe)
    wanted = {str(names): alone(pipe, names, seed=4) for names in SETS[:4]}
    with toy.eraser().attach(pipe, ["Cats"], room=4) as handle:
        places = tensors(pipe)
        for names in SETS[:4]:
            handle.set(concepts=names, seed=4)
            assert repeats(toy.images(pipe), wanted[str(names)])
        handle.set(enabled=False)
        assert repeats(toy.images(pipe), base)
        handle.set(enabled=True)
        assert repeats(toy.images(pipe), wanted[str(SETS[3])])
        assert tensors(pipe) == places
    assert repeats(toy.images(pipe), base)


def test_sets_and_seeds_of_each_prompt_are_exchanged(pipe):
    base = toy.images(pipe)
    with toy.eraser().attach(pipe, [["Cats"], []], seed=[1, 2], room=3) as handle:
        handle.set(concepts=[[], ["Dogs"]], seed=[5, 6])
        out = toy.images(pipe)
    with toy.eraser().attach(pipe, [[], ["Dogs"]], seed=[5, 6]):
        assert repeats(out, toy.images(pipe))
    assert torch.equal(out[0], base[0]) or repeats(out[:1], base[:1])


def test_concepts_that_need_more_room_get_it(pipe):
    wanted = alone(pipe, ["Dogs", "Trees"])
    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        handle.set(concepts=["Dogs", "Trees"])
        assert repeats(toy.images(pipe), wanted)


def test_a_captured_graph_is_not_left_behind(pipe):
    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        handle._changed._plan.captured = True
        handle.set(concepts=["Dogs"])
        with pytest.raises(ValueError, match="need 2 latent columns.*room=3"):
            handle.set(concepts=["Dogs", "Trees"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        pytest.param({"concepts": ["Birds"]}, "'Birds'", id="unknown"),
        pytest.param({"concepts": "Cats"}, "list of names", id="text"),
        pytest.param({"concepts": [["Cats"], []]}, "attached as one for all", id="a-list-for-one"),
        pytest.param({"seed": [1, 2]}, "seed: attached as one for all", id="seeds-for-one"),
        pytest.param({"seed": 1.5}, "seed", id="seed"),
        pytest.param({"enabled": 1}, "enabled: expected True or False", id="enabled"),
    ],
)
def test_a_bad_exchange_changes_nothing(pipe, given, text):
    wanted = alone(pipe, ["Cats"])
    with toy.eraser().attach(pipe, ["Cats"]) as handle:
        with pytest.raises((ValueError, TypeError), match=text):
            handle.set(**given)
        assert repeats(toy.images(pipe), wanted)


def test_nothing_is_set_after_removal(pipe):
    handle = toy.eraser().attach(pipe, ["Cats"])
    handle.remove()
    with pytest.raises(ValueError, match="removed; attach again"):
        handle.set(concepts=["Dogs"])


@pytest.mark.parametrize("room", [0, 1.5, True, 1 << 20])
def test_a_room_that_is_none_is_refused(pipe, room):
    with pytest.raises((ValueError, TypeError), match="room: expected"):
        toy.eraser().attach(pipe, ["Cats"], room=room)


@pytest.mark.parametrize("rule", ["saeuron", "sdxl"])
def test_a_steering_is_exchanged_too(pipe, rule):
    def steering():
        return Steering.from_eraser(toy.eraser(), rule=rule, strength=-2.0)

    with steering().attach(pipe, ["Dogs", "Trees"]):
        wanted = toy.images(pipe)
    with steering().attach(pipe, ["Cats"]) as handle:
        handle.set(concepts=["Dogs", "Trees"])
        assert repeats(toy.images(pipe), wanted)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_thousand_sets_are_one_graph(pipe):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    text = pipe.encode_prompt("cat", "cpu", 2, False)[0]
    draw = random.Random(0)
    torch._dynamo.reset()
    eager = pipe.unet
    pipe.unet = torch.compile(eager, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), toy.eraser(threshold=0.02).attach(pipe, ["Cats"]) as handle:
        for number in range(1000):
            names = draw.choice(SETS[:4])
            handle.set(concepts=names, seed=draw.randrange(1000), enabled=draw.random() < 0.9)
            if number % 100 == 0:
                handle.set(enabled=True)
                out = pipe.unet(x, 999, encoder_hidden_states=text).sample
                assert repeats(out, eager(x, 999, encoder_hidden_states=text).sample)
        assert graphs() == 1
        handle.set(concepts=["Trees"], enabled=True)
        erased = pipe.unet(x, 999, encoder_hidden_states=text).sample
        handle.set(enabled=False)
        assert not torch.equal(erased, pipe.unet(x, 999, encoder_hidden_states=text).sample)
        assert graphs() == 1


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_attaching_for_every_request_compiles_twice(pipe, how):
    base, wanted = toy.images(pipe), {str(names): alone(pipe, names, seed=2) for names in SETS[:3]}
    torch._dynamo.reset()
    if how == "whole":
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    else:
        pipe.unet.up_blocks[0].attentions[0].compile(fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    eraser, handles = toy.eraser(), []
    assert repeats(toy.images(pipe), base)
    for request in range(9):
        names = SETS[request % 3]
        with eraser.attach(pipe, names, seed=2) as handle:
            assert repeats(toy.images(pipe), wanted[str(names)])
        handles.append(handle)
        assert repeats(toy.images(pipe), base)
    assert graphs() == 2
    assert [len(handle.report().steps) for handle in handles] == [3] * 9
    assert handles[0].report() == handles[3].report() != handles[1].report()
    assert toy.traces(pipe) == []


def test_two_attachments_to_one_compiled_unet_compile_for_themselves(pipe):
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    eraser, other = toy.eraser(), toy.eraser(hookpoint=toy.DETECT_AT)
    with eraser.attach(pipe, ["Cats"]):
        cats = toy.images(pipe)
    with eraser.attach(pipe, ["Cats"]), other.attach(pipe, ["Dogs"]):
        both = toy.images(pipe)
    with eraser.attach(pipe, ["Cats"]):
        assert repeats(toy.images(pipe), cats)
    assert not torch.equal(both, cats)
    assert toy.traces(pipe) == []
