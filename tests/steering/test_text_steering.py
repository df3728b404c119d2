"""`TextSteering` on a tiny CLIP: numbers by hand, which call is which, removal, refusals."""

import threading

import pytest
import torch

import lbdt
from lbdt.editors import TextSteering
from lbdt.sae import SAEConfig, SparseAutoencoder
from lbdt.testing import assert_close
from tests import toy
from tests.repeats import repeats
from tests.steering import models

LAYER = "text_encoder.encoder.layers.0"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return toy.pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pipe(shared):
    """The shared pipeline, which every test must leave as it was."""
    yield shared
    assert toy.traces(shared) == []
    assert [
        n for n, m in shared.text_encoder.named_modules() if {"forward", "_diffusers_hook"} & set(vars(m))
    ] == []


def text_sae(width: int = 16) -> SparseAutoencoder:
    """Reads channel i with b_dec 0.1 and bias 0.05; writes random rows."""
    sae = SparseAutoencoder(SAEConfig(d_in=width, num_latents=width, k=2)).requires_grad_(False)
    sae.encoder.weight.copy_(torch.eye(width))
    sae.encoder.bias.fill_(0.05)
    sae.b_dec.fill_(0.1)
    sae.W_dec.copy_(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))
    return sae


class Tap:
    """What the layer put out, call by call."""

    def __init__(self, pipe) -> None:
        self.values: list[torch.Tensor] = []
        layer = pipe.text_encoder.encoder.layers[0]
        self.handle = layer.register_forward_hook(lambda m, args, out: self.values.append(out.clone()))

    def __enter__(self) -> list[torch.Tensor]:
        return self.values

    def __exit__(self, *exception) -> None:
        self.handle.remove()


def layer_states(pipe, texts) -> torch.Tensor:
    tokens = pipe.tokenizer(
        list(texts), padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with Tap(pipe) as seen, torch.no_grad():
        pipe.text_encoder(tokens.input_ids)
    return seen[0]


def delta(pipe, text: str, strength: float) -> torch.Tensor:
    """strength * ReLU(h) W_dec of the concept prompt, written out; no top-k though the SAE has k = 2."""
    sae = text_sae()
    z = (layer_states(pipe, [text])[0] - 0.1 + 0.05).relu()
    return strength * z @ sae.W_dec


def encode(pipe, prompts, negative=None, guided=True, **given):
    with torch.no_grad():
        return pipe.encode_prompt(prompts, "cpu", 1, guided, negative_prompt=negative, **given)


def test_the_conditional_state_takes_it_and_the_unconditional_one_gives_it(pipe):
    prompts, negative = ["cat", "dog"], ["tree", "sea"]
    shift = delta(pipe, "bare", -0.5)
    with TextSteering(text_sae(), LAYER).attach(pipe, ["bare"]) as attached, Tap(pipe) as seen:
        encode(pipe, prompts, negative)
    assert len(seen) == 2
    assert_close(seen[0], layer_states(pipe, prompts) + shift, models.QUANTITY)
    assert_close(seen[1], layer_states(pipe, negative) - shift, models.QUANTITY)
    (step,) = attached.report().steps
    assert (step.timestep, step.rows, step.patches) == (0.0, 4, 64) and step.replaced > 0
    assert "strength -0.5" in str(attached.report())


def test_which_call_is_which_follows_the_arguments(pipe):
    shift = delta(pipe, "bare", -1.0)
    plain = encode(pipe, ["cat"])
    with TextSteering(text_sae(), LAYER, strength=-1.0).attach(pipe, ["bare"]), Tap(pipe) as seen:
        encode(pipe, ["cat"], guided=False)
        encode(pipe, None, prompt_embeds=plain[0])  # only the negative one is encoded
        encode(pipe, ["cat"], negative_prompt_embeds=plain[1])  # only the prompt
        encode(pipe, "cat", "tree")
        pipe.text_encoder(torch.zeros(1, 16, dtype=torch.int64))  # no part of the pipeline's encoding
    texts = ["cat", "", "cat", "cat", "tree"]
    for got, text, sign in zip(seen, texts, (1, -1, 1, 1, -1), strict=False):
        assert_close(got, layer_states(pipe, [text]) + sign * shift, models.QUANTITY)
    with Tap(pipe) as alone, torch.no_grad():
        pipe.text_encoder(torch.zeros(1, 16, dtype=torch.int64))
    assert len(seen) == 6 and repeats(seen[5], alone[0])


def test_rows_cond_and_prompts_of_their_own(pipe):
    strength = {"bare": -0.5, "red": 2.0}
    steering = TextSteering(text_sae(), LAYER, strength=strength)
    shifts = {name: delta(pipe, name, value) for name, value in strength.items()}
    states, empty = layer_states(pipe, ["cat", "dog"]), layer_states(pipe, ["", ""])
    with steering.attach(pipe, [["bare", "red"], []], rows="cond"), Tap(pipe) as seen:
        encode(pipe, ["cat", "dog"])
        with pytest.raises(ValueError, match="list of 2 entries for 3 prompts"):
            encode(pipe, ["a", "b", "c"])
    assert_close(seen[0][0], states[0] + shifts["bare"] + shifts["red"], models.QUANTITY)
    assert repeats(seen[0][1], states[1]) and repeats(seen[1], empty) and len(seen) == 2


def test_it_changes_the_images_and_comes_off(pipe):
    base = toy.images(pipe)
    steering = lbdt.TextSteering(text_sae(), LAYER, strength=-1.0)
    with steering.attach(pipe, ["cat"]):
        first = toy.images(pipe, num_images_per_prompt=2)
        assert repeats(toy.images(pipe, num_images_per_prompt=2), first)
        with pytest.raises(ValueError, match="attached to this pipeline already"):
            steering.attach(pipe, ["cat"])
    assert not torch.equal(first[::2], base) and repeats(toy.images(pipe), base)
    with TextSteering(text_sae(), LAYER, strength=0.0).attach(pipe, ["cat"]):
        assert repeats(toy.images(pipe), base)


def test_beside_an_eraser_in_any_order(pipe):
    base = toy.images(pipe)
    for place in (0, 1):
        handles = [
            toy.eraser().attach(pipe, ["Cats"]),
            TextSteering(text_sae(), LAYER, strength=-1.0).attach(pipe, ["cat"]),
        ]
        both = toy.images(pipe)
        handles.pop(place).remove()
        assert not torch.equal(toy.images(pipe), both)
        handles.pop().remove()
        assert repeats(toy.images(pipe), base)


def test_an_exception_while_encoding_is_forgotten(pipe):
    with TextSteering(text_sae(), LAYER, strength=-1.0).attach(pipe, ["bare"]):
        expected = encode(pipe, ["cat"])[0]
        with pytest.raises(TypeError):
            encode(pipe, ["cat"], "a string for a list")
        assert repeats(encode(pipe, ["cat"])[0], expected)


@pytest.mark.parametrize(
    "name", ["text_encoder.text_model.encoder.layers.0", "text_encoder.encoder.layers.0"]
)
def test_names_of_either_transformers_are_found(pipe, name):
    with TextSteering(text_sae(), name).attach(pipe, ["bare"]) as attached:
        encode(pipe, ["cat"])
    assert attached.report().replaced > 0


def test_what_another_thread_encodes_meanwhile_is_left(pipe):
    sibling = type(pipe)(**pipe.components, requires_safety_checker=False)
    base, got = encode(sibling, ["dog"], guided=False)[0], []

    def beside(module, args):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: got.append(encode(sibling, ["dog"], guided=False)[0]))
            thread.start()
            thread.join()

    with TextSteering(text_sae(), LAYER, strength=-1.0).attach(pipe, ["bare"]):
        alone = encode(pipe, ["cat"], guided=False)[0]
        hook = pipe.text_encoder.register_forward_pre_hook(beside)
        together = encode(pipe, ["cat"], guided=False)[0]
        hook.remove()
    assert len(got) == 1 and repeats(got[0], base) and repeats(together, alone)


def test_both_halves_in_one_call_are_refused(pipe):
    original = pipe.encode_prompt

    def together(prompt, **call):
        with torch.no_grad():
            return pipe.text_encoder(torch.zeros(2 * len(prompt), 16, dtype=torch.int64))

    pipe.encode_prompt = together
    try:
        with TextSteering(text_sae(), LAYER).attach(pipe, ["bare"]) as attached:
            with pytest.raises(RuntimeError, match="ran on 2 texts.*1 prompts.*not supported"):
                pipe.encode_prompt(["cat"])
        assert pipe.encode_prompt is together and attached.report().steps == ()
    finally:
        del pipe.encode_prompt
    assert pipe.encode_prompt == original


def lean() -> SparseAutoencoder:
    sae = text_sae()
    sae.W_dec = None
    return sae


REFUSED = {
    "no such layer": (
        lambda p: TextSteering(text_sae(), "text_encoder.encoder.layers.9").attach(p, ["a"]),
        r"did you mean text_encoder\.encoder\.layers\.0\?",
    ),
    "a list of layers": (
        lambda p: TextSteering(text_sae(), "text_encoder.encoder.layers").attach(p, ["a"]),
        "no layer",
    ),
    "the encoder": (lambda p: TextSteering(text_sae(), "text_encoder").attach(p, ["a"]), "no layer"),
    "another encoder": (
        lambda p: TextSteering(text_sae(), "text_encoder_2.encoder.layers.0").attach(p, ["a"]),
        r"begins with none of the pipeline's text encoders \(text_encoder\)",
    ),
    "width": (lambda p: TextSteering(text_sae(8), LAYER).attach(p, ["a"]), "width 16.*trained on 8"),
    "no decoder": (lambda p: TextSteering(lean(), LAYER), "no decoder"),
    "no SAE": (lambda p: TextSteering(None, LAYER), "expected a SparseAutoencoder"),
    "NaN": (lambda p: TextSteering(text_sae(), LAYER, strength=float("nan")), "finite number, got nan"),
    "hookpoint": (lambda p: TextSteering(text_sae(), 9), "expected a name such as 'text_encoder"),
    "strength missing": (
        lambda p: TextSteering(text_sae(), LAYER, strength={"a": -1.0}).attach(p, ["b"]),
        "strength: none for 'b'; given for a",
    ),
    "a text alone": (lambda p: TextSteering(text_sae(), LAYER).attach(p, "nude"), "expected a list of names"),
    "rows": (lambda p: TextSteering(text_sae(), LAYER).attach(p, ["a"], rows="x"), "all, cond; got 'x'"),
    "no pipeline": (lambda p: TextSteering(text_sae(), LAYER).attach(p.unet, ["a"]), "diffusers pipeline"),
    "never attached": (lambda p: TextSteering(text_sae(), LAYER).report(), "never attached"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_changed(pipe, case):
    attempt, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        attempt(pipe)
