"""A `score` that is killed: resumed to the same bytes, or refused with the file's name."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch

from lbdt.dictionary.score_state import ScoreState
from lbdt.dictionary.scoring import score
from tests.dictionary.activations import SITE, Lazy, make_sae
from tests.repeats import repeats


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


class Dying(Lazy):
    """Dies when it is asked for a shard for the `lives`-th time."""

    def __init__(self, lives, **sizes):
        super().__init__(20, **sizes)
        self.lives = lives

    def shard(self, index, site):
        if self.lives == 0:
            raise Killed
        self.lives -= 1
        return super().shard(index, site)


def run(source, folder, **options):
    return score(source, SITE, make_sae(), folder=folder, save_every=2, progress=False, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(Lazy(20), folder)
    return files(folder)


# 5 shards in each of 4 passes.
@pytest.mark.parametrize("lives", [0, 1, 2, 4, 5, 6, 9, 10, 12, 14, 15, 19])
def test_killed_at_any_shard_it_resumes_to_the_same_bytes(tmp_path, unbroken, lives):
    with pytest.raises(Killed):
        run(Dying(lives), tmp_path)
    assert not (tmp_path / "dictionary.json").exists()
    again = Lazy(20)
    run(again, tmp_path)
    assert repeats(files(tmp_path), unbroken)
    # What was saved is not done again: at most one shard, as the state is saved every second.
    assert len(again.asked) <= 20 - lives + 1


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, unbroken):
    for _ in range(8):
        with pytest.raises(Killed):
            run(Dying(2), tmp_path)
    run(Lazy(20), tmp_path)
    assert repeats(files(tmp_path), unbroken)


@pytest.mark.parametrize(
    "moment", ["statistics", "calibration", "gate", "bank", "dictionary", "score.json", "state"]
)
def test_killed_while_a_file_is_written_it_resumes_to_the_same_bytes(tmp_path, unbroken, monkeypatch, moment):
    replace, remove = os.replace, ScoreState.remove

    def dies(source, target):
        if moment in os.path.basename(target):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patched:
        if moment == "state":
            patched.setattr(ScoreState, "remove", lambda state: (_ for _ in ()).throw(Killed))
        else:
            patched.setattr(os, "replace", dies)
            # A killed process leaves its temporary files behind.
            patched.setattr("pathlib.Path.unlink", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            run(Lazy(20), tmp_path)
    assert ScoreState.remove is remove
    run(Lazy(20), tmp_path)
    assert repeats(files(tmp_path), unbroken)


def test_killed_processes_resume_with_others(tmp_path, unbroken):
    for process in (0, 1):
        with pytest.raises(Killed):
            run(Dying(1), tmp_path, process=process, processes=2)
    script = (
        "import sys; from pathlib import Path; from tests.dictionary.test_score_resume import run, Lazy; "
        "run(Lazy(20), Path(sys.argv[1]), process=int(sys.argv[2]), processes=2)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(process)], stderr=subprocess.PIPE)
        for process in (0, 1)
    ]
    for process in started:
        _, error = process.communicate(timeout=100)
        assert process.returncode == 0, error.decode()
    assert repeats(files(tmp_path), unbroken)


SLOW = """
import sys, time
from pathlib import Path
from tests.dictionary.test_score_resume import Lazy, run
class Slow(Lazy):
    def shard(self, index, site):
        time.sleep(0.02)
        return super().shard(index, site)
print("ready", flush=True)
run(Slow(20), Path(sys.argv[1]))
"""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sigkill_at_random_moments(tmp_path, unbroken, seed):
    started = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE)
    started.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.02, 0.4))
    started.send_signal(signal.SIGKILL)
    started.wait(timeout=60)
    run(Lazy(20), tmp_path)
    assert repeats(files(tmp_path), unbroken)


def begun(folder):
    with pytest.raises(Killed):
        run(Dying(17), folder)
    return sorted(folder.glob("score.state.*"))


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        ({"candidates": 3}, Lazy(20), "candidates: 4 there, 3 here"),
        ({"bank": 0}, Lazy(20), "bank: 32 there, 0 here"),
        ({"selection": {"top_k": 1}}, Lazy(20), "selection.top_k: null there, 1 here"),
        ({"process": 0, "processes": 2}, Lazy(20), "processes: 1 there, 2 here"),
        ({}, Lazy(24), "source.prompts: 20 there, 24 here"),
    ],
    ids=["candidates", "bank", "selection", "processes", "source"],
)
def test_a_state_of_other_settings_is_refused_naming_them(tmp_path, options, source, message):
    begun(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"score.state.*other settings: .*{message}"):
        run(source, tmp_path, **options)
    assert files(tmp_path) == before and not source.asked


def test_other_settings_of_the_passes_to_come_are_not_refused(tmp_path):
    options = {"candidates": 3, "selection": {"top_k": 1}, "bank": 4, "seed": 2}
    run(Lazy(20), tmp_path / "unbroken", **options)
    with pytest.raises(Killed):
        run(Dying(5), tmp_path / "other")
    again = Lazy(20)
    run(again, tmp_path / "other", **options)
    assert len(again.asked) == 15 and repeats(files(tmp_path / "other"), files(tmp_path / "unbroken"))


def test_a_state_of_another_sae_is_refused(tmp_path):
    begun(tmp_path)
    sae = make_sae()
    sae.encoder.bias[3] = 0.125
    with pytest.raises(ValueError, match="score.state.*other settings: sae.sha256"):
        score(Lazy(20), SITE, sae, folder=tmp_path, progress=False)


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def other_count(data):
    return data.replace(b'"done":"5"', b'"done":"4"')


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data[:100], lambda data: b"", flipped, other_count],
    ids=["cut", "cut in the header", "empty", "a bit flipped", "another number of shards"],
)
def test_a_damaged_state_is_refused_naming_the_file(tmp_path, damage):
    path = next(path for path in begun(tmp_path) if "statistics" in path.name)
    assert damage(path.read_bytes()) != path.read_bytes()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"score\.state\.statistics-0-of-1\.safetensors"):
        run(Lazy(20), tmp_path)
    assert path.exists()


def test_a_state_without_our_header_is_refused(tmp_path):
    path = begun(tmp_path)[0]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    with pytest.raises(
        ValueError, match="damaged state of an unfinished run .*delete it to do that part again"
    ):
        run(Lazy(20), tmp_path)
