"""A request for pictures as the OpenAI API has it (`POST /v1/images/generations`), read strictly."""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lbdt.runs.limits import MOST_SEED
from lbdt.serving.settings import ServeSettings
from lbdt.serving.sizes import pixels_of


class Refusal(Exception):
    """What a request is answered with in place of pictures."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The error as the OpenAI API words it."""
        kind = (
            "invalid_request_error"
            if self.status < 429
            else "rate_limit_error"
            if self.status == 429
            else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ImageRequest:
    """What is asked for."""

    prompt: str
    seeds: tuple[int, ...]
    """The seed that was given and the numbers after it, one a picture."""
    size: tuple[int, int] | None
    """(width, height); None: the pipeline's own."""


# Fields of the OpenAI API that choose what there is no choice of here, with the values that ask for just that.
_ONLY: dict[str, tuple[Any, ...]] = {
    "response_format": ("b64_json", None),
    "quality": ("auto", "standard", None),
    "background": ("auto", "opaque", None),
    "moderation": ("auto", "low", None),
    "output_format": ("png", None),
    "output_compression": (100, None),
    "style": (None,),
    "stream": (False, None),
    "partial_images": (0, None),
}
_FIELDS = ("prompt", "n", "size", "seed", "model", "user", *_ONLY)


def read_request(body: bytes, settings: ServeSettings, models: Sequence[str]) -> ImageRequest:
    """The request in a body of JSON.

    Raises:
        Refusal: 400 or 404, in a sentence that says what was given and what is expected.
    """
    fields = _fields(body)
    for name in fields:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; fields are {', '.join(_FIELDS)}"
            shown = name[:40].encode(errors="replace").decode()  # half a surrogate pair cannot be sent
            raise _bad(shown, f"{shown!r} is no field of this server{hint}")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise _bad("prompt", f"prompt: expected text, got {_kind(prompt)}")
    _check_prompt(prompt, settings.max_prompt)
    model = fields.get("model")
    if model is not None and model not in models:
        raise Refusal(
            404,
            f"model: this server has {', '.join(models)}; leave the field out, or name it",
            code="model_not_found",
            param="model",
        )
    n = _integer(fields, "n", 1, settings.max_n, 1)
    seed = _integer(fields, "seed", 0, MOST_SEED - n + 1, None)
    for name, allowed in _ONLY.items():
        value = fields.get(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            shown = ", ".join(json.dumps(one) for one in allowed)
            raise _bad(name, f"{name}: this server takes {shown} only, got {_kind(value)}")
    if not isinstance(fields.get("user", ""), str | None):
        raise _bad("user", f"user: expected text, got {_kind(fields['user'])}")
    first = secrets.randbelow(MOST_SEED - n + 2) if seed is None else seed
    return ImageRequest(prompt, tuple(range(first, first + n)), _size(fields.get("size"), settings.sizes))


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise _bad(None, "body: expected JSON in UTF-8, got bytes that are not UTF-8") from error
    except RecursionError as error:
        raise _bad(None, "body: JSON that is nested too deeply") from error
    except ValueError as error:
        raise _bad(None, f"body: expected JSON, and it is not: {_why(error)}") from error
    if not isinstance(fields, dict):
        raise _bad(None, f"body: expected a JSON object, got {_kind(fields)}")
    return fields


def _why(error: ValueError) -> str:
    """The error without what the body says, which its own text may quote."""
    return f"{error.msg} (character {error.pos})" if isinstance(error, json.JSONDecodeError) else _LONG


_LONG = "a number is too long, not finite, or a field comes twice"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError
    return fields


def _no_number(text: str) -> float:
    raise ValueError


def _check_prompt(prompt: str, most: int) -> None:
    if len(prompt) > most:
        raise _bad("prompt", f"prompt: {len(prompt)} characters, and at most {most} are taken")
    if not prompt.strip():
        raise _bad("prompt", "prompt: expected text, got none")
    if any(
        ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in prompt
    ):
        raise _bad("prompt", "prompt: control characters and halves of surrogate pairs are not taken")


def _integer(fields: dict[str, Any], name: str, low: int, high: int, default: int | None) -> int | None:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _bad(name, f"{name}: expected a whole number from {low} to {high}, got {_kind(value)}")
    return value


def _size(size: Any, allowed: Sequence[str]) -> tuple[int, int] | None:
    if size is None or size == "auto":
        return None
    if not isinstance(size, str) or size not in allowed:
        raise _bad("size", f"size: expected {' or '.join(['auto', *allowed])}, got {_kind(size)}")
    return pixels_of(size)


def _bad(param: str | None, message: str) -> Refusal:
    return Refusal(400, message, code="invalid_value", param=param)


def _kind(value: Any) -> str:
    """What kind of value it is; numbers as they are. Text is not repeated: it may be somebody's."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        text = (
            f"{value:.6g}"
            if isinstance(value, float)
            else str(value)
            if abs(value) < 10**20
            else "a very large number"
        )
        return text
    return {str: "text", list: "a list", dict: "an object"}.get(type(value), "something else")
