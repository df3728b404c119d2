"""Made-up request bodies, each of which has something wrong; a seed makes the same ones again."""

import json
import random
from collections.abc import Iterator
from typing import Any

_WRONG: dict[str, tuple[Any, ...]] = {
    "prompt": (None, 0, 1.5, True, [], {}, ["a"], "", " \n\t ", "\x00", "a\x1b[2J", "\x7f", "\x85"),
    "n": (0, -1, 1.0, 1.5, "1", True, [], {}, 10**6, -(10**30)),
    "size": ("", "0x0", "1x1", "99999x99999", "512", "x", "512X512", 512, [512, 512], {}, True, "auto "),
    "seed": (-1, 2**63, 1.0, "1", True, [], {}, 10**40),
    "model": ("gpt-image-1", "", 0, [], {}, "../../etc/passwd", "emojicanvas"),
    "user": (0, [], {}, True),
    "response_format": ("url", "", 0, [], "B64_JSON"),
    "quality": ("hd", 1, [], "ultra"),
    "stream": (True, 1, "false", []),
    "style": ("vivid", 0, []),
    "output_format": ("jpeg", "webp", 0),
    "output_compression": (50, 100.0, "100"),
    "background": ("transparent", 0),
    "partial_images": (1, 3, "0"),
}
_NAMES = (
    "Prompt",
    "promt",
    "__proto__",
    "steps",
    "guidance_scale",
    "concepts",
    "tenant",
    "",
    "prompt\x00",
    "🦆",
    "negative_prompt",
)


def bodies(seed: int, count: int, max_prompt: int = 1000, max_n: int = 4) -> Iterator[bytes]:
    """So many bodies; of a server with these limits."""
    draw = random.Random(seed)
    kinds = (
        _wrong_value,
        _wrong_name,
        _broken_text,
        _not_an_object,
        _bytes,
        _long_prompt,
        _twice,
        _odd_numbers,
    )
    for number in range(count):
        yield draw.choice(kinds)(draw, max_prompt, max_n + 1 + number % 7)


def _good(draw: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": draw.choice(("a cat", "An image of Dogs in Sketch style.", "犬"))}
    fields |= {
        name: value for name, value in (("n", 1), ("seed", 5), ("size", "auto")) if draw.random() < 0.5
    }
    return fields


def _wrong_value(draw: random.Random, most: int, n: int) -> bytes:
    name = draw.choice(list(_WRONG))
    return json.dumps(
        {**_good(draw), name: draw.choice((*_WRONG[name], n) if name == "n" else _WRONG[name])}
    ).encode()


def _wrong_name(draw: random.Random, most: int, n: int) -> bytes:
    return json.dumps({**_good(draw), draw.choice(_NAMES): draw.choice((1, "a", None, [], {}))}).encode()


def _broken_text(draw: random.Random, most: int, n: int) -> bytes:
    text = json.dumps(_good(draw))
    cut = draw.randrange(len(text))
    return draw.choice(
        (text[:cut], text + draw.choice("}]x,"), text.replace('"', "'"), "\ufeff" + text)
    ).encode()


def _not_an_object(draw: random.Random, most: int, n: int) -> bytes:
    return json.dumps(draw.choice((None, True, 0, 1.5, "a", [], ["prompt"], [{"prompt": "a"}]))).encode()


def _bytes(draw: random.Random, most: int, n: int) -> bytes:
    return draw.choice((b"\xff", b"\xc0\x80{", b"\x00")) + draw.randbytes(draw.randrange(1, 200))


def _long_prompt(draw: random.Random, most: int, n: int) -> bytes:
    return json.dumps({"prompt": draw.choice("aé犬") * (most + draw.randrange(1, 50))}).encode()


def _twice(draw: random.Random, most: int, n: int) -> bytes:
    return b'{"prompt": "a", "seed": 1, "%s": 2}' % draw.choice((b"seed", b"prompt", b"s\\u0065ed"))


def _odd_numbers(draw: random.Random, most: int, n: int) -> bytes:
    value = draw.choice(
        (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 2000, b"-", b"01")
    )
    return b'{"prompt": "a", "seed": ' + value + b"}"
