"""The attacked prompt: its ids, its embedding and the text that is reported."""

from types import SimpleNamespace

import pytest
import torch

from lbdt.attack.prefixed_text import PrefixedText
from tests import toy
from tests.repeats import repeats


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


def places(text: PrefixedText, pipe, *tokens: str) -> torch.Tensor:
    ids = pipe.tokenizer.convert_tokens_to_ids(list(tokens))
    return torch.tensor([text.vocabulary.tolist().index(i) for i in ids])


def test_a_typed_prefix_has_the_ids_and_the_embedding_of_the_pipeline_s_own(pipe):
    text = PrefixedText(pipe, "a cat", 2)
    prefix = places(text, pipe, "x</w>", "ab</w>")
    typed = pipe.tokenizer("x ab a cat", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(text.ids(prefix), typed)
    with torch.no_grad():
        wanted, _ = pipe.encode_prompt("x ab a cat", "cpu", 1, False)
    assert repeats(text.embed(prefix), wanted)
    assert text.text(prefix) == ("x ab a cat", True) and text.words(prefix) == ["x</w>", "ab</w>"]


def test_a_text_that_does_not_give_the_tokens_back_is_told(pipe):
    text = PrefixedText(pipe, "a cat", 2)
    # Typed "ab" is one token, not these two.
    written, typable = text.text(places(text, pipe, "a", "b</w>"))
    assert (written, typable) == ("ab a cat", False)


@pytest.mark.parametrize(
    ("prompt", "position", "typed"),
    [
        ("a cat", "prefix", "x ab a cat"),
        ("a cat", "suffix", "a cat x ab"),
        ("z q z q", "middle", "z q x ab z q"),
        ("z q z", "middle", "z x ab q z"),
        ("", "middle", "x ab"),
    ],
    ids=["prefix", "suffix", "middle", "middle-of-an-odd-number", "no-prompt"],
)
def test_the_tokens_stand_where_they_are_told_to(pipe, prompt, position, typed):
    text = PrefixedText(pipe, prompt, 2, position)
    prefix = places(text, pipe, "x</w>", "ab</w>")
    wanted = pipe.tokenizer(typed, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(text.ids(prefix), wanted) and text.text(prefix) == (typed, True)
    one_hot = torch.nn.functional.one_hot(prefix, len(text.vocabulary)).float()
    assert repeats(text.embed_soft(one_hot), text.embed(prefix))


def test_the_middle_may_be_in_a_word(pipe):
    text = PrefixedText(pipe, "cat", 1, "middle")
    assert text.text(places(text, pipe, "x</w>")) == ("cx at", True)


def test_another_position_is_refused(pipe):
    with pytest.raises(ValueError, match="position: expected one of prefix, suffix, middle, got 'insert'"):
        PrefixedText(pipe, "a cat", 1, "insert")


@pytest.mark.parametrize("position", ["prefix", "suffix", "middle"])
def test_the_soft_embedding_is_the_hard_one_and_has_its_slope(pipe, position):
    text = PrefixedText(pipe, "a cat", 3, position)
    prefix = places(text, pipe, "q", "x</w>", "z</w>")
    one_hot = torch.nn.functional.one_hot(prefix, len(text.vocabulary)).float().requires_grad_()
    soft = text.embed_soft(one_hot)
    assert repeats(soft, text.embed(prefix)) and soft.requires_grad
    weights = torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((soft * weights).sum(), one_hot)
    assert gradient.abs().sum(1).min() > 0
    direction = torch.randn(one_hot.shape, generator=torch.Generator().manual_seed(1)).double()
    pipe.text_encoder.double()
    try:

        def value(length):
            return (text.embed_soft(one_hot.detach().double() + length * direction) * weights).sum()

        length = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(value(length), length)
        step = 1e-5
        with torch.no_grad():
            differences = (value(step) - value(-step)) / (2 * step)
    finally:
        pipe.text_encoder.float()
    assert float(slope) == pytest.approx(float(differences)) and slope != 0


def test_the_encoder_is_left_as_it_was(pipe):
    before = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    text = PrefixedText(pipe, "a dog", 1)
    with pytest.raises(RuntimeError):
        text.embed_soft(torch.zeros(1, 2))
    text.embed_soft(torch.eye(len(text.vocabulary))[:1])
    assert repeats(pipe.encode_prompt("a cat", "cpu", 1, False)[0], before)


def test_special_tokens_are_no_prefix(pipe):
    text = PrefixedText(pipe, "a", 1)
    assert len(text.vocabulary) == len(pipe.tokenizer) - 2
    assert not set(text.vocabulary.tolist()) & set(pipe.tokenizer.all_special_ids)


def test_a_prompt_that_fills_the_encoder_is_refused(pipe):
    # Start, 3 letters, end: 5 of 16.
    PrefixedText(pipe, "cat", 11)
    with pytest.raises(ValueError, match="tokens: 12 and the 5 of 'cat' are more than the text encoder's 16"):
        PrefixedText(pipe, "cat", 12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"components": None}, TypeError, "expected a diffusers pipeline"),
        ({"vae": None}, ValueError, "has no vae"),
        ({"text_encoder_2": object()}, ValueError, "has text_encoder_2 besides"),
        ({"text_encoder": torch.nn.Identity()}, ValueError, "no token embeddings"),
        ({"scheduler": object()}, ValueError, "has no alphas_cumprod"),
    ],
    ids=["no-pipeline", "no-vae", "sdxl", "text-encoder", "flow-matching"],
)
def test_another_kind_of_pipeline_is_refused(pipe, change, error, message):
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "unet", "vae", "scheduler")}
    with pytest.raises(error, match=message):
        PrefixedText(SimpleNamespace(**{"components": {}, **parts, **change}), "a cat", 1)
