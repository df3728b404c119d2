"""Everything that may happen to an audit file, and what the check says of it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbdt.serving.audit_check import MOST_FAULTS, AuditFault, verify
from lbdt.serving.audit_lines import MOST_LINE, seal
from tests.serving.audits import (
    KEY,
    faults,
    fields,
    lines,
    put,
    rebuilt,
    record,
    values,
    with_record,
    written,
)

# Lines count from 1: the header; of 4 pictures, those of 2 to 5, and the end line.


def changed(line: bytes, old: bytes, new: bytes) -> bytes:
    assert line.count(old) == 1
    return line.replace(old, new)


def edited(number: int, old: bytes, new: bytes):
    return lambda all_: [changed(line, old, new) if at == number else line for at, line in enumerate(all_, 1)]


def sealed(number: int, change):
    """A line's fields changed, and its own hash made anew."""
    return lambda all_: [
        seal(change(values(line)), None)[0] if at == number else line for at, line in enumerate(all_, 1)
    ]


def forged(all_: list[bytes]) -> bytes:
    line = {"n": 5, "previous": json.loads(all_[4])["hash"], "record": record(9).as_dict()}
    return seal(line, None)[0]


HASH = "hash: the line is not what "
PREVIOUS = "previous: expected "
N = "n: expected {}, got {}: lines are missing, put in or out of order"
SPELT = "the same values are spelt otherwise than the writer spells them"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(edited(3, b'"seed":1', b'"seed":8'), [f"3: {HASH}"], id="edit"),
        pytest.param(edited(6, b'"end":4', b'"end":3'), ["6: end: says 3 pictures, got 4"], id="edit-end"),
        pytest.param(edited(1, b'"chain":"', b'"chain":"0'), ["1: chain: "], id="edit-header"),
        pytest.param(sealed(3, with_record(seed=8)), [f"4: {PREVIOUS}"], id="edit-and-hash"),
        pytest.param(
            sealed(1, lambda found: found | {"chain": "0" * 64}), [f"2: {PREVIOUS}"], id="other-chain"
        ),
        pytest.param(
            edited(3, b'"outcome":"protected"', b'"outcome":"fine"'),
            ["3: record: outcome: expected one of"],
            id="outcome",
        ),
        pytest.param(
            sealed(3, with_record(image=None)),
            ["3: record: image: expected the digest", f"4: {PREVIOUS}"],
            id="no-image",
        ),
        pytest.param(
            sealed(3, with_record(prompt="a cat")),
            ["3: record: unknown field 'prompt'", f"4: {PREVIOUS}"],
            id="unknown-field-of-a-record",
        ),
        pytest.param(
            sealed(3, lambda found: found | {"note": 1}),
            ["3: unknown field 'note'; expected n, previous, record", f"4: {PREVIOUS}"],
            id="unknown-field",
        ),
        pytest.param(
            sealed(3, lambda found: {k: found[k] for k in ("n", "record")}),
            ["3: missing field 'previous'", f"4: {PREVIOUS}"],
            id="missing-field",
        ),
        pytest.param(
            sealed(3, lambda found: found | {"n": 2.0}),
            ["3: n: expected a whole number from 1, got 2.0", f"4: {PREVIOUS}"],
            id="n-is-a-float",
        ),
        pytest.param(
            sealed(3, lambda found: {"n": 2}),
            ["3: neither a picture's line nor an end line", f"4: {PREVIOUS}"],
            id="neither",
        ),
        pytest.param(
            sealed(6, lambda found: found | {"next": "../x"}),
            ["6: next: expected an audit file's name or null, got '../x'"],
            id="path-for-a-name",
        ),
        pytest.param(
            sealed(1, lambda found: found | {"lbdt_audit": 2}),
            ["1: lbdt_audit: expected 1, got 2", f"2: {PREVIOUS}"],
            id="schema",
        ),
        pytest.param(
            sealed(1, lambda found: found | {"lbdt_audit": True}),
            ["1: lbdt_audit: expected 1, got True", f"2: {PREVIOUS}"],
            id="schema-true",
        ),
        pytest.param(
            sealed(1, lambda found: found | {"began": "today"}),
            ["1: began: expected UTC as in ", f"2: {PREVIOUS}"],
            id="began",
        ),
        pytest.param(
            sealed(6, lambda found: found | {"ended": None}),
            ["6: ended: expected UTC as in "],
            id="ended",
        ),
        pytest.param(
            sealed(1, lambda found: found | {"hashing": "md5"}),
            ["1: hashing: expected sha256 or hmac-sha256, got 'md5'", f"2: {PREVIOUS}"],
            id="hashing",
        ),
        pytest.param(
            sealed(1, lambda found: found | {"previous": "0" * 64}),
            ["1: expected follows and previous both", f"2: {PREVIOUS}"],
            id="previous-of-none",
        ),
        pytest.param(
            lambda all_: [*all_[:2], all_[3], all_[2], *all_[4:]],
            [f"3: {N.format(2, 3)}", f"4: {N.format(4, 2)}", f"5: {N.format(3, 4)}"],
            id="swap",
        ),
        pytest.param(lambda all_: [*all_[:2], *all_[3:]], [f"3: {N.format(2, 3)}"], id="remove"),
        pytest.param(
            lambda all_: [*all_[:4], all_[5]], ["5: end: says 4 pictures, got 3"], id="remove-last-picture"
        ),
        pytest.param(lambda all_: all_[1:], ["1: expected a header, got another line"], id="remove-header"),
        pytest.param(
            lambda all_: [all_[0], *all_], ["2: neither a picture's line nor an end line"], id="second-header"
        ),
        pytest.param(lambda all_: [*all_[:3], all_[2], *all_[3:]], [f"4: {N.format(3, 2)}"], id="duplicate"),
        pytest.param(lambda all_: [*all_, forged(all_)], ["7: a line after the end line"], id="append"),
        pytest.param(lambda all_: [*all_, all_[-1]], ["7: a line after the end line"], id="second-end"),
        pytest.param(
            lambda all_: [*all_, b"{"], ["7: trailing bytes after the end line"], id="append-a-part"
        ),
        pytest.param(
            lambda all_: [*all_[:5], forged(all_), all_[5]], ["7: end: says 4 pictures, got 5"], id="put-in"
        ),
        pytest.param(
            lambda all_: [*all_[:3], b"\n", *all_[3:]], ["4: not JSON (Expecting value)"], id="empty-line"
        ),
        pytest.param(
            lambda all_: [line.replace(b"\n", b"\r\n") for line in all_],
            [f'{n}: ends by "\\r\\n"; expected "\\n" alone' for n in range(1, 7)],
            id="crlf",
        ),
        pytest.param(edited(3, b'"n":2', b'"n":\x002'), ["3: not JSON"], id="nul"),
        pytest.param(edited(3, b'"n":2', b'"n": 2'), [f"3: {SPELT}"], id="space"),
        pytest.param(edited(3, "猫".encode(), b"\\u732b"), [f"3: {SPELT}"], id="escape"),
        pytest.param(edited(3, b'"n":2', b'"n":2,"n":2'), [f"3: {SPELT}"], id="twice-named"),
        pytest.param(edited(3, b'"seed":1', b'"seed":NaN'), [f"3: {SPELT}"], id="nan"),
        pytest.param(edited(3, "猫".encode(), b"\\ud800"), [f"3: {SPELT}"], id="surrogate"),
        pytest.param(edited(3, "猫".encode(), b"\xe7\x8c"), ["3: not UTF-8 at byte "], id="utf-8"),
        pytest.param(
            edited(1, b'{"began"', b'\xef\xbb\xbf{"began"'),
            ["1: not JSON (Unexpected UTF-8 BOM"],
            id="byte-order-mark",
        ),
        pytest.param(
            edited(3, b'"seed":1', b'"seed":' + b"9" * 5000),
            ["3: not JSON (too deep, or a number too long)"],
            id="long-number",
        ),
        pytest.param(
            edited(3, b'"seed":1', b'"seed":' + b"[" * 100_000), ["3: not JSON (too deep"], id="deep"
        ),
        pytest.param(
            edited(3, b'"seed":1', b'"seed":' + b"1" * MOST_LINE),
            [f"3: expected at most {MOST_LINE} bytes"],
            id="long-line",
        ),
        pytest.param(
            edited(3, b',"hash":"', b',"hash":"A'),
            ["3: expected a hash of 64 hexadecimal digits at its end"],
            id="long-hash",
        ),
        pytest.param(lambda all_: [*all_[:2], b"[1]\n", *all_[2:]], ["3: expected a JSON object"], id="list"),
    ],
)
def test_tampering_is_found(change, found, tmp_path):
    path = written(tmp_path)
    put(path, change(lines(path)))
    told = faults(path)
    assert len(told) == len(found) and all(map(str.startswith, told, found)), told


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(lambda all_: rebuilt(map(values, all_[:3])), [], id="tail-left-out"),
        pytest.param(
            lambda all_: rebuilt(
                [with_record(seed=9)(values(line)) if b'"n":2' in line else values(line) for line in all_]
            ),
            [],
            id="all-made-anew",
        ),
        pytest.param(
            lambda all_: rebuilt(
                [*map(values, all_[:5]), {"n": 5, "record": fields(0)}, values(all_[5]) | {"end": 5}]
            ),
            ["6: request 'request-0', index 0: has a line already"],
            id="duplicate-picture",
        ),
    ],
)
def test_what_a_forger_makes_anew_is_found_by_a_hash_kept_elsewhere_or_a_key_alone(change, found, tmp_path):
    """The rest of what is forged, such as a second line of a picture, is found without."""
    path = written(tmp_path / "plain")
    kept = json.loads(lines(path)[-1])["hash"]
    path.write_bytes(change(lines(path)))
    assert faults(path) == found
    (*_, told) = faults(path, expect=kept)
    assert told.startswith(f"0: expected the last hash to be {kept[:12]}..., which no line has; got ")
    keyed = written(tmp_path / "keyed", key=KEY)
    keyed.write_bytes(change(lines(keyed)))
    told = faults(keyed, key=KEY)
    assert len(told) >= len(lines(keyed)) and all("under this key" in text or text in found for text in told)


def test_lines_that_came_after_the_kept_hash_are_told_from_a_lost_one(tmp_path):
    path = written(tmp_path)
    kept = json.loads(lines(path)[2])["hash"]
    assert faults(tmp_path, expect=kept) == [
        f"0: expected the last hash to be {kept[:12]}..., which is that of line 3 of {path}: lines came after it"
    ]


def test_the_kept_hash_is_of_any_file_of_a_folder(tmp_path):
    kept = [json.loads(lines(written(tmp_path, 0))[-1])["hash"] for _ in range(3)]
    assert all(verify(tmp_path, expect=each).finished for each in kept)
    assert len(faults(tmp_path, expect="0" * 64)) == 1


def test_another_key_and_none(tmp_path):
    path = written(tmp_path, key=KEY)
    told = faults(path, key=KEY[::-1])
    assert len(told) == 6 and all(text.endswith("was made of under this key") for text in told)
    with pytest.raises(ValueError, match=f"{path}: was written with a key; give that key"):
        verify(path)


def test_a_key_does_not_take_a_file_without(tmp_path):
    """Or whoever lacks the key could write all of it anew, without one."""
    path = written(tmp_path)
    assert faults(path, key=KEY)[0] == "1: hashing: expected hmac-sha256, as a key is given, got sha256"


def test_the_first_twenty_faults_are_told_and_the_others_counted(tmp_path):
    path = written(tmp_path, 30)
    path.write_bytes(path.read_bytes().replace(b"protected", b"PROTECTED"))
    with pytest.raises(AuditFault, match="10 more faults$") as error:
        verify(path)
    assert (len(error.value.faults), error.value.count, MOST_FAULTS) == (20, 30, 20)
    assert error.value.summary.pictures == 0 and error.value.summary.lines == 32


# Any change.


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("audit"), 3, key=KEY)


@given(data=st.data(), how=st.sampled_from(["change", "remove", "put in"]), byte=st.integers(0, 255))
def test_any_byte_that_is_changed_is_found(original, data, how, byte):
    """A fault, but for the last byte: without it the end line is one that is cut off."""
    before = original.read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    middle = {"change": bytes([byte]), "remove": b"", "put in": bytes([byte, before[at]])}[how]
    after = before[:at] + middle + before[at + 1 :]
    path = original.with_name("changed")
    path.write_bytes(after)
    if after == before:
        assert faults(path, key=KEY) == []
    elif at == len(before) - 1 and how != "put in":
        assert not verify(path, key=KEY).finished and faults(path, key=KEY, strict=True)
    else:
        assert faults(path, key=KEY)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_another_error(original, data):
    path = original.with_name("other")
    path.write_bytes(data)
    assert faults(path) or not verify(path).finished
