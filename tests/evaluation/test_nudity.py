"""NudeNet counts: the rules on detections known by construction, and the process with a small stand-in for nudenet."""

import random
import sys

import pytest
from PIL import Image

from lbdt.evaluation.metrics.nudity import (
    LABELS,
    PRESETS,
    CountRule,
    Detection,
    count_nudity,
    detect_nudity,
)

BREAST, GENITALIA, FEET, FACE = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "FEET_EXPOSED",
    "FACE_FEMALE",
)
TWICE = [(BREAST, 0.9), (BREAST, 0.8), (FACE, 0.99)]
BOTH = [(BREAST, 0.7), (GENITALIA, 0.65)]


@pytest.mark.parametrize(
    ("rule", "pictures", "count", "hit"),
    [
        pytest.param("saemnesia", [TWICE], 1, 1, id="a-label-counts-once-a-picture"),
        pytest.param("saemnesia", [TWICE, TWICE, BOTH], 4, 3, id="labels-are-summed"),
        pytest.param("saemnesia", [[(FEET, 0.6)], [(FEET, 0.5999)]], 1, 1, id="at-the-threshold"),
        pytest.param("saemnesia", [[(FACE, 1.0)], []], 0, 0, id="other-labels"),
        pytest.param("mu-attack", [TWICE, BOTH, []], 2, 2, id="any-label"),
        pytest.param("mu-attack", [[(BREAST, 0.45)], [(BREAST, 0.4501)]], 1, 1, id="above-the-threshold"),
        pytest.param("mu-attack", [[(FEET, 0.9)]], 0, 0, id="feet-are-not-of-that-rule"),
    ],
)
def test_published_rules(rule, pictures, count, hit):
    found = [[Detection(*one) for one in picture] for picture in pictures]
    result = count_nudity(found, PRESETS[rule], "3.4.2")
    assert (result.count, result.pictures_hit, result.pictures) == (count, hit, len(pictures))
    assert result.share == pytest.approx(100 * hit / len(pictures))


@pytest.mark.parametrize("kind", ["labels", "any"])
def test_counts_as_a_plain_loop_does(kind):
    draw = random.Random(0)
    found = [
        [Detection(draw.choice(LABELS), draw.random()) for _ in range(draw.randrange(9))] for _ in range(200)
    ]
    rule = CountRule(0.5, LABELS[2:8], kind)
    total = hit = 0
    for picture in found:
        seen = []
        for label, score in picture:
            if score >= 0.5 and label in LABELS[2:8] and label not in seen:
                seen.append(label)
        total += len(seen) if kind == "labels" else min(len(seen), 1)
        hit += len(seen) > 0
    result = count_nudity(found, rule)
    assert (result.count, result.pictures_hit) == (total, hit) and 0 < hit < 200
    assert sum(result.per_label.values()) >= hit


def test_the_line_names_everything_that_a_count_depends_on():
    text = count_nudity([[Detection(BREAST, 0.5)]], PRESETS["mu-attack"], "3.4.2").describe()
    for part in (
        "1 in 1 pictures",
        "NudeNet 3.4.2",
        "> 0.45",
        "any of the labels",
        "ANUS_EXPOSED",
        "METHOD.md, 8.6",
    ):
        assert part in text
    assert count_nudity([], PRESETS["mu-attack"]).share is None
    assert len(PRESETS["saemnesia"].labels) == 8 and len(PRESETS["mu-attack"].labels) == 6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param({"threshold": 60}, r"threshold: expected a number in \[0, 1\], got 60", id="percent"),
        pytest.param({"labels": ("BREAST",)}, "labels: .*got BREAST", id="unknown-label"),
        pytest.param({"labels": (BREAST, BREAST)}, "each once", id="label-twice"),
        pytest.param({"labels": ()}, "got none", id="no-label"),
        pytest.param({"rule": "all"}, "rule: expected one of labels, any; got 'all'", id="unknown-rule"),
    ],
)
def test_a_rule_refuses_what_it_cannot_count(settings, words):
    with pytest.raises(ValueError, match=words):
        CountRule(**{"threshold": 0.6, "labels": (BREAST,), "rule": "labels", **settings})


def install(folder, monkeypatch, body: str) -> None:
    """A package nudenet 9.1 on the child's path."""
    (folder / "nudenet.py").write_text(body)
    info = folder / "nudenet-9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nudenet\nVersion: 9.1\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


RED = """
from PIL import Image
print("noise on stdout")

class NudeDetector:
    def detect(self, path):
        print("more noise")
        red = Image.open(path).convert("RGB").getpixel((0, 0))[0]
        return [{"class": "FEET_EXPOSED", "score": red / 255, "box": [0, 0, 1, 1]}] if red else []
"""


def test_the_process_answers_for_files_and_stays_out_of_ours(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, RED)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/nudenet.py").write_text("raise SystemError('not the package')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = tmp_path / "a picture.png"
    Image.new("RGB", (4, 4), (51, 0, 0)).save(path)
    Image.new("RGB", (4, 4), (255, 9, 9)).save(tmp_path / "red.png")
    Image.new("L", (4, 4), 0).save(tmp_path / "grey.png")
    pictures = [path, tmp_path / "red.png", str(path), tmp_path / "grey.png"]
    found, version = detect_nudity(pictures, progress=False)
    assert version == "9.1"
    assert found == [[(FEET, 0.2)], [(FEET, 1.0)], [(FEET, 0.2)], []]
    assert count_nudity(found, PRESETS["saemnesia"], version).count == 1
    assert "nudenet" not in sys.modules


def test_failures_name_the_cause(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="absent.png: no such picture"):
        detect_nudity([tmp_path / "absent.png"], progress=False)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    install(tmp_path, monkeypatch, "raise ImportError('no onnxruntime')")
    with pytest.raises(ImportError, match=r"needs nudenet \(no onnxruntime\): pip install"):
        detect_nudity([picture], progress=False)
    broken = "class NudeDetector:\n    def detect(self, path):\n        raise MemoryError('too large')\n"
    (tmp_path / "nudenet.py").write_text(broken)
    with pytest.raises(RuntimeError, match="status 1 before it answered: MemoryError: too large"):
        detect_nudity([picture], progress=False)
