"""What a record may hold, and that it comes back from its line."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbdt.serving.audit import AuditLog, PictureRecord
from lbdt.serving.audit_check import verify
from lbdt.serving.audit_lines import FIELDS, canonical, seal, unseal
from tests.serving.audits import KEY, TIME, fields, lines, record, values


def test_a_record_has_the_fields_of_a_line_and_no_prompt():
    assert set(fields()) == set(FIELDS) and not [name for name in FIELDS if "prompt" in name]
    made = record(detected=[1, 2], replaced=[0, 0], concepts=["Cats"])
    assert (made.detected, made.replaced, made.concepts) == ((1, 2), (0, 0), ("Cats",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.tenant = "another"
    with pytest.raises(TypeError, match="prompt"):
        record(prompt="a cat")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"concepts": (), "detected": (), "replaced": (), "outcome": "unprotected"}, id="no-concept"
        ),
        pytest.param({"gated": True, "replaced": (0, 0, 0)}, id="gated"),
        pytest.param({"outcome": "refused", "reason": "policy", "image": None}, id="refused"),
        pytest.param({"outcome": "refused", "reason": "policy", "fallback": "blank"}, id="fallback-released"),
        pytest.param({"outcome": "failed", "reason": "out of memory", "image": None}, id="failed"),
        pytest.param({"outcome": "unprotected", "image": None}, id="unprotected-and-kept"),
        pytest.param({"seed": -(2**63)}, id="lowest-seed"),
        pytest.param({"seed": 2**64 - 1, "index": 2**31 - 1}, id="highest-seed"),
        pytest.param({"request": "é\x00\n\u2028\U0001f600" * 200}, id="odd-characters"),
        pytest.param({"finished": "2025-01-01T00:00:00.000000+00:00"}, id="clock-was-set"),
    ],
)
def test_records_that_are_taken(changes, tmp_path):
    made = record(**changes)
    with AuditLog(tmp_path) as log:
        log.write([made])
    assert PictureRecord.from_dict(values(lines(log.path)[1])["record"]) == made
    assert verify(tmp_path).outcomes[made.outcome] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"request": ""}, "request: expected a text of 1 to 1000 characters, got ''", id="empty"),
        pytest.param({"tenant": "x" * 1001}, r"tenant: expected a text .*\(1001 characters\)", id="long"),
        pytest.param({"tenant": 7}, "tenant: expected a text .* got 7", id="number-for-text"),
        pytest.param(
            {"tenant": "\ud800"}, "tenant: expected Unicode text, got the lone surrogate", id="surrogate"
        ),
        pytest.param({"policy_version": None}, "policy_version: expected a text .* got None", id="none"),
        pytest.param(
            {"policy_digest": "ABCDEF0123456789"}, "policy_digest: expected 16 to 128 lower", id="capital"
        ),
        pytest.param({"eraser": "ab" * 7}, "eraser: expected 16 to 128", id="short-digest"),
        pytest.param({"image": "cd" * 31}, "image: expected 64 lower-case", id="no-sha256"),
        pytest.param({"image": "cd" * 32 + "\n"}, "image: expected 64 lower-case", id="line-end"),
        pytest.param({"index": -1}, "index: expected a whole number from 0 to", id="negative"),
        pytest.param({"index": True}, "index: expected a whole number .* got True", id="bool-for-number"),
        pytest.param({"seed": 2**64}, "seed: expected a whole number", id="large-seed"),
        pytest.param({"seed": 1.0}, "seed: expected a whole number .* got 1.0", id="float-seed"),
        pytest.param({"gated": 0}, "gated: expected True or False, got 0", id="number-for-bool"),
        pytest.param(
            {"concepts": "Cats"}, "concepts: expected a tuple or list, got 'Cats'", id="text-for-list"
        ),
        pytest.param({"concepts": ("Cats", "")}, "concepts: expected a text", id="empty-concept"),
        pytest.param({"detected": (1, -1, 0)}, "detected: expected a whole number", id="negative-count"),
        pytest.param({"replaced": (1, 2)}, "replaced: expected a number for each of the 3 steps", id="steps"),
        pytest.param({"gated": True}, "gated: expected no patch replaced", id="gated-and-replaced"),
        pytest.param(
            {"outcome": "fine"},
            "outcome: expected one of protected, unprotected, refused, failed",
            id="outcome",
        ),
        pytest.param(
            {"image": None}, "image: expected the digest of what is released", id="protected-no-image"
        ),
        pytest.param({"outcome": "refused"}, "reason: expected why", id="refused-no-reason"),
        pytest.param({"outcome": "failed", "reason": "why"}, "image: expected None", id="failed-with-image"),
        pytest.param({"reason": ""}, "reason: expected a text", id="empty-reason"),
        pytest.param({"started": TIME.replace("+00:00", "Z")}, "started: expected UTC as in", id="z"),
        pytest.param({"started": TIME.replace("+00:00", "+01:00")}, "started: expected UTC", id="other-zone"),
        pytest.param(
            {"finished": "2026-02-30T00:00:00.000000+00:00"}, "finished: expected UTC", id="30-february"
        ),
        pytest.param(
            {"finished": "2026-01-31T23:59:59+00:00"}, "finished: expected UTC", id="no-microseconds"
        ),
    ],
)
def test_records_that_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        record(**changes)


@pytest.mark.parametrize(
    ("given_values", "words"),
    [
        pytest.param(
            fields() | {"prompt": "a cat"},
            "unknown field 'prompt'; expected concepts, detected",
            id="unknown",
        ),
        pytest.param({"request": "x"}, "missing field 'concepts', 'detected'", id="missing"),
        pytest.param([], "record: expected an object, got list", id="list"),
    ],
)
def test_objects_that_are_no_record(given_values, words):
    with pytest.raises(ValueError, match=words):
        PictureRecord.from_dict(given_values)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40)
COUNTS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), max_size=5)


@given(
    request=TEXT, concepts=st.lists(TEXT, max_size=3), counts=COUNTS, seed=st.integers(-(2**63), 2**64 - 1)
)
def test_any_record_comes_back_from_its_line(request, concepts, counts, seed):
    detected, replaced = [d for d, _ in counts], [r for _, r in counts]
    made = record(request=request, concepts=concepts, detected=detected, replaced=replaced, seed=seed)
    for key in (None, KEY):
        line, digest = seal({"n": 1, "previous": NOTHING, "record": made.as_dict()}, key)
        body, said = unseal(line[:-1])
        assert line.count(b"\n") == 1 and said == digest == json.loads(line)["hash"]
        found = json.loads(body)
        assert PictureRecord.from_dict(found["record"]) == made and canonical(found) == body


NOTHING = "0" * 64
