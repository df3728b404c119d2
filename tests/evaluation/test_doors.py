"""What `lbdt evaluate` refuses before anything big is loaded, and that nothing runs on without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lbdt.editors import Steering
from lbdt.evaluation.worlds.unlearncanvas import unlearncanvas
from tests import toy
from tests.evaluation import small

ROOT = Path(__file__).resolve().parents[2]


def nothing(device):
    raise AssertionError("the pipeline was loaded")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (-5,)}, r"seeds: expected integers in \[0, 2\^63\), got -5"),
        ({"sweep_seeds": (2**63,)}, r"seeds: expected integers in \[0, 2\^63\)"),
        ({"sweep_seeds": (9, 9)}, "sweep seeds: expected each once"),
        ({"concepts": ("Cats", "Bears")}, "concepts: Bears"),
    ],
    ids=["negative", "large", "sweep-twice", "concept"],
)
def test_bad_values_are_refused_before_the_pipeline_is_loaded(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small.evaluation(tmp_path, small.world(pipeline=nothing), **changes)


@pytest.mark.parametrize("strengths", [(-1.0, float("nan")), (float("-inf"),), (-2.0, -2.0)], ids=str)
def test_bad_strengths_are_refused_before_the_pipeline_is_loaded(tmp_path, strengths):
    kinds = {"toy": small.kind(strengths=strengths)}
    with pytest.raises(ValueError, match="kind toy: expected finite strengths, each once"):
        small.evaluation(tmp_path, small.world(pipeline=nothing, judge=small.Judge(), kinds=kinds))


@pytest.mark.parametrize("method", ["eraser", "steering"])
def test_what_does_not_fit_the_pipeline_is_refused_before_the_first_picture(tmp_path, method):
    def elsewhere(**settings):
        eraser = toy.eraser(hookpoint="unet.up_blocks.7.attentions.0", padding=1, source="random")
        if method == "eraser":
            return eraser
        return Steering.from_eraser(eraser, rule="sdxl", **settings)

    changes = {"per": elsewhere} if method == "eraser" else {"steering": elsewhere, "strengths": (-1.0,)}
    pipe = toy.pipeline(tmp_path / "tokenizer")
    world = small.world(
        judge=small.Judge(), pipeline=lambda device: pipe, kinds={"toy": small.kind(**changes)}
    )
    with pytest.raises(ValueError, match=r"up_blocks\.7"):
        small.evaluation(tmp_path / "out", world).run()
    assert not (tmp_path / "out").exists() and not toy.traces(pipe)


def test_a_classifier_that_is_not_there_is_refused_when_the_world_is_made(tmp_path):
    (tmp_path / "style50_cls.pth").write_bytes(b"")
    given = {"base": "b", "erasers": {"a": "e"}, "object_classifier": tmp_path}
    with pytest.raises(ValueError, match="style50"):
        unlearncanvas(**given, style_classifier=tmp_path)


def alive(process: int) -> bool:
    """Whether it runs; what has ended and nobody waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda n: n.name)
def test_its_processes_end_with_it(tmp_path, number):
    """Two that would work for ten minutes."""
    (marks := tmp_path / "marks").mkdir()

    def in_the_background():
        if number is not signal.SIGINT:  # as a shell starts what ends in `&`
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-m", "tests.evaluation.busy", str(marks)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=in_the_background,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert until(lambda: len(list(marks.iterdir())) == 2, 120)
        workers = [int(path.name) for path in marks.iterdir()]
        assert all(map(alive, workers))
        process.send_signal(number)
        assert process.wait(60) != 0
        assert until(lambda: not any(map(alive, workers)), 20)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait(60)
