"""Prompt files: every text comes back as it was, whatever characters it holds."""

import csv

import pytest

from lbdt.activations import Prompt, read_prompts
from lbdt.activations.prompts import prompt_lines

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
