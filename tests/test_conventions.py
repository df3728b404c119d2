"""Rules of the code base that a reader may rely on."""

import ast
import importlib
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from lbdt import donors, ops, reference
from tests.longest import LONGEST

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(path.stem for path in (ROOT / "lbdt/ops").glob("[a-z]*.py"))
FILES = [p for folder in ("lbdt", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
FILES += sorted((ROOT / "csrc").glob("*/*"))
CITING = [
    *FILES,
    *(p for kind in ("csrc/*.h", "kernels/*/*.py", "benchmarks/*.sh") for p in sorted(ROOT.glob(kind))),
]
NUMBER = r"\d+(?:\.\d+)?"
# In quotes it is the name of a file, and no citation.
CITATION = re.compile(rf"METHOD\.md(?!\")(?:, ({NUMBER}(?:(?:, | and | to ){NUMBER})*))?")


# The rules of prose hold here, and in the tests that of long lines.
PROSE = [
    file
    for folder in ("lbdt", "kernels", "csrc", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*"))
    if file.suffix in (".py", ".h", ".cpp", ".cu", ".sh")
]
DESCRIBED = [p for p in PROSE if p.suffix == ".py"]
IN_THE_MIDDLE = frozenset(
    "About Above According Across After Against Along Also Among And Are As At Because Before Below Between But By "
    "During For From If In Inside Instead Into Is Like Nor Of On Or Out Over Per Same Since So Such Than That Then "
    "Though Through To Toward Under Unless Until Up Upon Via Was Were Which While Who Whom Whose With Within Without "
    "Yet".split()
)


def stems(folder: str, pattern: str = "[a-z]*.py") -> set[str]:
    return {path.stem for path in (ROOT / folder).glob(pattern)}


def test_an_op_has_the_same_stem_everywhere():
    assert {"detect_patches", "replace_patches", "encode_topk"} <= set(OPS)
    assert set(OPS) == stems("lbdt/reference") == {name.rstrip("_") for name in _public()}
    assert stems("tests/ops") == {f"test_{op}" for op in OPS} | {"test_dispatch"}
    kernels = stems("csrc", "*/*.c*") | stems("kernels/triton")
    assert kernels and kernels <= set(OPS)


def test_the_op_map_names_every_op_and_only_files_that_exist():
    text = (ROOT / "kernels/README.md").read_text()
    named = re.findall(r"`((?:lbdt|csrc|kernels|tests)/[\w/]+\.\w+)`", text)
    assert named and all((ROOT / name).is_file() for name in named)
    for op in OPS:
        assert {f"lbdt/reference/{op}.py", f"tests/ops/test_{op}.py"} <= set(named), op
        assert {name for name in named if Path(name).stem == op and name.startswith("csrc/")} == {
            str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(f"*/{op}.c*")
        }


def _public() -> list[str]:
    return [name for name in ops.__all__ if name not in ("explain", "use_backend")]


@pytest.mark.parametrize("name", _public())
def test_an_op_has_the_parameters_of_its_reference(name):
    module = importlib.import_module(f"lbdt.reference.{name.rstrip('_')}")
    wanted = inspect.signature(getattr(module, name))
    got = inspect.signature(getattr(ops, name))
    parameters = list(got.parameters.values())
    assert parameters[-1].name == "backend" and parameters[-1].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters[:-1] == list(wanted.parameters.values())
    assert got.return_annotation == wanted.return_annotation
    assert "Eq" in getattr(module, name).__doc__ and getattr(ops, name).__doc__
    assert getattr(reference, name) is getattr(module, name)


ORDER = ("schema", "public", "check", "fake", "backends", "implement", "triton", "cpp", "reference")


def part_of_an_op(statement: ast.stmt) -> str | None:
    """The part of ORDER that a statement of an op's file belongs to; None: imports and constants, which come first."""
    match statement:
        case ast.Expr(ast.Call(ast.Attribute(attr="define" | "define_internal"))):
            return "schema"
        case ast.Expr(ast.Call(ast.Attribute(attr="implement"))):
            return "implement"
        case ast.Expr(ast.Call(ast.Attribute(ast.Name("_triton"), "register"))):
            return "triton"
        case ast.Expr(
            ast.Call(ast.Attribute(ast.Name("_dispatch"), "register"), [_, ast.Constant(backend), *_])
        ):
            return backend
        case ast.FunctionDef(name="_check"):
            return "check"
        case ast.FunctionDef(name="_fake" | "_fake_"):
            return "fake"
        case ast.FunctionDef() if statement.name.startswith("_"):
            return "backends"
        case ast.FunctionDef() | ast.ClassDef():
            return "public"
        case ast.Import() | ast.ImportFrom() | ast.Assign() | ast.Expr(ast.Constant()):
            return None
    raise AssertionError(f"line {statement.lineno}: expected one of {', '.join(ORDER)}")


@pytest.mark.parametrize("op", OPS)
def test_an_op_file_reads_in_one_order(op):
    tree = ast.parse((ROOT / f"lbdt/ops/{op}.py").read_text())
    parts = [part_of_an_op(statement) for statement in tree.body]
    places = [-1 if part is None else ORDER.index(part) for part in parts]
    assert places == sorted(places), [part for part in parts if part]
    assert set(ORDER) - {"triton"} <= set(parts)
    defined = [
        statement.value.args[0].value
        for statement, part in zip(tree.body, parts, strict=True)
        if part == "schema"
    ]
    names = {schema.partition("(")[0].partition(".")[0] for schema in defined}  # without those of overloads
    assert {name.rstrip("_").removesuffix("_cpp") for name in names} == {op}


def test_python_the_command_line_and_csrc_take_donors_from_the_same_sources():
    header = (ROOT / "csrc/replace_patches.h").read_text()
    numbered = re.findall(r"k(\w+) = (\d)", re.search(r"enum DonorSource : int {(.*)}", header)[1])
    assert [(name.lower(), int(number)) for name, number in numbered] == [
        (s, i) for i, s in enumerate(donors.SOURCES)
    ]
    assert int(re.search(r"kMeanOf = (\d+);", header)[1]) == donors.MEAN_OF
    spelt = re.compile(r"""["']random["'],\s*["']nearest["']|\bnearest = ["']nearest["']""")
    assert [p.name for p in (ROOT / "lbdt").rglob("*.py") if spelt.search(p.read_text())] == ["donors.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_outgrows_four_hundred_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def citations(text: str) -> list[list[str]]:
    """The sections of every citation of METHOD.md, also of one that goes on in the next line of a comment."""
    plain = re.sub(r"\s+(?:(?://|#)\s+)?", " ", text)
    return [re.findall(NUMBER, match or "") for match in CITATION.findall(plain)]


def test_a_citation_is_found_across_lines():
    name = "METHOD" + ".md"
    assert citations(f"({name}, 2.2 and 4)\n// {name},\n// 4.3.") == [["2.2", "4"], ["4.3"]]
    assert citations(f"# {name}, 8.1 to\n# 8.3; see {name}") == [["8.1", "8.3"], []]


def test_every_cited_document_is_in_the_repository():
    missing = {
        (str(path.relative_to(ROOT)), name)
        for path in CITING
        for name in re.findall(r"[\w./-]*\w\.md\b(?!\")", path.read_text())
        if not any((base / name).is_file() for base in (ROOT, ROOT / "lbdt", path.parent))
    }
    assert missing == set()


def test_every_cited_section_of_the_method_is_there():
    headings = re.findall(rf"^##+ ({NUMBER})\.? ", (ROOT / "lbdt/METHOD.md").read_text(), flags=re.MULTILINE)
    assert len(set(headings)) == len(headings)
    cited = {}
    for path in CITING:
        if path != Path(__file__).resolve():
            for sections in citations(path.read_text()):
                assert sections, f"{path}: cites METHOD.md without a section"
                cited |= dict.fromkeys(sections, path)
    assert len(cited) > 20 and {s: p for s, p in cited.items() if s not in headings} == {}


def docstrings(path: Path) -> list[str]:
    """Every string that stands alone: under a module, a class, a function or a field."""
    bodies = [getattr(node, "body", None) for node in ast.walk(ast.parse(path.read_text()))]
    return [
        statement.value.value
        for body in bodies
        if isinstance(body, list)
        for statement in body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]


def begins_in_the_middle(text: str) -> bool:
    return re.match(r"\w*", text.lstrip())[0] in IN_THE_MIDDLE


@pytest.mark.parametrize(
    "text", ["Of the rank test; 0: none.", "That are scored, if none are given.", "As above."]
)
def test_a_docstring_that_begins_in_the_middle_is_told(text):
    assert begins_in_the_middle(text) and not begins_in_the_middle(f"Whether {text}")


@pytest.mark.parametrize("path", DESCRIBED, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_are_sentences_or_noun_phrases(path):
    assert [text for text in docstrings(path) if begins_in_the_middle(text)] == []


@pytest.mark.parametrize(
    "path", [*PROSE, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_line_is_longer_than_120_columns(path):
    assert [line for line in path.read_text().splitlines() if len(line) > 120] == []


def test_no_class_has_the_name_of_another():
    places: dict[str, list[str]] = {}
    for path in [p for folder in ("lbdt", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_tolerances_come_from_the_one_table():
    literal = re.compile(r"\b[ar]tol\s*=\s*[\d.]")
    assert literal.search("a" + "tol=1e-5")
    assert [p.name for p in (ROOT / "tests").rglob("*.py") if literal.search(p.read_text())] == []


def test_the_files_that_are_begun_first_are_there():
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []


def test_the_top_level_is_the_agreed_one():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("needs the git checkout: what is generated cannot be told from what is not")
    top = {name.split("/")[0] for name in done.stdout.splitlines() if (ROOT / name).exists()}
    assert {name for name in top if not name.startswith(".")} == {
        *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
        *("lbdt", "csrc", "kernels", "benchmarks", "tests"),
    }
