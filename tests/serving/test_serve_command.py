"""What `lbdt serve` refuses before it starts anything."""

import pytest
from typer.testing import CliRunner

from lbdt.cli import app
from lbdt.serving import EXAMPLE_POLICY, server

NO_KEYS = 'schema = 1\nversion = "1"\n[tenants.acme]\nconcepts = []\n'


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    def start(*given):
        raise AssertionError("started")

    monkeypatch.setattr(server, "LocalServer", start)


@pytest.mark.parametrize(
    ("files", "options", "text"),
    [
        ({}, ["--policy", "none.toml", "--audit", "a"], "none.toml"),
        ({"p": "schema ="}, ["--policy", "p", "--audit", "a"], "not valid TOML"),
        ({"p": NO_KEYS}, ["--policy", "p", "--audit", "a"], "no tenant has an API key"),
        ({"a": ""}, ["--policy", "EXAMPLE", "--audit", "a"], "--audit"),
        ({"k": "short"}, ["--policy", "EXAMPLE", "--audit", "a", "--audit-key", "k"], "at least 16 bytes"),
        ({}, ["--policy", "EXAMPLE", "--audit", "a", "--max-queue", "2"], "4 pictures of a request"),
    ],
    ids=["no-policy", "broken-policy", "nobody", "audit-is-a-file", "short-key", "no-room-for-n"],
)
def test_what_is_refused_in_words(tmp_path, monkeypatch, files, options, text):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    given = [str(EXAMPLE_POLICY) if option == "EXAMPLE" else option for option in options]
    result = CliRunner().invoke(app, ["serve", *given])
    assert result.exit_code == 1 and text in result.output
    assert {path.name for path in tmp_path.iterdir()} == {*files}
