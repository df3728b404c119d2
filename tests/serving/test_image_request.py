"""Requests for pictures: what is taken, and in which words everything else is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbdt.runs.limits import MOST_SEED
from lbdt.serving.image_request import ImageRequest, Refusal, read_request
from lbdt.serving.settings import ServeSettings, settings_of
from tests.serving import malformed

SETTINGS = ServeSettings(policy="p.toml", audit="a", sizes=("512x512", "768x512"), max_prompt=50, max_n=3)


def read(body):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_request(raw, SETTINGS, ("EmojiCanvas",))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"seed": 7}, ImageRequest("a cat", (7,), None)),
        ({"seed": 7, "n": 3, "size": "768x512"}, ImageRequest("a cat", (7, 8, 9), (768, 512))),
        (
            {"seed": MOST_SEED - 1, "n": 2, "size": "auto"},
            ImageRequest("a cat", (MOST_SEED - 1, MOST_SEED), None),
        ),
        (
            {
                "seed": 0,
                "model": "EmojiCanvas",
                "user": "u",
                "response_format": "b64_json",
                "quality": "auto",
            },
            ImageRequest("a cat", (0,), None),
        ),
        (
            {"seed": 1, "n": None, "size": None, "model": None, "stream": False},
            ImageRequest("a cat", (1,), None),
        ),
    ],
    ids=["seed", "seeds-follow-each-other", "last-seeds", "what-the-api-has", "nulls"],
)
def test_what_is_taken(fields, expected):
    assert read({"prompt": "a cat", **fields}) == expected


def test_without_a_seed_each_request_has_another():
    requests = [read({"prompt": "a", "n": 2}) for _ in range(50)]
    assert len({request.seeds for request in requests}) == 50
    assert all(first + 1 == second for first, second in (request.seeds for request in requests))


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "body: expected JSON, and it is not"),
        (b"{", 400, "expected JSON"),
        (b"\xff\xfe{}", 400, "not UTF-8"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"[]", 400, "expected a JSON object, got a list"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "a field comes twice"),
        (b'{"prompt": "a", "n": NaN}', 400, "not finite"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "too long"),
        ({}, 400, "prompt: expected text, got null"),
        ({"prompt": 3}, 400, "prompt: expected text, got 3"),
        ({"prompt": "  "}, 400, "expected text, got none"),
        ({"prompt": "a" * 51}, 400, "51 characters, and at most 50"),
        ({"prompt": "a\0"}, 400, "control characters"),
        (b'{"prompt": "\\ud800"}', 400, "surrogate pairs"),
        ({"prompt": "a", "n": 4}, 400, "n: expected a whole number from 1 to 3, got 4"),
        ({"prompt": "a", "n": True}, 400, "got true"),
        ({"prompt": "a", "n": 1.0}, 400, "got 1"),
        ({"prompt": "a", "seed": -1}, 400, "seed: expected a whole number from 0"),
        ({"prompt": "a", "seed": MOST_SEED, "n": 2}, 400, "seed: expected"),
        ({"prompt": "a", "size": "512"}, 400, "size: expected auto or 512x512 or 768x512, got text"),
        ({"prompt": "a", "size": [512, 512]}, 400, "got a list"),
        (
            {"prompt": "a", "response_format": "url"},
            400,
            'response_format: this server takes "b64_json", null only',
        ),
        ({"prompt": "a", "stream": True}, 400, "stream: this server takes false"),
        ({"prompt": "a", "stream": 0}, 400, "stream: this server takes false"),
        ({"prompt": "a", "style": "vivid"}, 400, "style: this server takes null only"),
        ({"prompt": "a", "user": 5}, 400, "user: expected text, got 5"),
        ({"prompt": "a", "promptt": "b"}, 400, "did you mean 'prompt'?"),
        ({"prompt": "a", "zzz": 1}, 400, "is no field of this server; fields are prompt"),
        ({"prompt": "a", "model": "dall-e-3"}, 404, "this server has EmojiCanvas"),
        ({"prompt": "a", "model": ["EmojiCanvas"]}, 404, "this server has EmojiCanvas"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_refused(body, status, text):
    with pytest.raises(Refusal) as caught:
        read(body)
    assert caught.value.status == status
    assert text in str(caught.value)
    error = caught.value.body()["error"]
    assert error["type"] == "invalid_request_error" and error["message"] == str(caught.value)


def test_no_refusal_repeats_what_somebody_wrote():
    for body in (
        {"prompt": "secret\0"},
        {"prompt": "a", "size": "secret"},
        {"prompt": "a", "user": ["secret"]},
    ):
        with pytest.raises(Refusal) as caught:
            read(body)
        assert "secret" not in json.dumps(caught.value.body())


def test_half_a_surrogate_pair_in_a_fields_name_can_be_answered():
    with pytest.raises(Refusal) as caught:
        read(b'{"prompt": "a", "\\ud800": 1}')
    json.dumps(caught.value.body(), ensure_ascii=False).encode()


@pytest.mark.parametrize("seed", range(20))
def test_made_up_malformed_bodies_are_refused_in_a_sentence(seed):
    for body in malformed.bodies(seed, 100, max_prompt=SETTINGS.max_prompt, max_n=SETTINGS.max_n):
        with pytest.raises(Refusal) as caught:
            read(body)
        assert 400 <= caught.value.status < 500 and len(str(caught.value)) > 10, body


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["prompt", "n", "size", "seed", "model", "user", "quality", "x"]), _JSON)
)
def test_any_object_is_read_or_refused(fields):
    try:
        request = read(json.dumps(fields).encode())
    except Refusal as refusal:
        assert refusal.status in (400, 404)
    else:
        assert request.prompt == fields["prompt"] and len(request.seeds) == (fields.get("n") or 1)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"sizes": ("512",)}, "sizes: size: expected WIDTHxHEIGHT"),
        ({"sizes": ("512x513",)}, "multiples of 8"),
        ({"sizes": ("0x8",)}, "multiples of 8"),
        ({"tenant_header": "X Tenant"}, "tenant_header: expected a header's name"),
        ({"model": "m"}, "an eraser belongs to a pipeline"),
        (
            {"max_queue": 2, "max_n": 4, "max_tenant_queue": 2},
            "4 pictures of a request, and a tenant may have 2",
        ),
        ({"max_queue": 2}, "4 pictures of a request, and a tenant may have 2"),
        ({"batch": 0}, "batch: Input should be greater than or equal to 1"),
        ({"timeout": float("nan")}, "timeout"),
        ({"bach": 3}, "bach: Extra inputs are not permitted"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_settings_that_are_refused(values, text):
    with pytest.raises(ValueError, match=text):
        settings_of(policy="p.toml", audit="a", **values)
