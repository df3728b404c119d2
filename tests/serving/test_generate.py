"""`lbdt generate`: the same bytes however a job is run, killed and continued; what is refused, and what is said."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from lbdt import canvas
from lbdt.serving import job_files, job_workers
from lbdt.serving.job_files import picture_file
from lbdt.serving.job_lines import JobLine
from lbdt.serving.job_workers import BatchDone, JobWorker, WorkerSettings
from lbdt.serving.jobs import generate
from tests.repeats import repeats
from tests.serving.jobs import BROKEN, SMALL, begin, content, files, lbdt, prompt, records, small_job, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spoiled(monkeypatch):
    """A pipeline whose text encoder gives NaN for one prompt, as an overflow does."""
    load = canvas.load_pipeline

    def loaded():
        pipe = load()
        ids = torch.tensor(pipe.tokenizer(BROKEN, padding="max_length").input_ids)

        def spoil(module, args, kwargs, output):
            given = args[0] if args else kwargs["input_ids"]
            output.last_hidden_state[(given == ids).all(1)] = torch.nan
            return output

        pipe.text_encoder.register_forward_hook(spoil, with_kwargs=True)
        return pipe

    with monkeypatch.context() as patch:
        patch.setattr(canvas, "load_pipeline", loaded)
        yield patch


def test_what_a_folder_holds(unbroken):
    names = ["000001.png", "000003.png", "000005.png", "A_small-one.png", "dogs.1.png"]
    others = ["model.json", "prompts.jsonl", "records.jsonl", "settings.json", "summary.json"]
    assert sorted(files(unbroken)) == [*others[:1], *(f"pictures/{name}" for name in names), *others[1:]]
    rows = records(unbroken)
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["seed"] for row in rows] == [1, 1, 2**63 - 1, 4, 5]
    assert [row["concepts"] for row in rows] == [["Cats"], ["Dogs", "Towers"], [], ["Cats"], ["Human"]]
    assert all(row["outcome"] == "protected" and len(row["detected"]) == 2 for row in rows)
    assert rows[2]["detected"] == [0, 0] and sum(rows[0]["replaced"]) > 0
    summary = json.loads((unbroken / "summary.json").read_text())
    del summary["records"]
    counts = {"lines": 5, "pictures": 5, "protected": 4, "without_concepts": 1}
    assert summary == counts | {"unprotected": [], "refused": {}}


def test_a_finished_job_does_nothing(prompts, unbroken, monkeypatch):
    monkeypatch.setattr(JobWorker, "__init__", lambda self, settings: pytest.fail("an engine was loaded"))
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    done = lbdt(prompts, "--out", unbroken, "--concept", "Cats", *SMALL)
    assert done.exit_code == 0, done.output
    assert "nothing to do: all 5 pictures are in" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_a_job_that_lacks_its_summary_alone_loads_nothing(prompts, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(JobWorker, "__init__", lambda self, settings: pytest.fail("an engine was loaded"))
    begin(unbroken, tmp_path / "out", [1, 2, 3, 4, 5])
    result = generate(small_job(prompts, tmp_path / "out", workers=2))
    assert (result.made, result.interrupted) == (0, False) and files(tmp_path / "out") == files(unbroken)


def test_two_workers(prompts, unbroken, tmp_path):
    result = generate(small_job(prompts, tmp_path / "out", workers=2))
    assert result.made == 5 and repeats(content(tmp_path / "out"), content(unbroken))


def test_ray_data(prompts, unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        # What is there stays; an actor for two batches, so that what it did first is not seen in what comes then.
        begin(unbroken, tmp_path / "out", [2])
        result = generate(small_job(prompts, tmp_path / "out", ray=True))
        assert ray.is_initialized() and repeats(content(tmp_path / "out"), content(unbroken))
        with pytest.raises(ValueError, match="a worker needs 64 CPU, and the cluster has 2"):
            generate(small_job(prompts, tmp_path / "other", ray=True, threads=64))
    finally:
        ray.shutdown()
    assert (result.made, result.there) == (4, 1)


def test_a_fault_on_a_node_is_told_as_it_is(unbroken, tmp_path):
    from lbdt.serving.job_ray import RayWorker, done_of

    begin(unbroken, tmp_path / "out", [1])
    given = WorkerSettings(
        tmp_path / "out",
        5,
        "another",
        "refuse",
        None,
        None,
        "sdxl",
        "cpu",
        steps=2,
        guidance=None,
        batch=2,
        threads=1,
    )
    told = RayWorker(given)({"batch": np.array(['[[1, "000001", "a", 1, [], null]]'])})["done"]
    with pytest.raises(RuntimeError, match="the eraser here is not the job's"):
        done_of(told[0])
    assert done_of('{"pictures": 1, "refused": 2, "unprotected": 3}') == BatchDone(1, 2, 3)


KILLED = """
import json, os, random, signal, sys
from lbdt.serving.jobs import PictureJob, generate

job, draw = PictureJob(**json.loads(sys.argv[1])), random.Random(int(sys.argv[2]))
for _ in range(3):
    at = draw.randrange(2, 7)
    if not (pid := os.fork()):
        def die(event, arguments):
            global at
            if event == "os.rename":
                at -= 1
            if event == "os.rename" and at < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
        generate(job)
        os._exit(0)
    killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
    print(at, killed, sorted(name for _, _, names in os.walk(job.out) for name in names), flush=True)
"""


@pytest.mark.parametrize("seed", [0])
def test_killed_at_three_moments_it_goes_on_to_the_same_bytes(prompts, unbroken, tmp_path, seed):
    """Each time before one of its next renames, of which a picture, a record and the settings have one each."""
    given = {
        name: str(v) if isinstance(v, Path) else v
        for name, v in asdict(small_job(prompts, tmp_path / "o")).items()
    }
    command = [sys.executable, "-c", KILLED, json.dumps(given), str(seed)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(" True " in line for line in lines), done.stdout + done.stderr
    assert ".lbdt-" in done.stdout, "no picture was half written"
    result = generate(small_job(prompts, tmp_path / "o"))
    assert 0 < result.made <= 5 and repeats(content(tmp_path / "o"), content(unbroken))


@pytest.mark.parametrize("damage", ["gone", "cut", "record", "records"])
def test_what_is_damaged_is_made_again(prompts, unbroken, tmp_path, capsys, damage):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    if damage in ("gone", "cut"):
        picture = out / "pictures/000003.png"
        data = picture.read_bytes()
        picture.unlink()
        if damage == "cut":
            picture.write_bytes(data[:100])
    else:
        text = (out / "records.jsonl").read_text()
        (out / "records.jsonl").write_text(text[:-50] if damage == "record" else "[]\n{\n")
    result = generate(small_job(prompts, out))
    assert result.made == (5 if damage == "records" else 1)
    assert "ing it" in capsys.readouterr().err and repeats(content(out), content(unbroken))


def test_ctrl_c_ends_it_after_the_batch_and_it_goes_on(prompts, unbroken, tmp_path, monkeypatch):
    run, out = JobWorker.run, tmp_path / "out"

    def interrupted(self, lines):
        os.kill(os.getpid(), signal.SIGINT)
        return run(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(JobWorker, "run", interrupted)
        stopped = lbdt(prompts, "--out", out, "--concept", "Cats", *SMALL)
    assert stopped.exit_code == 130 and stopped.stdout == "", stopped.output
    assert "ending after this batch" in stopped.stderr
    assert f"stopped with 2 of 5 pictures in {out}; the same command goes on" in stopped.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (out / "summary.json").exists() and len(records(out)) == 2
    done = lbdt(prompts, "--out", out, "--concept", "Cats", "--json", *SMALL)
    assert done.exit_code == 0 and json.loads(done.stdout)["made"] == 3
    assert repeats(content(out), content(unbroken))


ROWS = [
    {"prompt": prompt("Cats"), "id": "good"},
    {"prompt": BROKEN, "id": "bad", "concepts": ["Sea"]},
    {"prompt": "unspeakable " * 40, "id": "long"},
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # PIL's casts of NaN
def test_refused_pictures_are_not_written_and_are_tried_again(tmp_path, spoiled):
    path, out = write(tmp_path / "jobs.jsonl", ROWS), tmp_path / "out"
    arguments = (path, "--out", out, "--concept", "Cats", *SMALL)
    failed = lbdt(*arguments)
    assert failed.exit_code == 1
    assert (
        "2 of 3 pictures were refused: bad, long; bad: " in failed.stderr
        and "tries them again" in failed.stderr
    )
    assert [path.name for path in (out / "pictures").iterdir()] == ["good.png"]
    assert [row["outcome"] for row in records(out)] == ["protected", "refused", "failed"]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["refused"]) == ["bad", "long"] and "NaN or infinite" in summary["refused"]["bad"]
    assert summary["refused"]["long"].endswith("tokens, and the model reads 24; shorten it")

    spoiled.undo()
    again = lbdt(*arguments, "--json")
    assert again.exit_code == 1 and "1 of 3 pictures were refused: long" in again.stderr
    values = json.loads(again.stdout)
    assert (values["made"], values["there"], list(values["refused"])) == (1, 1, ["long"])
    assert [row["outcome"] for row in records(out)] == ["protected", "protected", "failed"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unprotected_pictures_are_named(tmp_path, spoiled):
    path, out = write(tmp_path / "jobs.jsonl", ROWS[:2]), tmp_path / "out"
    done = lbdt(path, "--out", out, "--concept", "Cats", "--on-failure", "unprotected", *SMALL)
    assert done.exit_code == 0, done.output
    assert "1 of 2 pictures are not protected, as --on-failure unprotected allows: bad" in done.stderr
    assert json.loads((out / "summary.json").read_text())["unprotected"] == ["bad"]
    assert [row["outcome"] for row in records(out)] == ["protected", "unprotected"]
    again = lbdt(path, "--out", out, "--concept", "Cats", "--on-failure", "unprotected", *SMALL)
    assert again.exit_code == 0 and "nothing to do" in again.stderr and "not protected" in again.stderr


def test_a_workers_failure_is_the_jobs(prompts, unbroken, tmp_path):
    begin(unbroken, tmp_path / "out", [1, 2, 3, 5])
    (tmp_path / "out/model.json").write_text("{}")
    with pytest.raises(RuntimeError, match="another model: scheduler, text_encoder, .* differ"):
        generate(small_job(prompts, tmp_path / "out", workers=2))


def test_a_worker_that_is_ended_is_told_of():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(RuntimeError, match="is there too little memory for 4"):
        job_workers._received(ours, 4)


def test_many_pictures_are_in_folders_of_1000_lines():
    lines = [JobLine(number, f"{number:06}", "", 0, ()) for number in (999, 1000, 123_456)]
    assert [picture_file(line, 10_000) for line in lines][2] == "pictures/123456.png"
    shards = [picture_file(line, 10_001).split("/")[1] for line in lines]
    assert shards == ["0000", "0001", "0123"]


def test_a_late_refusal_does_not_replace_a_picture(prompts, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    row = records(out)[0] | {
        "outcome": "refused",
        "reason": "late",
        "file": None,
        "bytes": None,
        "image": None,
    }
    line = JobLine(1, "000001", "", 0, ())
    job_files.write_batch(out, line, {}, [row | {"path": "pictures/none.png"}])
    assert generate(small_job(prompts, out)).made == 0
    assert repeats(content(out), content(unbroken))
