"""The HTML report: well formed, alone, and honest about what is missing."""

import copy
import re
from html.parser import HTMLParser

import pytest

from lbdt.evaluation.report import plots
from lbdt.evaluation.report.html import html, inline_svg
from lbdt.evaluation.report.write import write
from tests.evaluation import sample_values as sample

VOID = {"meta", "img", "br", "hr", "link", "input"}
LOADS = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "style"}


class Page(HTMLParser):
    """Balanced tags, ids, references and visible text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self._seen(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._seen(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data + " "
        elif self.open and self.open[-1] == "style":
            self.loads += re.findall(r"url\(([^)]*)\)|@import (.*)", data)

    def _seen(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.loads += [value for name, value in attributes if name in LOADS]
        self.loads += [value for name, value in attributes if value and "url(" in value]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    sample.pictures(folder)
    values = sample.values()
    values["kinds"] = {name: values["kinds"][name] for name in ("saeuron", "sdxl")}
    return write(values, folder)["report"].read_text()


def test_the_whole_report_is_balanced_and_loads_nothing(report):
    page = Page(report)
    assert page.tags.count("svg") == 7 and page.tags.count("img") == 2
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    loads = [load for load in page.loads if "http" in load or load.startswith("//")]
    assert loads == []
    assert all(
        load.startswith(("#", "data:image/png;base64,")) or ":" in load or "url(#" in load
        for load in page.loads
    )


def test_every_link_leads_somewhere_and_no_id_is_there_twice(report):
    page = Page(report)
    assert len(page.ids) == len(set(page.ids))
    targets = [load[1:] for load in page.loads if load.startswith("#")]
    targets += [name for load in page.loads for name in re.findall(r"url\(#([^)]*)\)", load)]
    assert len(targets) > 100 and set(targets) <= set(page.ids)


def test_the_questions_are_the_headings_and_the_contents(report):
    questions = [
        "Does it erase?", "What else breaks?", "At what cost?", "What happens inside?", "Several concepts",
        "Published figures", "How it was measured",
    ]  # fmt: skip
    assert re.findall(r"<h2>([^<]*)</h2>", report) == questions
    assert re.findall(r'<li><a href="#\w+">([^<]*)</a>', report) == questions


def test_the_figures_follow_the_readers_colours(report):
    svg = report[report.index("<svg") : report.rindex("</svg>")]
    assert "#0b4f8a" not in svg and "var(--per)" in svg and "prefers-color-scheme: dark" in report
    assert len(re.findall(r"--per: #", report)) == 2


def test_how_it_was_measured_is_told(report):
    how = Page(report).text.split("How it was measured")[-1]
    for text in (
        "EmojiCanvas object and style classifiers",
        "Mahalanobis",
        "500, 501, 502",
        "700000",
        "91723ac",
    ):
        assert text in how
    assert "lbdt evaluate --out report" in how and "torch 2.13.0" in how and "the pipeline's own" in how


def test_published_figures_are_in_tables_of_their_own(report):
    tables = re.findall(r"<table>.*?</table>", report)
    ours, theirs = [[t for t in tables if figure in t] for figure in ("93.0 ± 3.0", "85.37")]
    assert ours and len(theirs) == 1 and not set(ours) & set(theirs)
    section = report[report.index('<section id="published">') :]
    assert "93.45" in section and "35.41" in section and "eidoslab.github.io/PER, Table 1" in section
    assert section.index("Measured here") < section.index("Published: erasing objects")


def test_bold_are_the_better_ones_and_costs_are_relative(report):
    assert "<strong>9.0 ± 3.0</strong>" in report and "<strong>30.5 ± 3.0</strong>" not in report
    assert "0.35 (+12.9 %)" in report
    assert report.count("steering (strength -5), chosen") == 2


def test_every_method_has_a_row_and_a_price_and_columns_are_explained(report):
    for name in ("negative prompt", "UCE", "PER without the gate (padding 1, nearest)"):
        assert f'<td class="name">{name}</td>' in report
    assert report.count("negative prompt (no guidance: not applicable)") == 2, (
        "main table, and beside the published"
    )
    for name in ("clean", "kept", "pair gone", "untouched"):
        assert f"<dt>{name}</dt>" in report and f'<th scope="col">{name}</th>' in report
    assert "nothing seen where the prompt names nothing" in report


def test_names_are_escaped_everywhere(tmp_path):
    evil = '<script>alert("1")</script>&amp;'
    values = {
        "about": {"world": evil, "judge": evil, "versions": {evil: evil}, "seeds": [evil], evil: [evil]},
        "kinds": {evil: copy.deepcopy(sample.kind(0, 4, None))},
        "cost": {evil: {"base": 1.0, "unit": evil}},
    }
    kind = values["kinds"][evil]
    kind["rows"][3]["settings"] = {evil: evil}
    kind["together"][0]["order"] = evil
    kind["per concept"]["per"][evil] = {"UA": 1.0}
    kind["grid"][0] |= {"concept": evil, "style": evil}
    sample.pictures(tmp_path)
    text = write(values, tmp_path)["report"].read_text()
    page = Page(text)
    assert "script" not in page.tags and page.text.count(evil) > 5
    assert evil in re.sub(r"\s+", " ", page.text)
    assert all(path.parent == tmp_path / "plots" for path in tmp_path.rglob("grid*"))


def test_what_is_missing_is_said_to_be(tmp_path):
    text = html(sample.bare(), {}, tmp_path)
    page = Page(text)
    assert page.text.count("not measured") >= 14 and "not recorded" in page.text
    assert "svg" not in page.tags and "not drawn" not in page.text


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="empty"),
        pytest.param({"about": None, "kinds": None, "cost": None}, id="null"),
        pytest.param({"about": {}, "kinds": {"k": {}}, "cost": {"k": None}}, id="a-kind-without-parts"),
        pytest.param(
            {"kinds": {"k": dict.fromkeys(("rows", "sweep", "grid", "per concept", "sampling", "ratio"))}},
            id="a-kind-of-nulls",
        ),
    ],
)
def test_nothing_measured_is_a_page_too(tmp_path, values):
    Page(write(values, tmp_path)["report"].read_text())


def test_measured_and_not_drawn_is_said_apart(tmp_path):
    values = {"kinds": {"k": {"ratio": sample.kind(0, 4, None)["ratio"]}}}
    assert plots.drawable(values) == ["ratio"]
    text = html(values, {}, tmp_path)
    assert text.count("not drawn: needs matplotlib, pip install lbdt[plot]") == 1


def test_plots_may_be_given_relative_to_the_folder(tmp_path):
    values = {"kinds": {"k": {"ratio": sample.kind(0, 4, None)["ratio"]}}}
    files = {"ratio": write(values, tmp_path)["ratio"]}
    relative = {name: path.relative_to(tmp_path) for name, path in files.items()}
    assert html(values, relative, tmp_path) == html(values, files, tmp_path / "elsewhere")


def test_an_inlined_svg_keeps_its_references_apart():
    text = (
        '<?xml version="1.0"?><svg xmlns="x"><path id="a"/><use xlink:href="#a" clip-path="url(#a)"/></svg>'
    )
    assert inline_svg(text, "p", 'a "b"') == (
        '<svg role="img" aria-label="a &quot;b&quot;" xmlns="x"><path id="p-a"/>'
        '<use xlink:href="#p-a" clip-path="url(#p-a)"/></svg>'
    )
