"""An eraser whose donors avoid the patches of every known concept, on known numbers and on the toy pipeline."""

import json

import pytest
import torch

from lbdt import ops
from lbdt.dictionary import Selection
from lbdt.editors import ConceptEraser
from lbdt.hooks.erase_plan import KnownLatents
from tests import toy
from tests.hooks.test_layout import WIDTH, at, dials, donors, feature_map
from tests.repeats import repeats

TREES = (0, 1, 4, 5, 6, 14)
"""Patches of another known concept than the erased one, in the 3 x 5 grid."""


def scene(rows: int = 1) -> torch.Tensor:
    """Cats on patch 7, Trees on `TREES`; channel 3 numbers the patches."""
    x = feature_map(rows)
    x[:, 0, 1, 2] = 1.0
    x.flatten(2)[:, 2, list(TREES)] = 1.0
    return x


def taken(x: torch.Tensor, out: torch.Tensor) -> dict[int, int]:
    """The donor of each changed patch of one image [d, H, W], by channel 3."""
    before, after = x[3].flatten(), out[3].flatten()
    return {p: int(after[p]) - 100 for p in (before != after).nonzero().flatten().tolist()}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize(
    ("source", "erased", "known"),
    [
        pytest.param("nearest", 2, 2, id="nearest-is-above-and-free"),
        pytest.param("row", 6, 8, id="row-passes-over-the-tree"),
    ],
)
def test_the_donor_is_known_by_hand(source, erased, known):
    x = scene()
    for avoid, donor in (("erased", erased), ("known", known)):
        pipe = toy.EchoPipe(WIDTH)
        with dials(padding=0, source=source, avoid=avoid).attach(pipe, ["Cats"], layout=pipe.layout):
            assert taken(x[0], pipe.unet(at(1.0, 1), x)[0][0]) == {7: donor}


def test_random_donors_are_drawn_from_what_is_left():
    x = scene()
    pipe = toy.EchoPipe(WIDTH)
    free = [p for p in range(15) if p not in (*TREES, 7)]
    with dials(padding=0, avoid="known").attach(pipe, ["Cats"], seed=5, layout=pipe.layout):
        out = pipe.unet(at(666.0, 1), x)[0]
    assert taken(x[0], out[0]) == {7: donors(5, 666.0, 0, free)[7]}


@pytest.mark.parametrize("source", ["random", "nearest", "row", "mean"])
@pytest.mark.parametrize("padding", [0, 1])
def test_no_donor_lies_on_another_known_concept(source, padding):
    x = scene(4)
    x.flatten(2)[:, 3, list(TREES)] = 1e6  # it would be seen where it went, in a mean too
    pipe = toy.EchoPipe(WIDTH)
    eraser = dials(padding=padding, source=source, avoid="known")
    with eraser.attach(pipe, ["Cats"], seed=3, keep_masks=True, layout=pipe.layout) as attached:
        out = pipe.unet(at(333.0, 4), x)[0]
    replaced = attached.masks()[0].replaced.flatten(1)
    assert replaced.sum(1).tolist() == [9 if padding else 1] * 4
    assert (out.flatten(2)[:, 3][replaced] < 200).all()


def test_where_everything_else_is_known_donors_are_what_they_were():
    x = scene()
    x[:, 2] = 1.0
    outputs = []
    for avoid in ("erased", "known"):
        pipe = toy.EchoPipe(WIDTH)
        with dials(padding=0, avoid=avoid, bank=True).attach(pipe, ["Cats"], layout=pipe.layout):
            outputs.append(pipe.unet(at(1.0, 1), x)[0])
    assert torch.equal(*outputs) and not torch.equal(outputs[0], x)


def test_patches_of_known_concepts_are_not_replaced_and_other_rows_keep_their_bits():
    x = scene(3)
    x[1, 0] = 0.0  # trees, and no cat
    pipe = toy.EchoPipe(WIDTH)
    with dials(padding=0, avoid="known").attach(
        pipe, [["Cats"], ["Cats"], []], keep_masks=True, layout=pipe.layout
    ) as attached:
        out = pipe.unet(at(1.0, 3), x)[0]
    assert (out != x).any(1).flatten(1).nonzero().tolist() == [[0, 7]]
    mask = attached.masks()[0]
    assert mask.detected.sum() == mask.replaced.sum() == 1


def test_every_row_avoids_by_itself_whatever_set_it_has():
    """What is erased in one image is no donor in another."""
    x = scene(2)
    pipe = toy.EchoPipe(WIDTH)
    with dials(padding=0, source="row", avoid="known").attach(
        pipe, [["Cats"], ["Trees"]], layout=pipe.layout
    ):
        out = pipe.unet(at(1.0, 2), x)[0]
    assert taken(x[0], out[0]) == {7: 8}
    assert taken(x[1], out[1]) == {0: 2, 1: 2, 4: 3, 5: 8, 6: 8, 14: 13}


def test_it_looks_where_the_first_detection_looked():
    """With an SAE of the update, and a map that the concept is in and the update is not."""
    given, x = scene(), scene()
    given[:, :3] = 0.0
    given.flatten(2)[0, 2, 6] = 1.0  # the tree on patch 6 is no update
    pipe = toy.EchoPipe(WIDTH)
    with dials(padding=0, source="row", update=True, avoid="known").attach(
        pipe, ["Cats"], layout=pipe.layout
    ):
        out = pipe.unet(at(1.0, 1), x, given)[0]
    assert taken(x[0], out[0]) == {7: 6}


def test_a_selection_that_is_given_counts_for_known_concepts_too():
    eraser = dials(padding=0, source="row", avoid="known")
    late = Selection(torch.tensor([3]), torch.full((4, 1), 107.5), "Cats", "calibrated")  # from patch 8 on
    x = scene(2)
    pipe = toy.EchoPipe(WIDTH)
    with eraser.attach(pipe, [["Cats"], ["Trees"]], selections={"Cats": late}, layout=pipe.layout):
        out = pipe.unet(at(1.0, 2), x)[0]
    assert taken(x[1], out[1]) == {0: 2, 1: 2, 4: 3, 5: 7, 6: 7, 14: 3}


@pytest.mark.parametrize("settings", [{}, {"detect_at": toy.DETECT_AT}, {"k": 8, "threshold": 0.05}], ids=str)
def test_the_mask_is_that_of_all_concepts_erased_at_once(pipe, settings, monkeypatch):
    given = []
    replace = ops.replace_patches

    def seen(*arguments):
        given.append(arguments)
        return replace(*arguments)

    monkeypatch.setattr("lbdt.hooks.detection_plan.ops.replace_patches", seen)
    monkeypatch.setattr("lbdt.hooks.erase_plan.serves", lambda *given: False)  # not all in one op
    with toy.eraser(avoid="known", **settings).attach(pipe, ["Cats"]):
        toy.images(pipe, steps=1)
    with toy.eraser(**settings).attach(pipe, list(toy.CONCEPTS)):
        toy.images(pipe, steps=1)
    (_, cats, *_, avoid), (_, everything, *_, none) = given
    assert none is None and avoid.any()
    treated = cats.any(1, keepdim=True)
    assert torch.equal(avoid, everything & treated)


def test_a_compiled_unet_does_the_same(tmp_path):
    pipe = toy.pipeline(tmp_path)
    eraser = toy.eraser(avoid="known", source="row")
    with eraser.attach(pipe, ["Cats"], seed=2):
        expected = toy.images(pipe)
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with eraser.attach(pipe, ["Cats"], seed=2):
        assert repeats(toy.images(pipe), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_latent_of_several_concepts_is_looked_at_once_at_its_lowest_threshold():
    inf = torch.inf
    thresholds = torch.tensor([[1.0, 2.0, 0.5, inf], [inf, 2.0, 3.0, inf]])
    known = KnownLatents.of(torch.tensor([7, 3, 7, 5]), thresholds)
    assert known.latents.tolist() == [3, 5, 7]
    assert known.thresholds.tolist() == [[2.0, inf, 0.5], [2.0, inf, 3.0]]


def test_it_is_saved_shown_and_told_apart_and_older_files_mean_erased(tmp_path):
    eraser = toy.eraser(avoid="known")
    eraser.save_pretrained(tmp_path, decoder=True)
    again = ConceptEraser.from_pretrained(tmp_path)
    assert again.avoid == "known" and "avoid='known'" in repr(again)
    assert again.shown == {"padding": 1, "source": "random", "avoid": "known"}
    assert again.digest() == eraser.digest() != toy.eraser().digest()
    path = tmp_path / "eraser.json"
    settings = json.loads(path.read_text())
    del settings["avoid"]
    path.write_text(json.dumps(settings))
    older = ConceptEraser.from_pretrained(tmp_path)
    assert older.avoid == "erased" and older.shown == {"padding": 1, "source": "random"}
    assert older.digest() == toy.eraser().digest()


@pytest.mark.parametrize("value", ["all", "", None, True, 3], ids=str)
def test_another_word_is_refused(value):
    with pytest.raises(ValueError, match="avoid: expected one of erased, known"):
        toy.eraser(avoid=value)
