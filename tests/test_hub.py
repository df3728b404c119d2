"""Hub ids: a server on this machine speaks as much of the Hub's protocol as huggingface_hub needs."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from lbdt.runs.hub import resolve_folder
from lbdt.sae import SparseAutoencoder
from tests import toy
from tests.formats import fixtures

COMMIT = "1" * 40
BRANCH = "2" * 40
REPO = "someone/some-saes"
HOOK = "unet.mid_block.attentions.0"


class Hub(BaseHTTPRequestHandler):
    """One repository of one commit, and a branch "old" of another one with the same files."""

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        path = unquote(urlsplit(self.path).path)
        for revision, commit in (("main", COMMIT), (COMMIT, COMMIT), ("old", BRANCH), (BRANCH, BRANCH)):
            if path == f"/api/models/{REPO}/revision/{revision}" or (
                revision == "main" and path == f"/api/models/{REPO}"
            ):
                siblings = [{"rfilename": name} for name in self.server.files]
                return self.answer(json.dumps({"id": REPO, "sha": commit, "siblings": siblings}).encode())
            if path == f"/api/models/{REPO}/tree/{revision}":
                tree = [self.entry(name, data) for name, data in self.server.files.items()]
                return self.answer(json.dumps(tree).encode())
            name = path.removeprefix(f"/{REPO}/resolve/{revision}/")
            if name != path and name in self.server.files:
                data = self.server.files[name]
                return self.answer(data, {"X-Repo-Commit": commit, "ETag": f'"{digest(data)}"'})
        return self.answer(b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"}, status=404)

    do_HEAD = do_GET

    def entry(self, name, data):
        return {"type": "file", "path": name, "size": len(data), "oid": digest(data)}

    def answer(self, data, headers=None, status=200):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *message):
        pass


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("repo")
    fixtures.saeuron(root / HOOK)
    fixtures.saeuron(root / "other")
    fixtures.unbox(root / f"{HOOK}_k3_hidden12" / "final")
    fixtures.unbox(root / fixtures.RUN / "final")
    (root / "other" / "optimizer.pt").write_bytes(b"gigabytes")
    (root / HOOK / "optimizer.pt").write_bytes(b"gigabytes")
    toy.eraser().save_pretrained(root / "eraser-parts")
    eraser = root / "eraser-parts"
    found = {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }
    for name in [name for name in found if name.startswith("eraser-parts/")]:
        found[name.removeprefix(f"{eraser.name}/")] = found.pop(name)
    for part in ("dictionary.json", "dictionary.safetensors"):
        found[part] = found[f"dictionary/{part}"]
    fixtures.latents_pickle(root / "latents.pkl")
    found[f"cls_latents_dict_{HOOK}.pkl"] = (root / "latents.pkl").read_bytes()
    found["README.md"] = b"# hello"
    found["damaged/cfg.json"] = found[f"{HOOK}/cfg.json"]
    found["damaged/sae.safetensors"] = found[f"{HOOK}/sae.safetensors"][:-1]
    return found


@pytest.fixture(scope="module")
def hub(files):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.asked = dict(files), []
        server.files.update(dict.fromkeys(EVIL, b"{}"))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


EVIL = (
    "../../../../../evil/cfg.json",
    f"{HOOK}/../../../../../evil/cfg.json",
    "/tmp/evil/cfg.json",
    "a\\..\\cfg.json",
)
NESTED = f"{HOOK}_k3_hidden12/final"
CASES = {
    "sae": f"SAE({REPO!r}, hookpoint={HOOK!r}).config.update",
    "nested": f"SAE('{REPO}@old', hookpoint={NESTED!r}).config.update",
    "steerers": f"SAE({REPO!r}, hookpoint='{fixtures.RUN}/final').config.site",
    "eraser": f"lbdt.ConceptEraser.from_pretrained({REPO!r}).concepts",
    "dictionary": f"lbdt.ConceptDictionary.from_pretrained({REPO!r}).concepts",
    "convert": f"convert({REPO!r}, 'auto')",
    "latents": f"convert({REPO!r}, 'latents')",
    "hookpoint": f"SAE({REPO!r}, hookpoint='unet.down')",
    "no-hookpoint": f"SAE({REPO!r})",
    "repository": "SAE('someone/absent')",
    "revision": f"SAE('{REPO}@absent', hookpoint={HOOK!r})",
    "damaged": f"SAE({REPO!r}, hookpoint='damaged')",
}
# huggingface_hub reads its environment when it is imported, so every server needs a fresh Python.
SCRIPT = f"""
    import json, os, sys, tempfile, urllib.error, urllib.request
    from pathlib import Path
    import lbdt
    from lbdt.cli import conversion
    SAE = lbdt.SparseAutoencoder.from_pretrained
    options = dict(target="lbdt", update=None, timesteps=None, concepts=None, encoder_only=False)
    options |= dict(dtype="float32", force=False, hookpoint={HOOK!r})
    def convert(source, kind):
        with tempfile.TemporaryDirectory() as out:
            return conversion.convert(source, out=Path(out) / "out", source_format=kind, **options)["files"]
    answers = {{}}
    for name, code in json.loads(sys.argv[1]).items():
        try:
            urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + name)
        except urllib.error.URLError:
            pass
        try:
            answers[name] = eval(code)
        except ValueError as error:
            answers[name] = str(error)
    print(json.dumps(answers))
"""


class Session:
    """What each case answered, and which files it downloaded."""

    def __init__(self, home, cases, server=None, **variables):
        port = 9 if server is None else server.server_address[1]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
            "HF_HOME": str(home),
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        if server is not None:
            server.asked.clear()
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(cases)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        self.answers = json.loads(done.stdout)
        self.asked: dict[str, list[tuple[str, str]]] = {}
        for method, path in [] if server is None else server.asked:
            if path.startswith("/mark/"):
                case = path.removeprefix("/mark/")
                self.asked[case] = []
            else:
                self.asked[case].append((method, unquote(path)))

    def downloaded(self, case: str) -> set[str]:
        marks = [f"/{REPO}/resolve/{commit}/" for commit in (COMMIT, BRANCH)]
        gets = [path for method, path in self.asked[case] if method == "GET"]
        return {path.removeprefix(mark) for path in gets for mark in marks if path.startswith(mark)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hub") / "deep" / "er" / "home"


@pytest.fixture(scope="module")
def online(hub, home):
    return Session(home, CASES, hub)


READ = {
    "sae": False,
    "nested": True,
    "steerers": "text_encoder.text_model.encoder.layers.9:output",
    "eraser": list(toy.CONCEPTS),
    "dictionary": list(toy.CONCEPTS),
    "convert": ["cfg.json", "sae.safetensors"],
    "latents": ["dictionary.json", "dictionary.safetensors"],
}


def test_every_kind_of_source_is_read_from_the_hub(online):
    assert {name: online.answers[name] for name in READ} == READ


def test_only_what_is_needed_is_downloaded(online):
    assert online.downloaded("sae") == {f"{HOOK}/cfg.json", f"{HOOK}/sae.safetensors"}
    assert online.downloaded("nested") == {f"{NESTED}/config.json", f"{NESTED}/state_dict.pth"}
    assert online.downloaded("latents") == {f"cls_latents_dict_{HOOK}.pkl"}
    assert online.downloaded("convert") == set()
    everything = set().union(*(online.downloaded(case) for case in CASES))
    assert not {name for name in everything if "optimizer" in name or "README" in name}


def test_a_revision_is_the_one_that_is_asked(online):
    assert any(BRANCH in path for _, path in online.asked["nested"])
    assert not any(COMMIT in path for _, path in online.asked["nested"])


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("hookpoint", ["holds none of unet.down/cfg.json", "hookpoint=...; subfolders with", HOOK, NESTED]),
        ("no-hookpoint", ["holds none of cfg.json", "hookpoint=...; subfolders with", NESTED]),
        ("repository", ["someone/absent: no such folder", "check the name, the network, and HF_HUB_OFFLINE"]),
        ("revision", [f"{REPO}@absent: no such folder", "could not be read"]),
        ("damaged", ["sae.safetensors: not a readable safetensors file", "truncated"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_there_or_damaged_is_named(online, case, messages):
    answer = online.answers[case]
    assert "\n" not in answer
    for message in messages:
        assert message in answer


@pytest.mark.parametrize("evil", EVIL, ids=["up", "up-from-inside", "absolute", "backslashes"])
def test_a_listing_that_climbs_out_writes_nothing_outside(online, home, evil):
    assert not any(evil in path for asked in online.asked.values() for _, path in asked)
    root = home.parents[2]
    assert [p.name for p in root.iterdir()] == ["deep"] and [p.name for p in home.parent.iterdir()] == [
        "home"
    ]
    assert not os.path.exists("/tmp/evil") and not list(root.rglob("evil"))


def test_offline_everything_comes_from_the_cache(online, hub, home):
    absent = {"revision": CASES["revision"], "repository": CASES["repository"]}
    offline = Session(home, {name: CASES[name] for name in READ} | absent, hub, HF_HUB_OFFLINE="1")
    assert {name: offline.answers[name] for name in READ} == READ
    assert all(asked == [] for asked in offline.asked.values())
    for name in absent:
        assert "HF_HUB_OFFLINE is set, so only the cache" in offline.answers[name]
        assert "unset it, or fill the cache on a machine with network" in offline.answers[name]


def test_without_a_network_the_cache_serves_and_an_absent_one_is_named(online, home):
    answers = Session(home, {name: CASES[name] for name in ("sae", "repository")}).answers
    assert answers["sae"] is False
    assert "could not be read" in answers["repository"]
    assert "check the name, the network, and HF_HUB_OFFLINE" in answers["repository"]


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/..", "a/../b", "/etc/nowhere", "a\\b", "owner/.hidden", ".owner/name", "a/b/c", "name"),
        *(
            "owner/name@",
            "owner/name@../x",
            "owner/name@a/../../b",
            "owner/na..me",
            "owner/name@v1@v2",
            "owner/na me",
        ),
        "owner/*",
    ],
)
def test_ids_that_are_none_are_refused_before_anything_is_asked(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match="not a Hugging Face repository id"):
        resolve_folder(name, None, "cfg.json", ("cfg.json",))


@pytest.mark.parametrize(
    "hookpoint",
    ["../x", "a/..", "a/../b", "/etc", "a\\b", "", ".", "a//b", "a/", "*", "C:x", "a\x00b", "..", "a/ ."],
)
def test_subfolders_that_leave_the_folder_are_refused(tmp_path, hookpoint):
    fixtures.saeuron(tmp_path / "in")
    fixtures.saeuron(tmp_path / "x")
    for source in (tmp_path / "in", REPO):
        with pytest.raises(ValueError, match="expected the name of a subfolder"):
            SparseAutoencoder.from_pretrained(source, hookpoint=hookpoint)


def test_a_folder_goes_before_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixtures.saeuron(tmp_path / "owner" / "name@v1")
    assert SparseAutoencoder.from_pretrained("owner/name@v1").config.d_in == 6
