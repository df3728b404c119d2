"""Evaluations and reports of concepts, styles and kinds with odd names: they end, and no name leaves its place."""

from __future__ import annotations

import copy
import csv
import io
import json
import warnings
from html.parser import HTMLParser

import pytest

from lbdt.dictionary import ConceptDictionary
from lbdt.evaluation.evaluation import check_kind_name
from lbdt.evaluation.jobs import Design
from lbdt.evaluation.report.tables import csv_text, lines
from lbdt.evaluation.report.write import write
from lbdt.evaluation.values import kind_values
from lbdt.runs.wording import legible, printable, short
from tests import toy
from tests.evaluation import sample_values as sample
from tests.evaluation import small

NAMES = {
    "long": "Cats " * 1000,
    "line-break": "Cats\nand\r\ndogs",
    "control": "Cats\0\x1b[31m\x7f",
    "path": "../../etc/Cats",
    "html": '<script>alert("Cats")</script>&amp;',
    "formula": '=HYPERLINK("http://x";"Cats"),\'',
    "forbidden": 'Ca:t*s?<>|"\\. ',
    "mathtext": "$\\frac{Cats$",
    "letters": "猫\u202eстаС",
    "svg": "a-->Cats]]>",
}
FEW = Design(own=1, others=1, sweep_own=1, ablation_own=1, ablation_others=0, counts=(2,))


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)

    def handle_data(self, data):
        self.text += data


def renamed(names):
    """The toy's eraser and its steering with other names for its three concepts."""

    def of(make):
        def made(**settings):
            editor = make(**settings)
            old = editor.dictionary
            editor.dictionary = ConceptDictionary(names, old.timesteps, old.mean, old.counts, fired=old.fired)
            return editor

        return made

    return of


def test_a_whole_evaluation_of_odd_names(tmp_path):
    """Two names differ in large letters alone, two at their ends."""
    long = NAMES["long"]
    names = (f"{long}/a", f"{long}/A", NAMES["html"] + NAMES["line-break"])
    of = renamed(names)
    pipe = toy.pipeline(tmp_path / "tokenizer")
    world = small.world(
        judge=small.Judge(),
        objects=names,
        pipeline=lambda device: pipe,
        prompts=lambda seed: [
            prompt.__class__("a cat", names[toy.CONCEPTS.index(prompt.concept)], prompt.style, prompt.seed)
            for prompt in small.prompts((NAMES["control"],), seed)
        ],
        styles=(NAMES["control"],),
        kinds={"Cats": small.kind("Cats", per=of(small.per), steering=of(small.steering), strengths=(-1.0,))},
        seeds=(1,),
    )
    run = small.evaluation(tmp_path / "out", world, design=FEW)
    strengths = run.run()
    values = {"about": run.about(), "kinds": {"Cats": kind_values(run, "Cats", strengths["Cats"])}}
    files = write(values, tmp_path / "out")
    assert set(values["kinds"]["Cats"]["per concept"]["per"]) == set(names)
    assert "script" not in Tags(files["report"].read_text()).found
    for path in (tmp_path / "out").rglob("*"):
        assert path.name.isascii() and path.name.isprintable() and len(path.name) < 200
    grid = values["kinds"]["Cats"]["grid"]
    assert len(grid) == 3 and len({row["mask"] for row in grid}) == 3
    assert all((tmp_path / "out" / row["mask"]).is_file() for row in grid)


def test_a_report_of_odd_names(tmp_path):
    values = copy.deepcopy(sample.values())
    values["kinds"] = {"k": values["kinds"]["saeuron"]}
    kind = values["kinds"]["k"]
    names = [name + end for name in NAMES.values() for end in ("", "2")]
    kind["per concept"]["per"] = {name: {"UA": float(n), "AR": 2.0} for n, name in enumerate(names)}
    kind["AR per style"] = {"per": dict.fromkeys(names, 4.0)}
    kind["grid"] = [kind["grid"][0] | {"concept": name, "style": name} for name in names]
    kind["together"][0]["erased"] = names
    sample.pictures(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = write(values, tmp_path)
    assert json.loads(files["values"].read_text())["kinds"] == values["kinds"]
    page = Tags(files["report"].read_text())
    assert "script" not in page.found and "\x1b" not in page.text
    text = files["table"].read_text()
    assert all(line.isprintable() for line in text.splitlines())
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    found = {
        row["settings"]: row["mean"] for row in rows if (row["part"], row["metric"]) == ("per concept", "UA")
    }
    for number, name in enumerate(names):
        shown = printable(name).replace("\\", "\\\\").replace(";", "\\;").replace("+", "\\+")
        assert found[f"concept={shown}"] == str(number)
    assert not [text for row in rows for text in row.values() if text[:1] in ("=", "+", "@", "\t")]
    assert all(line.isprintable() for line in lines(values))


def test_names_are_apart_in_the_settings_of_the_csv():
    erased = (["a+b"], ["a", "b"], ["a\\", "b"], ["a\\+b"], ["a;b"])
    kind = {
        "together": [
            {"method": "per", "order": "at once", "erased": e, "UA": sample.estimate(1)} for e in erased
        ]
    }
    rows = csv.DictReader(io.StringIO(csv_text({"kinds": {"k": kind}})))
    assert len({row["settings"] for row in rows}) == len(erased)


@pytest.mark.parametrize(
    "name",
    ["=1+1", "+a", "-a", "@a", "..", "", " a", "a\nb", "a\0", "\ud800", "a" * 101, "/etc"],
    ids=ascii,
)
def test_kinds_are_named_at_the_door(name):
    with pytest.raises(ValueError, match="expected a name of at most 100 visible characters") as raised:
        check_kind_name(name)
    assert len(str(raised.value)) < 400


def test_kinds_of_one_folder_are_refused_also_where_large_letters_are_small_ones(tmp_path):
    for names in (("a b", "a_b"), ("Mine", "mine")):
        kinds = {name: small.kind(name) for name in names}
        with pytest.raises(ValueError, match="would share the folder"):
            small.evaluation(tmp_path, small.world(tmp_path, kinds=kinds))


@pytest.mark.parametrize("field", ["objects", "styles"])
def test_what_no_file_can_hold_is_refused_before_the_pipeline_is_loaded(tmp_path, field):
    def pipeline(device):
        raise AssertionError("loaded")

    given = {"objects": ("Cats", "Dogs", "Tr\ud800ees"), "styles": ("ink", "\udcff")}
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud"):
        small.evaluation(tmp_path, small.world(pipeline=pipeline, **{field: given[field]}))


def test_text_that_can_be_printed():
    assert (
        printable("a\n\0\ud800b ± 猫")
        == "a\\n\\x00\\ud800b ± 猫"
        == printable(printable("a\n\0\ud800b ± 猫"))
    )
    assert legible({"a\n": ["\0", {"b": 1}, None]}) == {"a\\n": ["\\x00", {"b": 1}, None]}
    assert short("abcdefghij", 7) == "abcd…ij" and short("abcdefg", 7) == "abcdefg"
