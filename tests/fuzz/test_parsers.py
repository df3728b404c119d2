"""Whatever a file holds, its parser gives a valid object or a ValueError that names it, soon and in little memory."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.fuzz import inputs
from tests.fuzz.mutations import mutate
from tests.fuzzing import fuzz

EACH = 20
"""Cases of one example: hypothesis' own work would take most of the time."""
SECONDS = 10
MEGABYTES = 300
LETTERS = 6000
"""Of a message: the longest name that is shown whole, several times."""


class TooSlow(BaseException):
    """No Exception, so that no parser takes it for damage."""


@dataclasses.dataclass(repr=False)
class Target:
    folder: Path
    contents: dict[str, bytes]
    read: Callable[[Path], Any]


@pytest.fixture(scope="module")
def target(request, tmp_path_factory):
    """The valid files of a parser, in memory and in a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    make, read = inputs.TARGETS[request.param]
    make(folder)
    contents = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    read(folder)
    return Target(folder, contents, read)


def peak() -> int:
    """Kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(target: Target, name: str, data: bytes) -> None:
    """Reads the folder with one file changed, and puts it back."""

    def stop(*_):
        raise TooSlow(f"{SECONDS} s and more")

    (target.folder / name).write_bytes(data)
    before, handler = peak(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        target.read(target.folder)
    except ValueError as error:
        message = str(error)
        assert str(target.folder) in message, f"names no file: {message[:500]}"
        assert len(message) <= LETTERS and "\n" not in message, f"{len(message)} letters: {message[:500]!r}"
        message.encode()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        (target.folder / name).write_bytes(target.contents[name])
    assert peak() - before < MEGABYTES * 1024


@pytest.mark.parametrize("target", inputs.TARGETS, indirect=True)
@fuzz(start=st.integers(0, 2**64 - 1), each=EACH)
def test_a_parser_of_changed_files(target, start):
    for case in range(EACH):
        chance = random.Random(start + case)
        name = chance.choice(sorted(target.contents))
        changed = target.contents[name]
        for _ in range(chance.choice((1, 1, 1, 2))):
            changed = mutate(name, changed, chance)
        try:
            check(target, name, changed)
        except BaseException as error:
            error.add_note(f"{name}, of random.Random({start + case}): {changed[:2000]!r}")
            raise


@pytest.mark.parametrize("target", inputs.TARGETS, indirect=True)
@fuzz(data=st.binary(max_size=200), each=10)
def test_a_parser_of_any_bytes(target, data):
    for name in sorted(target.contents)[:10]:
        check(target, name, data)


@fuzz(
    text=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(json.dumps)
    | st.text()
)
def test_json_of_any_kind(tmp_path_factory, text):
    from lbdt.runs.reading import parse_json

    try:
        parsed = parse_json(text, "FILE")
    except ValueError as error:
        assert str(error).startswith("FILE: not valid JSON")
    else:
        json.dumps(parsed, allow_nan=False, ensure_ascii=False).encode()
