"""The file of a batch job: what a line means, and all that is refused at the door."""

import pytest

from lbdt.serving.job_lines import JobLine, JobLinesError, read_job
from lbdt.serving.jobs import batches_of
from tests.serving.jobs import write

KNOWN = ("Cats", "Dogs", "Towers")


def read(tmp_path, *rows, concepts=("Cats",), seed=0):
    return read_job(write(tmp_path / "jobs.jsonl", list(rows)), KNOWN, concepts, seed)[1]


def test_what_a_line_leaves_out(tmp_path):
    whole = {"prompt": "b", "seed": 9, "concepts": ["Dogs"], "id": "x.y_z-1", "size": "512x256"}
    nulls = {"prompt": "c", "seed": None, "concepts": None, "id": None, "size": None}
    assert read(tmp_path, {"prompt": "a"}, "", whole, nulls, {"prompt": "d", "concepts": []}, seed=10) == [
        JobLine(1, "000001", "a", 11, ("Cats",)),
        JobLine(3, "x.y_z-1", "b", 9, ("Dogs",), (512, 256)),
        JobLine(4, "000004", "c", 14, ("Cats",)),
        JobLine(5, "000005", "d", 15, ()),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        pytest.param("{", "line 1: not valid JSON", id="no-json"),
        pytest.param("[1]", "line 1: expected a JSON object, got a list", id="a-list"),
        pytest.param("null", "line 1: expected a JSON object, got null", id="null"),
        pytest.param('{"prompt": "a", "prompt": "b"}', "'prompt' comes twice", id="twice"),
        pytest.param('{"prompt": "\\ud800"}', "surrogate", id="surrogate"),
        pytest.param({}, "line 1: prompt: expected text, got none", id="no-prompt"),
        pytest.param({"prompt": 3}, "prompt: expected text, got 3", id="prompt-number"),
        pytest.param({"prompt": " \n"}, r"prompt: expected text, got ' \n'", id="prompt-blank"),
        pytest.param({"prompt": "a", "concept": "Cats"}, "did you mean 'concepts'?", id="field"),
        pytest.param(
            {"prompt": "a", "x" * 99: 1}, "expected prompt, seed, concepts, id, size", id="long-field"
        ),
        pytest.param({"prompt": "a", "seed": -1}, "seed: expected a whole number from 0", id="seed-negative"),
        pytest.param({"prompt": "a", "seed": 2**63}, "to 2^63 - 1, got 9223372036854775808", id="seed-large"),
        pytest.param({"prompt": "a", "seed": True}, "got true", id="seed-true"),
        pytest.param({"prompt": "a", "seed": 1.0}, "got 1.0", id="seed-float"),
        pytest.param({"prompt": "a", "concepts": "Cats"}, "expected a list of names", id="concepts-text"),
        pytest.param({"prompt": "a", "concepts": [1]}, "expected a list of names", id="concepts-number"),
        pytest.param({"prompt": "a", "concepts": ["cat"]}, "'cat'; did you mean 'Cats'?", id="near"),
        pytest.param({"prompt": "a", "concepts": ["q"]}, "expected of Cats, Dogs, Towers", id="unknown"),
        pytest.param({"prompt": "a", "concepts": ["Cats"] * 2}, "each name once", id="concept-twice"),
        pytest.param({"prompt": "a", "id": ""}, "id: expected at most 100 letters", id="id-empty"),
        pytest.param({"prompt": "a", "id": "a/b"}, "got 'a/b'", id="id-slash"),
        pytest.param({"prompt": "a", "id": ".."}, "the first no dot, got '..'", id="id-dots"),
        pytest.param({"prompt": "a", "id": ".lbdt-x"}, "the first no dot", id="id-hidden"),
        pytest.param({"prompt": "a", "id": "a\n"}, r"got 'a\n'", id="id-newline"),
        pytest.param({"prompt": "a", "id": "ä"}, "got 'ä'", id="id-umlaut"),
        pytest.param({"prompt": "a", "id": "a" * 101}, "at most 100", id="id-long"),
        pytest.param({"prompt": "a", "id": 7}, "got 7", id="id-number"),
        pytest.param({"prompt": "a", "size": "512"}, "WIDTHxHEIGHT", id="size-one"),
        pytest.param({"prompt": "a", "size": "513x512"}, "multiples of 8", id="size-odd"),
        pytest.param({"prompt": "a", "size": [8, 8]}, "got a list", id="size-list"),
    ],
)
def test_a_faulty_line(tmp_path, row, said):
    with pytest.raises(JobLinesError) as refused:
        read(tmp_path, row)
    assert said in str(refused.value) and "jobs.jsonl, line 1: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_line_without_concepts_where_none_are_given(tmp_path):
    with pytest.raises(
        JobLinesError, match=r"line 1: concepts: which concepts\? Give a list of names, \[\] for none"
    ):
        read(tmp_path, {"prompt": "a"}, concepts=None)


@pytest.mark.parametrize("other", ["b", "000002"], ids=["given", "by-number"])
def test_ids_are_unique(tmp_path, other):
    rows = [{"prompt": "a", "id": other}, {"prompt": "b"} | ({"id": "b"} if other == "b" else {})]
    with pytest.raises(JobLinesError, match=f"line 2: id: '{other}' is that of line 1 too"):
        read(tmp_path, *rows)


def test_all_faults_are_told_at_once(tmp_path):
    rows = ["{", {"prompt": "a"}, {"prompt": "", "seed": -1}, *[{"prompt": 1}] * 30]
    with pytest.raises(JobLinesError) as refused:
        read(tmp_path, *rows)
    lines = str(refused.value).splitlines()
    assert lines[0].endswith("refused, 33 faults") and len(lines) == 22 and lines[-1] == "  and 13 more"
    assert [line[:9] for line in lines[1:4]] == ["  line 1:", "  line 3:", "  line 3:"]
    assert len(refused.value.faults) == 33


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no line"),
        (b"\n \n", "holds no line"),
        (b'{"prompt": "a"}\n\xff\n', "line 2: cannot be read"),
    ],
    ids=["empty", "blank", "no-utf8"],
)
def test_files_that_are_none(tmp_path, data, said):
    (tmp_path / "jobs.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_job(tmp_path / "jobs.jsonl", KNOWN, ["Cats"])
    with pytest.raises(ValueError, match="no such file; expected a file of JSON lines"):
        read_job(tmp_path / "none.jsonl", KNOWN)


def test_a_batch_has_one_size():
    lines = [
        JobLine(n, str(n), "", 0, (), size) for n, size in enumerate([None, (8, 8), None, None, (8, 8), None])
    ]
    assert [[line.number for line in batch] for batch in batches_of(lines, 3)] == [[0, 2, 3], [1, 4], [5]]
    assert batches_of([], 3) == []
