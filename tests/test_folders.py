"""`lbdt.runs.folder`: held by one run at a time, replaced whole or never mixed; erasers whose parts belong together."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest

from lbdt import ConceptEraser, Steering
from lbdt.runs import folder as folders
from lbdt.runs.files import write_files
from lbdt.runs.folder import held, replaced, write_folder
from tests import toy

OWN = ("a.json", "part")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder, text):
    (folder / "part").mkdir()
    for name in ("a.json", "part/b.bin"):
        (folder / name).write_text(text)


def replace(folder, text="new"):
    with replaced(folder, OWN) as new:
        fill(new, text)


NEW = {"a.json": b"new", "part/b.bin": b"new"}


@pytest.fixture(params=[True, False], ids=["exchanged", "a file system that cannot"])
def exchange(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(folders, "_exchange", lambda *arguments: False)


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize(
    "others",
    [{}, {"README.md": b"mine"}, {".git/HEAD": b"main", "c.txt": b"1"}],
    ids=["alone", "a file beside", "a folder beside"],
)
def test_a_folder_is_replaced_and_what_is_beside_stays(tmp_path, others):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o750)
    fill(folder, "old")
    (folder / "part/gone.bin").write_text("old")
    for name, data in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    replace(folder)
    assert contents(folder) == NEW | others and folder.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("there", [False, True], ids=["none", "an empty one"])
def test_a_new_folder_appears_whole(tmp_path, there):
    if there:
        (tmp_path / "x").mkdir()
    replace(tmp_path / "x")
    assert contents(tmp_path) == {f"x/{name}": data for name, data in NEW.items()}
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o755


def test_a_link_and_the_working_folder_stay_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == NEW
    monkeypatch.chdir(tmp_path / "real")
    before = os.stat(".").st_ino
    replace(tmp_path / "real", "newer")
    assert os.stat(tmp_path / "real").st_ino == before
    assert contents(tmp_path / "real") == {name: b"newer" for name in NEW}


def test_a_failed_block_changes_nothing(tmp_path):
    fill(tmp_path, "old")
    with pytest.raises(KeyError), replaced(tmp_path, OWN) as new:
        fill(new, "new")
        raise KeyError
    assert contents(tmp_path) == {name: b"old" for name in NEW}


def write_until(at, folder):
    """In a process of its own that is killed before its change number `at` to the disk; its status."""
    left = at

    def count(event, arguments):
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    pid = os.fork()
    if not pid:
        try:
            sys.addaudithook(count)
            write_folder(folder, {"a.json": b"new", "b.bin": b"new"})
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "a file system that cannot"])
def test_killed_before_any_change_it_is_old_or_new_but_never_both(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(folders, "_exchange", lambda *arguments: False)
    found = set()
    for at in range(20):
        folder = tmp_path / str(at) / "x"
        write_files(folder, {"a.json": b"old", "b.bin": b"old"})
        status = write_until(at, folder)
        got = contents(folder)
        found.add(tuple(sorted(got.items())))
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
    assert os.WIFEXITED(status) and at > 3
    old, new = ((("a.json", data), ("b.bin", data)) for data in (b"old", b"new"))
    assert {old, new} <= found and (exchanges is False or found == {old, new})
    for state in found:  # of two files that are read, never one of each
        assert len(set(dict(state).values())) == 1 or "a.json" not in dict(state)


def test_a_held_folder_refuses_others_until_its_process_ends(tmp_path):
    code = "import sys, time; from pathlib import Path; from lbdt.runs.folder import held\n"
    code += "with held(Path(sys.argv[1]), 'x'): print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a/b"], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        for shared in (False, True):
            with pytest.raises(ValueError, match="another `lbdt train` is writing there; wait for it"):
                with held(tmp_path / "a/b", "lbdt train", shared=shared):
                    pass
    finally:
        process.kill()
        process.wait()
    with held(tmp_path / "a/b", "lbdt train"):
        pass
    assert (tmp_path / "a/b").is_dir()


def test_the_processes_of_one_run_share_a_folder_and_an_empty_one_is_taken_away(tmp_path):
    with held(tmp_path / "a/b", "x", shared=True), held(tmp_path / "a/b", "x", shared=True):
        with pytest.raises(ValueError, match="another `x`"), held(tmp_path / "a/b", "x"):
            pass
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch, code):
    def refused(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folders.fcntl, "flock", refused)
    with held(tmp_path, "x"), held(tmp_path, "x"):
        write_folder(tmp_path, {"a.json": b"1"})


@pytest.fixture
def eraser(tmp_path):
    toy.eraser(k=4).save_pretrained(tmp_path / "eraser", decoder=True)
    return tmp_path / "eraser"


@pytest.mark.parametrize("name", folders.PARTS)
@pytest.mark.parametrize("load", [ConceptEraser, Steering], ids=lambda kind: kind.__name__)
def test_a_part_of_another_eraser_is_refused(eraser, tmp_path, name, load):
    other = toy.eraser(k=4, threshold=0.5)
    other.sae.config.__dict__["k"] = 5  # frozen
    other.sae.encoder.bias += 1
    other.dictionary.peak = 7.0
    other.save_pretrained(tmp_path / "other", decoder=True)
    assert (tmp_path / "other" / name).read_bytes() != (eraser / name).read_bytes()
    shutil.copy(tmp_path / "other" / name, eraser / name)
    more = {"strength": -1.0} if load is Steering else {}
    with pytest.raises(ValueError, match=f"{name}: expected SHA-256 .* by digests.json, got SHA-256"):
        load.from_pretrained(eraser, **more)
    (eraser / "digests.json").unlink()  # as an older version wrote it
    load.from_pretrained(eraser, **more)


@pytest.mark.parametrize("text", ["[]", "{}", '{"sae/cfg.json": "0"}', "{"])
def test_damaged_digests_are_refused(eraser, text):
    (eraser / "digests.json").write_text(text)
    with pytest.raises(ValueError, match="digests.json: .*damaged"):
        ConceptEraser.from_pretrained(eraser)


def test_a_steering_saved_over_its_eraser_serves_both(eraser):
    loaded = ConceptEraser.from_pretrained(eraser)
    Steering.from_eraser(loaded, rule="sdxl", strength=-1.0).save_pretrained(eraser)
    assert Steering.from_pretrained(eraser).strength == -1.0
    assert ConceptEraser.from_pretrained(eraser).padding == loaded.padding
