"""Prompt files: every text comes back as it was, whatever characters it holds."""

import csv

import pytest

from lbdt.activations import Prompt, read_prompts
from lbdt.activations.prompts import LabelledPrompts, prompt_lines
from lbdt.activations.source import label_places

TEXTS = {
    "line separator": "one\u2028two",
    "next line": "one\x85two",
    "vertical tab": "one\x0btwo",
    "line feed": "one\ntwo",
    "carriage return": "one\r\ntwo",
    "quotes": 'a "cat", sleeping',
    "emoji": "\N{CAT FACE} in the snow",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_text_comes_back_from_both_kinds_of_files(tmp_path, text):
    prompts = [Prompt(text, "Cats", None, 3), Prompt("plain", None, text, 4)]
    (tmp_path / "a.jsonl").write_bytes(prompt_lines(prompts))
    assert read_prompts(tmp_path / "a.jsonl") == prompts
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, ("prompt", "concept", "style", "seed"))
        rows.writeheader()
        rows.writerows(prompt.to_dict() for prompt in prompts)
    assert read_prompts(tmp_path / "a.csv") == prompts


def test_a_picture_of_several_concepts(tmp_path):
    """It shows them all, and has no single label."""
    prompts = [Prompt("a cat and a dog", "Cats", None, 0, ("Dogs",)), Prompt("a dog", "Dogs", None, 1)]
    (tmp_path / "a.jsonl").write_bytes(prompt_lines(prompts))
    assert b"beside" not in (tmp_path / "a.jsonl").read_bytes().splitlines()[1]
    assert read_prompts(tmp_path / "a.jsonl") == prompts
    line = '{"prompt": "a dog", "concept": "Dogs", "style": null, "beside": null, "seed": 1}'
    (tmp_path / "b.jsonl").write_text(line)
    assert read_prompts(tmp_path / "b.jsonl") == prompts[1:]
    (tmp_path / "a.csv").write_text("prompt,concept,beside\na cat and a dog,Cats,Dogs\na dog,Dogs,\n")
    assert read_prompts(tmp_path / "a.csv") == prompts
    assert [(prompt.shown, prompt.label) for prompt in prompts] == [
        (("Cats", "Dogs"), None),
        (("Dogs",), "Dogs"),
    ]
    labelled = LabelledPrompts.by_use(prompts)
    assert labelled.concepts == ("Cats", "Dogs")
    assert label_places(prompts, labelled.concepts, ())[0].tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"beside": ["Dogs"]', "beside: expected concepts other than the row's own, each once"),
        (
            '"concept": "Cats", "beside": ["Cats"]',
            "other than the row's own, each once, got Cats beside 'Cats'",
        ),
        ('"concept": "Cats", "beside": ["Dogs", "Dogs"]', "each once"),
        ('"concept": "Cats", "beside": [3]', "beside: expected names of further concepts"),
        ('"concept": "Cats", "beside": [""]', "beside: expected names of further concepts"),
        ('"concept": "Cats", "beside": 0', "beside: expected names of further concepts, got 0"),
        ('"concept": "Cats", "beside": {"Dogs": 1}', "beside: expected names of further concepts"),
    ],
    ids=["no-own", "its-own", "twice", "number", "empty", "zero", "object"],
)
def test_further_concepts_that_make_no_sense_are_refused_by_their_line(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a cat", {row}}}\n')
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: .*{message}"):
        read_prompts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"\xef\xbb\xbfprompt,seed\r\na cat,7\r\n"),
        ("a.jsonl", b'\xef\xbb\xbf{"prompt": "a cat", "seed": 7}\r\n'),
    ],
    ids=["csv", "jsonl"],
)
def test_files_of_a_spreadsheet_or_of_windows(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read_prompts(tmp_path / name) == [Prompt("a cat", seed=7)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"prompt\n" + b"a" * 200_000, "a.csv, line .: not valid CSV"),
        ("a.csv", b"prompt,seed\na cat\n", "a.csv, line 2: expected 2 columns"),
        ("a.jsonl", b'{"prompt": "a cat"}\nnothing\n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b"\xff", "a.jsonl, line 1: cannot be read"),
    ],
    ids=["endless field", "columns", "JSON", "encoding"],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
