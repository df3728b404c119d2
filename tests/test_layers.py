"""The layers of the package, lowest first: a room imports from lower ones only, so that no circle can be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lbdt"
LAYERS = (
    {"_build", "call_rows", "donors", "runs", "testing"},
    {"formats", "kernels", "reference"},
    {"ops", "sae"},
    {"int8_screen"},
    {"hooks"},
    {"activations"},
    {"dictionary"},
    {"editors", "training"},
    {"bench", "canvas"},
    {"evaluation"},
    {"app", "attack", "serving"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file names in its imports, those inside of functions too; `from lbdt import name` is one of
    `name`, which is a room or a name that the package itself hands on."""
    folder = ("lbdt", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("lbdt."))


def test_every_room_has_a_layer():
    assert {room_of(path) for path in FILES} <= set(FLOOR)
    assert len(FLOOR) == sum(map(len, LAYERS))


def test_imports_of_every_kind_are_seen():
    attached = set(imported(PACKAGE / "editors/eraser.py"))
    assert {"dictionary", "hooks", "editors"} <= attached


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_lower_ones_only(path):
    mine = room_of(path)
    strange = {
        room for room in imported(path) if room in FLOOR and room != mine and FLOOR[room] >= FLOOR[mine]
    }
    assert not strange, f"{mine} is not above {', '.join(sorted(strange))}"


def modules_run(path: Path) -> Iterator[str]:
    """The modules of its own room that a file names in its imports, inside of functions too, but for annotations."""
    tree = ast.parse(path.read_text())
    typed = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typed:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                name = inner if inner in MODULES else node.module
                if name in MODULES and MODULES[name] != path and room_of(MODULES[name]) == room_of(path):
                    yield name


MODULES = {
    ".".join(("lbdt", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}


def test_no_room_has_a_circle():
    left = {name: set(modules_run(path)) for name, path in MODULES.items()}
    assert sum(map(len, left.values())) > 100
    while lowest := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in lowest}
    assert left == {}
