"""Folders of shards: round trip, resuming, several processes, and everything that is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors
import torch

from lbdt.activations import Prompt, Site, Source
from lbdt.activations.batches import Batches
from lbdt.activations.collecting import ActivationFiles, collect
from lbdt.activations.generated import Generated
from lbdt.activations.stored import Stored
from lbdt.runs.folder import held
from tests import toy
from tests.repeats import repeats

ROOT = Path(__file__).resolve().parents[2]
OUTPUT, UPDATE = Site(toy.HOOKPOINT), Site(toy.HOOKPOINT, "update")
PROMPTS = [Prompt("a cat", ("Cats", "Dogs", None)[i % 3], (None, "Sketch")[i % 2], i) for i in range(7)]


def generated(pipe, prompts=PROMPTS, sites=(OUTPUT, UPDATE), **settings):
    settings = {"steps": 3, "guidance": 4.0, "prompts_per_shard": 2, "patches": 5} | settings
    return Generated(pipe, prompts, sites, **settings)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def unbroken(pipe, tmp_path_factory):
    """A folder that is only read, and its source."""
    source = generated(pipe)
    folder = tmp_path_factory.mktemp("collect") / "shards"
    collect(source, folder, progress=False)
    return source, folder


@pytest.fixture
def copied(unbroken, tmp_path):
    """The source, and a copy of the folder that may be spoilt."""
    return unbroken[0], Path(shutil.copytree(unbroken[1], tmp_path / "copy"))


def shard_path(folder, index):
    return folder / "shards" / f"{index:05d}.safetensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("patches", [5, None], ids=["some-patches", "all-patches"])
def test_what_is_read_is_what_was_made(pipe, tmp_path, dtype, patches):
    source = generated(pipe, dtype=dtype, patches=patches)
    stored = collect(source, tmp_path / "new" / "folder", progress=False)
    assert isinstance(stored, Source) and stored.sites == source.sites == (OUTPUT, UPDATE)
    for name in ("concepts", "styles", "timesteps", "prompts", "prompts_per_shard", "labelled"):
        assert getattr(stored, name) == getattr(source, name)
    for site in source.sites:
        assert (stored.width(site), stored.patches(site)) == (32, patches or 16)
        for index in range(4):
            for got, made in zip(stored.shard(index, site), source.shard(index, site), strict=True):
                assert got.dtype == made.dtype and repeats(got, made)
    assert all(torch.equal(a, b) for a, b in zip(stored.labels(), source.labels(), strict=True))
    with pytest.raises(IndexError):
        stored.shard(4, OUTPUT)


def test_shards_are_ordinary_safetensors_files(unbroken):
    source, folder = unbroken
    with safetensors.safe_open(str(shard_path(folder, 3)), framework="pt") as file:
        assert set(file.keys()) == {f"{kind}/{site}" for kind in ("x", "patches") for site in source.sites}
        assert repeats(file.get_tensor(f"x/{UPDATE}"), source.shard(3, UPDATE).x)
    assert sorted(contents(folder)) == [
        "manifest.json",
        "prompts.jsonl",
        "settings.json",
        *(f"shards/0000{i}.safetensors" for i in range(4)),
    ]
    assert ActivationFiles(source, folder).bytes == sum(
        shard_path(folder, i).stat().st_size for i in range(4)
    )


def test_rows_are_gathered_from_the_mapped_files(unbroken):
    source, folder = unbroken
    stored = Stored(folder)
    x = torch.cat([source.shard(i, UPDATE).x for i in range(4)])
    assert stored.rows(UPDATE) == 7 * 3 * 5
    rows = torch.randint(stored.rows(UPDATE), (300,), generator=torch.Generator().manual_seed(0))
    assert repeats(stored.gather(UPDATE, rows), x.flatten(0, 2)[rows])
    assert stored.gather(UPDATE, rows[:0]).shape == (0, 32)
    with pytest.raises(IndexError, match=r"rows: expected numbers in \[0, 105\)"):
        stored.gather(UPDATE, torch.tensor([105]))
    read, loaded = Batches(stored, UPDATE, memory=0), Batches(stored, UPDATE)
    assert torch.equal(read.rows(3, 60), loaded.rows(3, 60))
    stored.shard(0, OUTPUT).x.zero_()  # the file keeps its values
    assert repeats(Stored(folder).shard(0, OUTPUT).x, source.shard(0, OUTPUT).x)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_processes_write_the_same_files(unbroken, tmp_path, count):
    source, folder = unbroken
    done = [
        collect(source, tmp_path, process=i, processes=count, progress=False) for i in reversed(range(count))
    ]
    assert done[:-1] == [None] * (count - 1) and isinstance(done[-1], Stored)
    assert repeats(contents(tmp_path), contents(folder))


def test_what_is_there_is_not_made_again(copied, monkeypatch):
    source, folder = copied
    before = contents(folder)
    (folder / "manifest.json").unlink()
    shard_path(folder, 2).unlink()
    made, run = [], source.run
    monkeypatch.setattr(source, "run", lambda index: made.append(index) or run(index))
    assert ActivationFiles(source, folder).present() == 3
    collect(source, folder, progress=False)
    assert made == [2] and repeats(contents(folder), before)


def test_leftovers_are_removed_but_not_what_is_being_written(copied):
    import fcntl

    source, folder = copied
    before = contents(folder)
    for name in ("shards/.lbdt-00001.safetensors.x", ".lbdt-settings.json.y"):
        (folder / name).write_bytes(b"half")
    used = folder / "shards/.lbdt-00002.safetensors.z"
    with used.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        collect(source, folder, progress=False)
        assert used.exists()
    used.unlink()
    assert contents(folder) == before


def spoil(kind, folder):
    path = shard_path(folder, 1)
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "longer":
        path.write_bytes(data + b"\0")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "header":
        path.write_bytes(data[:8] + b"\xff" + data[9:])
    elif kind == "other-shard":
        path.write_bytes(shard_path(folder, 0).read_bytes())
    elif kind == "foreign":
        path.write_bytes(data.replace(b"settings", b"Settings"))
    elif kind == "missing":
        path.unlink()


@pytest.mark.parametrize(
    "kind", ["truncated", "longer", "empty", "header", "other-shard", "foreign", "missing"]
)
def test_a_spoilt_shard_is_refused_and_made_again(copied, capsys, kind):
    source, folder = copied
    before = contents(folder)
    spoil(kind, folder)
    with pytest.raises(ValueError, match=r"00001\.safetensors: .*run the same `lbdt collect` again"):
        Stored(folder).shard(1, OUTPUT)
    collect(source, folder, progress=False)
    assert repeats(contents(folder), before)
    said = capsys.readouterr().err
    assert said == "" if kind == "missing" else "00001.safetensors" in said and "making it again" in said


def test_a_truncated_shard_is_named_with_its_sizes(copied):
    size = shard_path(copied[1], 1).stat().st_size
    spoil("truncated", copied[1])
    with pytest.raises(ValueError, match=f"expected {size} bytes, got {size - 100}"):
        Stored(copied[1])


@pytest.mark.parametrize("place", [-1, -1000], ids=["the last byte", "one inside"])
@pytest.mark.parametrize(
    "read",
    [
        lambda stored: stored.shard(1, stored.sites[0]),
        lambda stored: stored.gather(stored.sites[0], torch.tensor([stored.rows(stored.sites[0]) - 1, 0])),
    ],
    ids=["shard", "gather"],
)
def test_changed_numbers_are_found_whatever_reads_them(copied, read, place):
    for path in (shard_path(copied[1], 1), shard_path(copied[1], 3)):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
    with pytest.raises(ValueError, match="safetensors: expected SHA-256 .*delete it, and run the same"):
        read(Stored(copied[1]))


def test_a_shard_is_compared_once(copied, monkeypatch):
    stored, asked = Stored(copied[1]), []
    monkeypatch.setattr(stored, "_compare", lambda index, got: asked.append(index))
    for _ in range(2):
        for site in stored.sites:
            stored.shard(1, site)
    assert asked == [1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manifest.json", "incomplete, 4 of 4 shards; run the same `lbdt collect` again"),
        ("settings.json", "no settings.json; expected a folder written by `lbdt collect`"),
        ("prompts.jsonl", "prompts.jsonl: cannot be read"),
    ],
)
def test_a_folder_without_one_of_its_files_is_refused(copied, name, message):
    (copied[1] / name).unlink()
    with pytest.raises(ValueError, match=message):
        Stored(copied[1])


@pytest.mark.parametrize("name", ["manifest.json", "settings.json", "prompts.jsonl"])
def test_a_damaged_file_is_refused_by_name(copied, name):
    (copied[1] / name).write_bytes((copied[1] / name).read_bytes()[:-30])
    with pytest.raises(ValueError, match=name):
        Stored(copied[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 4}, "steps .3 there, 4 now."),
        ({"guidance": 2.0}, "guidance .4.0 there, 2.0 now."),
        ({"seed": 1}, "seed"),
        ({"dtype": torch.float32}, "dtype .float16 there, float32 now."),
        ({"sites": (OUTPUT,)}, "sites"),
        ({"prompts": [Prompt("a dog"), *PROMPTS[1:]]}, "prompts_sha256"),
        ({"threads": 1}, "threads .None there, 1 now."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_by_name_and_nothing_changes(pipe, copied, change, message):
    before = contents(copied[1])
    with pytest.raises(ValueError, match=f"holds activations of other settings: .*{message}"):
        collect(generated(pipe, **change), copied[1], progress=False)
    assert contents(copied[1]) == before


def test_another_model_is_another_setting(pipe, copied):
    weight = pipe.unet.conv_in.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    try:
        with pytest.raises(ValueError, match="other settings: fingerprint"):
            collect(generated(pipe), copied[1], progress=False)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_folder_of_other_files_and_one_in_use_are_refused(unbroken, tmp_path):
    source, _ = unbroken
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds other files .thesis.tex."):
        collect(source, tmp_path, progress=False)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}
    with held(tmp_path / "new", "lbdt collect"):
        with pytest.raises(ValueError, match="another `lbdt collect` is writing there"):
            collect(source, tmp_path / "new", progress=False)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP], ids=["no locks", "not supported"])
def test_a_file_system_without_locks_serves_too(unbroken, tmp_path, monkeypatch, code):
    def refused(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refused)
    collect(unbroken[0], tmp_path / "new", progress=False)
    assert repeats(contents(tmp_path / "new"), contents(unbroken[1]))


def test_a_disk_without_room_is_refused_before_anything_is_made(unbroken, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="the activations need .* and 1 kB are free"):
        collect(unbroken[0], tmp_path / "new", progress=False)
    assert contents(tmp_path) == {}


def test_killed_runs_and_racing_processes_leave_the_same_bytes(tmp_path):
    script = Path(__file__).with_name("killed.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 5 and report["unfinished"] >= 1, report
    expected = contents(tmp_path / "unbroken")
    assert len(expected) == 3 + 12
    for folder in ("killed", *(f"raced{i}" for i in range(report["races"]))):
        assert repeats(contents(tmp_path / folder), expected), folder
