"""The README's examples."""

import re
from pathlib import Path

from PIL import Image

from lbdt import canvas

README = Path(__file__).resolve().parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_emojicanvas_example_erases_the_cat(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[0], str(README), "exec"), {})
    (objects, styles) = canvas.classify([Image.open(tmp_path / "no-cat.png")])
    assert canvas.OBJECTS[int(objects)] != "Cats" and canvas.STYLES[int(styles)] == "Sketch"
    assert "timestep" in capsys.readouterr().out


def test_every_example_is_python():
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        compile(example, str(README), "exec")


def test_every_linked_file_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert (
        links and [link for link in links if "://" not in link and not (README.parent / link).exists()] == []
    )
