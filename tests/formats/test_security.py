"""`lbdt/formats/README.md`: every sentence about hostile files and requests names tests, and those are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "lbdt/formats/README.md").read_text()
SENTENCES = [
    " ".join(part.split()) for part in re.findall(r"^- (.*?)(?=^- |^$|\Z)", TEXT, re.MULTILINE | re.DOTALL)
]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_each_part_has_its_sentences():
    parts = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    counts = {part.splitlines()[0]: len(re.findall(r"^- ", part, re.MULTILINE)) for part in parts}
    assert counts.pop("Not covered") == 0
    assert list(counts) == ["Checkpoints", "Prompt files", "Policies", "Requests", "Folders of runs"]
    assert all(counts.values()) and sum(counts.values()) == len(SENTENCES)


@pytest.mark.parametrize("sentence", SENTENCES, ids=[sentence[:50] for sentence in SENTENCES])
def test_a_sentence_names_tests_that_are_there(sentence):
    named = NAMED.findall(sentence)
    assert named and len(named) == sentence.count("`tests/")
    for file, test in named:
        functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
        assert test in functions, f"{file} has no {test}"
