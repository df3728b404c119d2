"""UCE: the closed form against a least squares solver, which tokens stand for a text, and what removal leaves."""

from __future__ import annotations

import pytest
import torch

from lbdt.editors import UCE
from lbdt.editors.uce import _aligned, cross_attention_projections, edit_matrix
from lbdt.testing import DTYPES, assert_close
from tests import toy
from tests.repeats import repeats

BEGIN, END = 90, 91


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


def weights(pipe):
    return [projection.weight.detach().clone() for projection in cross_attention_projections(pipe.unet)]


def states(pipe, text):
    return pipe.encode_prompt(text, "cpu", 1, False)[0][0].detach()


def solved(weight, old, new, kept, erase, preserve, ridge):
    """argmin |sqrt(e) (W' c - W c*)|^2 + |sqrt(p) (W' c_j - W c_j)|^2 + r |W' - W|^2, by `torch.linalg.lstsq`."""
    weight, identity = weight.double(), torch.eye(old.shape[1], dtype=torch.float64)
    rows = torch.cat([erase**0.5 * old, preserve**0.5 * kept, ridge**0.5 * identity])
    values = torch.cat([erase**0.5 * new, preserve**0.5 * kept, ridge**0.5 * identity]) @ weight.T
    return torch.linalg.lstsq(rows, values).solution.T


@pytest.mark.parametrize(
    ("edits", "kept", "erase", "preserve", "ridge"),
    [(1, 0, 1, 1, 0.5), (3, 7, 1, 1, 0.5), (5, 2, 2.5, 0.1, 0.01), (40, 40, 1, 1, 1e-3), (4, 4, 1, 0, 3)],
    ids=["one-edit", "released", "other-scales", "more-than-the-width", "nothing-preserved"],
)
def test_the_closed_form_is_the_least_squares_solution(edits, kept, erase, preserve, ridge):
    generator = torch.Generator().manual_seed(edits)
    old, new, stays = (
        torch.randn(n, 13, generator=generator, dtype=torch.float64) for n in (edits, edits, kept)
    )
    weight = torch.randn(6, 13, generator=generator, dtype=torch.float64)
    matrix = edit_matrix(old, new, stays, erase, preserve, ridge)
    assert_close(weight @ matrix, solved(weight, old, new, stays, erase, preserve, ridge), "least_squares")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_projection_of_a_pipeline_is_edited_by_its_own_texts(pipe, dtype, tmp_path):
    """`last`: one state a text, read here from the pipeline's own encoder."""
    mine = toy.pipeline(tmp_path)
    mine.unet.to(dtype)
    mine.text_encoder.double()  # two runs of it in float32 are farther apart than float64's tolerance
    before = weights(mine)
    old, new, kept = (
        states(mine, text)[place].double()[None] for text, place in (("ab", 1), ("", 0), ("c d", 2))
    )
    with UCE([("ab", "")], ["c d"], tokens="last").attach(mine):
        after = weights(mine)
    assert len(before) == 8, "keys and values of four blocks"
    for was, found in zip(before, after, strict=True):
        assert found.dtype == dtype and found.shape == was.shape
        assert_close(found, solved(was, old, new, kept, 1.0, 1.0, 0.5).to(dtype), "least_squares")


def test_a_text_that_is_mapped_to_itself_changes_nothing(pipe):
    before = weights(pipe)
    with UCE([("ab c", "ab c")], ["d"]).attach(pipe):
        assert all(map(torch.equal, weights(pipe), before))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((1, 2), (), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3)]),
        ((7, 1, 8), (7, 8), [(2, 1), (3, 2), (4, 3), (5, 4)]),
        ((7, 1, 2, 8), (7, 3, 8), [(2, 2), (3, 2), (4, 3), (5, 4)]),
        ((1,), (2, 3), [(1, 1), (2, 3), (3, 4), (4, 5)]),
        ((1, 1), (1,), [(2, 1), (3, 2), (4, 3), (5, 4)]),
        ((1,), (1,), [(3, 3), (4, 4), (5, 5)]),
    ],
    ids=["name-to-nothing", "word-taken-out", "two-for-one", "one-for-two", "doubled-word", "the-same"],
)
def test_which_states_are_mapped_to_which(old, new, expected):
    """Of 6 tokens: what differs, what follows it, and the padding."""
    texts = [[BEGIN, *text, END] for text in (old, new)]
    assert _aligned(*texts, 6, "all") == expected
    assert _aligned(*texts, 6, "last") == [(len(old), len(new))]


def test_a_longer_text_fills_the_window():
    text = [BEGIN, 1, 2, 3, 4, END]
    assert _aligned(text, [BEGIN, END], 6, "all") == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1)]


def test_the_erased_text_acts_like_the_other_one_and_a_preserved_one_stays(pipe):
    """With a weak ridge, and fewer states than the width has room for."""
    key = cross_attention_projections(pipe.unet)[0]
    erased, target, kept = (states(pipe, text)[place] for text, place in (("ab", 1), ("", 0), ("c", 1)))
    with torch.no_grad():
        wanted, stays = key(target), key(kept)
        with UCE([("ab", "")], ["c"], tokens="last", ridge=1e-9).attach(pipe):
            assert_close(key(erased), wanted, "training_loss")
            assert_close(key(kept), stays, "training_loss")


@pytest.mark.parametrize("leave", ["removed", "twice", "exception"])
def test_after_removal_the_pipeline_is_what_it_was_bit_for_bit(pipe, leave):
    before, pictures = weights(pipe), toy.images(pipe)
    state = {name: tensor.data_ptr() for name, tensor in pipe.unet.state_dict().items()}
    handle = UCE([("a cat", "")], ["a dog"]).attach(pipe)
    assert not any(map(torch.equal, weights(pipe), before))
    assert not torch.equal(toy.images(pipe), pictures)
    if leave == "exception":
        with pytest.raises(KeyError), handle:
            raise KeyError
    else:
        handle.remove()
    if leave == "twice":
        handle.remove()
    assert all(map(torch.equal, weights(pipe), before)) and repeats(toy.images(pipe), pictures)
    assert {name: tensor.data_ptr() for name, tensor in pipe.unet.state_dict().items()} == state
    assert not toy.traces(pipe)


def test_a_model_that_is_moved_to_another_dtype_meanwhile_gets_its_own_weights_back(tmp_path):
    pipe = toy.pipeline(tmp_path)
    before = weights(pipe)
    with UCE([("ab", "")]).attach(pipe):
        pipe.unet.to(torch.float16)
    assert all(torch.equal(now, was.half()) for now, was in zip(weights(pipe), before, strict=True))


def test_two_at_once_are_refused_and_one_after_another_are_not(pipe):
    before = weights(pipe)
    with UCE([("ab", "")]).attach(pipe), pytest.raises(ValueError, match="edited by a UCE already; remove"):
        UCE([("c", "")]).attach(pipe)
    with UCE([("c", "")]).attach(pipe):
        pass
    assert all(map(torch.equal, weights(pipe), before))


def test_it_works_in_inference_mode_and_outside_of_it(pipe):
    with torch.inference_mode():
        handle = UCE([("ab", "")]).attach(pipe)
    found = weights(pipe)
    handle.remove()
    with UCE([("ab", "")]).attach(pipe):
        assert repeats(weights(pipe), found) and not any(each.is_inference() for each in weights(pipe))


def test_texts_and_settings_have_a_digest():
    given = [
        UCE([("a", "")]),
        UCE([("a", "b")]),
        UCE([("a", "")], ["b"]),
        UCE([("a", "")], tokens="last"),
        UCE([("a", "")], ridge=0.25),
    ]
    assert len({each.digest() for each in given}) == len(given)
    assert given[0].digest() == UCE([("a", "")]).digest()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"edits": []}, ValueError, "edits: expected one or more pairs .* got none"),
        ({"edits": "cats"}, ValueError, "edits: expected one or more pairs"),
        ({"edits": ["cats"]}, TypeError, "edits: expected pairs of texts .* got 'cats'"),
        ({"edits": [("cats", None)]}, TypeError, "edits: expected pairs"),
        ({"preserve": "dogs"}, TypeError, "preserve: expected a list of texts, got 'dogs'"),
        ({"erase_scale": 0}, ValueError, "erase_scale: expected a finite number > 0, got 0"),
        ({"preserve_scale": -1.0}, ValueError, "preserve_scale: expected a finite number >= 0, got -1.0"),
        ({"ridge": float("nan")}, ValueError, "ridge: expected a finite number > 0, got nan"),
        ({"ridge": "much"}, TypeError, "ridge: expected a number > 0, got 'much'"),
        ({"tokens": "first"}, ValueError, "tokens: expected one of all, last; got 'first'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        UCE(**{"edits": [("cats", "")], **arguments})


def test_pipelines_without_what_it_needs_are_refused_and_stay(pipe, tmp_path):
    with pytest.raises(ValueError, match="EchoPipe has no encode_prompt"):
        UCE([("a", "")]).attach(toy.EchoPipe(4))
    other = toy.pipeline(tmp_path)
    with torch.no_grad():
        key = cross_attention_projections(other.unet)[0]
    narrow = torch.nn.Linear(8, key.out_features, bias=False)
    block = next(m for m in other.unet.modules() if getattr(m, "to_k", None) is key)
    block.to_k = narrow
    with pytest.raises(ValueError, match="reads states of width 8, but encode_prompt gives 16"):
        UCE([("a", "")]).attach(other)
    block.to_k = torch.nn.Identity()
    with pytest.raises(ValueError, match="to_k to be a linear layer, got Identity"):
        UCE([("a", "")]).attach(other)
    block.to_k = narrow.to("meta")
    with pytest.raises(ValueError, match="to_k is offloaded; load the UNet whole"):
        UCE([("a", "")]).attach(other)
