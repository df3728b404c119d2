"""What an engine's replica says of a picture: plain values, so that no exception with a prompt in it crosses processes
or reaches a log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lbdt.editors import UnprotectedError
from lbdt.serving.engine import Picture, PromptTooLongError


@dataclass(frozen=True)
class Failure:
    """A picture that was not made."""

    kind: Literal["prompt_too_long", "not_protected", "failed", "gone"]
    reason: str
    """What the audit and the client are told."""


Outcome = Picture | Failure


def outcome_of(made: Picture | Exception) -> Outcome:
    """What is said of what an engine made."""
    if isinstance(made, Picture):
        return made
    if isinstance(made, PromptTooLongError):
        return Failure("prompt_too_long", str(made))
    if isinstance(made, UnprotectedError):
        return Failure("not_protected", str(made))
    return Failure("failed", type(made).__name__)
