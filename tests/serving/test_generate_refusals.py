"""Batch jobs that are refused: by what is in their folder, and by their arguments."""

import json

import pytest

from lbdt.serving.jobs import generate
from tests.serving.jobs import LINES, SMALL, begin, files, lbdt, small_job, write


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 3}, "steps: 2 there, 3 here"),
        ({"batch": 3}, "batch: 2 there, 3 here"),
        ({"threads": 2}, "threads: 1 there, 2 here"),
        ({"guidance": 2.0}, "guidance: 1.0 there, 2.0 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"on_failure": "unprotected"}, 'on_failure: "refuse" there, "unprotected" here'),
        ({"concepts": ["Dogs"]}, 'concepts: ["Cats"] there, ["Dogs"] here'),
        ({"kind": "saeuron"}, "eraser.digest: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(prompts, unbroken, change, said):
    before = files(unbroken)
    with pytest.raises(ValueError) as refused:
        generate(small_job(prompts, unbroken, **change))
    assert said in str(refused.value) and "give the same settings to continue, or another folder" in str(
        refused.value
    )
    assert files(unbroken) == before


def test_another_file_of_prompts_is_refused(unbroken, tmp_path):
    other = write(tmp_path / "jobs.jsonl", [*LINES[:2], LINES[0]])
    with pytest.raises(
        ValueError, match=r"another file of prompts, which differs from line 3 on \(it is kept as"
    ):
        generate(small_job(other, unbroken))


def test_another_model_is_refused(prompts, unbroken, tmp_path):
    begin(unbroken, tmp_path / "out", [1])
    model = json.loads((tmp_path / "out/model.json").read_text())
    (tmp_path / "out/model.json").write_text(json.dumps(model | {"unet": "other"}))
    with pytest.raises(ValueError, match="another model: unet differ"):
        generate(small_job(prompts, tmp_path / "out"))


def test_a_begun_folder_keeps_its_threads(prompts, unbroken):
    result = generate(small_job(prompts, unbroken, threads=None, workers=7))
    assert (result.threads, result.made) == (1, 0)


@pytest.mark.parametrize("other", ["notes.txt", "pictures"])
def test_a_folder_of_other_files_is_refused(prompts, tmp_path, other):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / other).write_text("")
    with pytest.raises(ValueError, match=f"holds other files \\({other}\\); give a folder of its own"):
        generate(small_job(prompts, tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"concepts": ["Cat"]}, "--concept: unknown concept 'Cat'; did you mean 'Cats'?"),
        ({"concepts": ["Cats", "Cats"]}, "--concept: expected each name once"),
        ({"batch": 0}, "--batch: expected 1 or more, got 0"),
        ({"workers": 0}, "--workers: expected 1 or more, got 0"),
        ({"on_failure": "allow"}, "--on-failure: expected refuse or unprotected"),
        ({"model": "style50"}, "--eraser: an eraser belongs to a pipeline"),
        ({"device": "mars"}, "--device mars: not usable here"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(prompts, tmp_path, change, said):
    with pytest.raises(ValueError) as refused:
        generate(small_job(prompts, tmp_path / "out", **change))
    assert said in str(refused.value) and not (tmp_path / "out").exists()


def test_the_commands_refusals_are_lines(tmp_path):
    path = write(tmp_path / "jobs.jsonl", [{"prompt": "a"}, {"prompt": "b", "concepts": ["cats"]}])
    refused = lbdt(path, "--out", tmp_path / "out", *SMALL)
    assert refused.exit_code == 1 and not (tmp_path / "out").exists()
    first, *lines = refused.stderr.splitlines()
    assert first == f"lbdt: {path}: refused, 2 faults"
    assert "line 1: concepts: which concepts?" in lines[0] and "did you mean 'Cats'" in lines[1]
