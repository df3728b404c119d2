"""The page of `lbdt app` in a browser: everything that a visitor does, two at once, and what they should not do."""

import json
import re
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image, ImageChops

from lbdt.app.drawing import draw
from lbdt.app.settings import PictureSettings, load_editor, read_settings
from lbdt.canvas.defaults import pipeline_of
from tests.app import browser as b

SECRET = "a secret of this machine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with b.served(folder) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with b.chromium() as chromium:
        yield chromium


@pytest.fixture
def page(chromium, url):
    page = b.visit(chromium, url)
    yield page
    page.context.close()


def repeated(settings: PictureSettings) -> Image.Image:
    """The picture of settings, as `lbdt erase --settings` makes it."""
    pipe = pipeline_of(None, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, settings, steps=1)
    editor = settings.applied(load_editor(settings))
    with editor.attach(pipe, list(settings.concepts), seed=settings.seed):
        return draw(pipe, settings)[0]


def same(path, picture) -> bool:
    """Whether the picture of a file is that one; its last bit may be another in another process's threads."""
    shown = Image.open(path).convert("RGB")
    difference = ImageChops.difference(shown, picture.convert("RGB"))
    return shown.size == picture.size and max(high for _, high in difference.getextrema()) <= 1


def test_it_paints_soon_and_nothing_jumps_while_pictures_come(page, url):
    page.evaluate(
        "() => { window.shift = 0; new PerformanceObserver(l => { for (const e of l.getEntries()) "
        "if (!e.hadRecentInput) window.shift += e.value; }).observe({type: 'layout-shift', buffered: false}); }"
    )
    b.settle(page, steps=4)
    page.wait_for_timeout(700)  # the accordion opens
    page.evaluate("() => { window.shift = 0 }")
    assert b.generate(page).startswith("Done:")
    page.wait_for_timeout(500)
    assert page.evaluate("() => window.shift") < 0.1
    paint = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 3000


def test_a_concept_is_erased_seen_step_by_step_and_repeated(page, tmp_path):
    b.settle(page, steps=6, seed=7)
    said = b.generate(page)
    assert re.match(r"Done: [\d.]+% of the patches detected, [\d.]+% replaced, over all steps\.", said)
    assert b.source(page, "without") and b.source(page, "without") != b.source(page, "erased")
    shown = b.source(page, "masked")
    slider = page.locator("#step input[type=range]")
    assert slider.get_attribute("max") == "6"
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")
    page.wait_for_function("old => document.querySelector('#masked img').src !== old", arg=shown)
    assert "detected: from" in page.locator("#curve svg").get_attribute("aria-label")
    assert "s with the eraser" in page.locator("#times").inner_text()
    picture = b.download(page, "Download picture", tmp_path)
    settings = read_settings(b.download(page, "Download settings", tmp_path))
    assert (settings.seed, settings.steps, settings.concepts) == (7, 6, ("Cats",))
    assert same(picture, repeated(settings))


def test_pickers_write_the_prompt_and_other_concepts_erase_another_object(page):
    b.settle(page, steps=3)
    b.choose(page, "objects", ["Towers", "Bears"])
    # The prompt is written anew after each choice.
    written = "An image of Towers and Bears in Sketch style."
    page.wait_for_function("text => document.querySelector('#prompt textarea').value === text", arg=written)
    b.choose(page, "concepts", ["Bears", "Towers"])
    assert b.generate(page).startswith("Done:")


def test_cancelling_ends_the_picture_and_the_next_one_is_made(page):
    b.settle(page, steps=100)
    b.button(page, "Generate").click()
    b.wait_for(page, "Without the eraser: step")
    started = time.monotonic()
    b.button(page, "Cancel").click()
    assert b.wait_for(page, "Cancelled.") == "Cancelled."
    assert time.monotonic() - started < 10
    assert b.button(page, "Cancel").is_disabled() and b.button(page, "Generate").is_enabled()
    b.settle(page, steps=2)
    assert b.generate(page).startswith("Done:")


def test_who_closes_the_browser_in_the_middle_holds_nobody_up(chromium, url, page):
    for _ in range(3):
        leaving = b.visit(chromium, url)
        b.settle(leaving, steps=100)
        b.button(leaving, "Generate").click()
        b.wait_for(leaving, "Without the eraser: step")
        leaving.context.close()
    b.settle(page, steps=2)
    started = time.monotonic()
    assert b.generate(page).startswith("Done:")
    assert time.monotonic() - started < 10


def test_a_session_made_up_by_a_caller_shows_nothing_of_another_visitor(page, url):
    b.settle(page, steps=2)
    with page.expect_request("**/gradio_api/queue/join*") as joined:
        b.generate(page)
    own = joined.value.post_data_json["session_hash"]
    config = json.loads(b.fetched(url + "config")[1])
    (slider,) = (one["id"] for one in config["components"] if one["props"].get("elem_id") == "step")
    (slide,) = (one["id"] for one in config["dependencies"] if [slider, "input"] in one["targets"])

    def slid(session):
        body = json.dumps({"fn_index": slide, "data": [1], "session_hash": session}).encode()
        head = {"content-type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}gradio_api/run/predict", body, head), timeout=20
        ) as answer:
            return json.loads(answer.read())["data"][0]

    assert slid(own)["path"]
    assert [slid(name) for name in ("made-up", "", None)] == [None] * 3


def test_settings_load_back_and_bad_ones_are_refused_in_words(page, tmp_path):
    b.settle(page, steps=3, seed=12345, padding=2, gate=1)
    b.choose(page, "concepts", ["Dogs"])
    b.generate(page)
    path = b.download(page, "Download settings", tmp_path)
    first = b.download(page, "Download picture", tmp_path)
    page.reload()
    b.button(page, "Generate").wait_for()
    b.settle(page)
    b.upload(page, "Load settings", path)
    assert b.wait_for(page, "Settings loaded")
    assert page.locator("#seed input").first.input_value() == "12345"
    assert page.locator("#padding input[type=number]").first.input_value() == "2"
    assert page.locator("#concepts .token").all_inner_texts() == ["Dogs"]
    b.generate(page)
    again = b.download(page, "Download picture", tmp_path)
    assert same(first, Image.open(again))
    fields = json.loads(path.read_text())
    for change, text in (
        ({"steps": 10_000}, "10000 steps, and this page makes at most 100"),
        ({"padding": -1}, "padding"),
        ({"model": "/etc", "eraser": "/etc"}, "another model or eraser"),
        ({"digest": "0" * 64}, "another eraser"),
        ({"conceptz": []}, "unknown field"),
    ):
        bad = tmp_path / "bad.json"
        bad.write_text(json.dumps(fields | change))
        b.upload(page, "Load settings", bad)
        assert text in b.wait_for(page, "Settings not loaded:"), change
        page.evaluate("() => { document.querySelector('#status .said').textContent = '' }")


def test_two_visitors_at_once_never_mix(chromium, url, tmp_path):
    visitors = [b.visit(chromium, url) for _ in range(2)]
    asked = [(["Cats"], 21), (["Dogs", "Human"], 22)]
    for visitor, (concepts, seed) in zip(visitors, asked, strict=True):
        b.settle(visitor, steps=5, seed=seed)
        b.choose(visitor, "concepts", concepts)
    for visitor in visitors:
        b.button(visitor, "Generate").click()
    for number, (visitor, (concepts, seed)) in enumerate(zip(visitors, asked, strict=True)):
        b.wait_for(visitor, "Done:")
        target = tmp_path / str(number)
        target.mkdir()
        settings = read_settings(b.download(visitor, "Download settings", target))
        assert (list(settings.concepts), settings.seed) == (concepts, seed)
        assert same(b.download(visitor, "Download picture", target), repeated(settings))
        visitor.context.close()


def test_methods_are_compared(page):
    b.settle(page, steps=2)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#strengths input, #strengths textarea").first.fill("-1, -3")
    b.button(page, "Compare").click()
    assert b.wait_for(page, "Done.", "compare-status") == "Done."
    assert page.locator("#grid img").count() >= 5
    text = page.locator("#stats").inner_text()
    assert all(name in text for name in ("without", "PER", "steering -1", "steering -3", "negative prompt"))
    assert "PER: from" in page.locator("#outside svg").get_attribute("aria-label")
    page.locator("#strengths input, #strengths textarea").first.fill("-1, nan")
    b.button(page, "Compare").click()
    assert "expected at most 6 numbers" in b.wait_for(page, "Strengths:", "compare-status")


def test_a_latent_is_inspected(page):
    page.get_by_role("tab", name="Inspect").click()
    page.locator("#examples img").first.wait_for()
    first = b.status(page, "inspect-status")
    assert re.match(r"Latent \d+: the \d+ pictures with the patches that fire it most", first)
    field = page.locator("#concept input")
    field.click()
    field.fill("Towers")
    field.press("Enter")
    page.locator("#scores svg[aria-label^='Scores of Towers']").wait_for()
    assert b.status(page, "inspect-status") != first
    field = page.locator("#latent input")
    for value, text in (
        ("3", "Latent 3"),
        ("99999999", "Latent: expected a number"),
        ("../x", "Latent: expected"),
    ):
        field.fill(value)
        field.press("Enter")
        assert b.wait_for(page, text, "inspect-status")
    assert page.locator("#concept-table td").filter(has_text="Waterfalls").count() == 1


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        ("prompt", "", "Prompt: say what"),
        ("prompt", "   ", "Prompt: say what"),
        ("prompt", "cat " * 100, "Prompt: 202 tokens, and the model reads 24"),
        ("concepts", [], "Concepts: choose from 1 to 10."),
    ],
    ids=["no-prompt", "blanks", "too-many-tokens", "no-concept"],
)
def test_bad_input_is_answered_in_words(page, place, value, text):
    if place == "prompt":
        page.locator("#prompt textarea").fill(value)
    else:
        b.choose(page, "concepts", value)
    b.button(page, "Generate").click()
    assert b.wait_for(page, text.partition(":")[0]).startswith(text)


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        ("steps", 101, "maximum value 100"),
        ("steps", 0, "minimum value 1"),
        ("seed", -1, "minimum value 0"),
        ("guidance", 51, "maximum value 50"),
        ("padding", 70_000, "maximum value 8"),
        ("gate", -3, "minimum value 0"),
        ("kind", "../x", "not in the list of choices"),
        ("source", "all", "not in the list of choices"),
        ("concepts", ["Cat"], "Value: 'Cat'"),
        ("prompt", "a" * 10_000, "Prompt: at most 500 characters"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_no_control_lets_through_is_refused_by_the_server_too(page, place, value, text):
    def change(route):
        body = route.request.post_data_json
        assert len(body["data"]) == len(_PLACES)
        body["data"][_PLACES.index(place)] = value
        route.continue_(post_data=json.dumps(body))

    page.route("**/gradio_api/queue/join*", change)
    b.button(page, "Generate").click()
    said = page.locator("[data-testid=toast-body], #status .said").filter(has_text=text)
    said.first.wait_for(timeout=20_000)
    assert b.button(page, "Generate").is_enabled()


_PLACES = ("prompt", "concepts", "kind", "seed", "steps", "guidance", "padding", "source", "avoid", "gate")


def routes() -> list[str]:
    """Every way of asking for a file that is not the page's."""
    targets = ("/etc/passwd", "secret.txt", "../secret.txt", "../../etc/passwd", "stderr.txt")
    spelled = [
        *targets,
        *(urllib.parse.quote(t, safe="") for t in targets),
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/secret.txt",
    ]
    heads = (
        "gradio_api/file=",
        "file=",
        "gradio_api/file/",
        "gradio_api/stream/x/x/x/",
        "gradio_api/deep_link?session_hash=",
        "static/",
        "assets/",
        "svelte/",
        "custom_component/x/client/",
        "gradio_api/custom_component/x/client/",
        "gradio_api/proxy=file:///",
        "theme.css?path=",
        "",
    )
    return [head + target for head in heads for target in spelled]


def test_no_route_serves_a_file_of_the_machine_or_other_visitors_runs(url):
    assert b.fetched(url + "gradio_api/runs")[0] == 404
    for route in routes():
        request = urllib.request.Request(url + route, headers={"accept": "*/*"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                body = answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
        assert SECRET not in body and "root:x:" not in body and "loading the model" not in body, route


def test_nothing_is_written_but_small_uploads_into_a_folder_of_the_page(url, folder):
    before = {path.name for path in folder.iterdir()}

    def upload(name, size):
        line = b'--x\r\ncontent-disposition: form-data; name="files"; filename="%s"\r\n\r\n' % name
        body = line + b"a" * size + b"\r\n--x--\r\n"
        headers = {"content-type": "multipart/form-data; boundary=x"}
        request = urllib.request.Request(f"{url}gradio_api/upload", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, []

    outside = Path(tempfile.gettempdir()) / f"escaped-{time.time_ns()}.txt"
    for name in (b"../../escaped.txt", str(outside).encode(), b"..\\escaped.txt"):
        status, paths = upload(name, 10)
        own = Path(tempfile.gettempdir()).resolve() / "gradio"
        assert status != 200 or all(Path(path).resolve().is_relative_to(own) for path in paths), name
    assert upload(b"fine.json", 10)[0] == 200 and not outside.exists()
    assert upload(b"large.json", 1 << 17)[0] == 413
    assert {path.name for path in folder.iterdir()} == before


def test_it_is_not_shared_unless_asked_for(folder, url):
    said = (folder / "stderr.txt").read_text()
    assert "127.0.0.1" in said and "gradio.live" not in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault(chromium, url, scheme, width):
    page = b.visit(chromium, url, width, scheme=scheme)
    found = []
    for tab in ("Erase", "Compare", "Inspect"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(400)
        violations = Axe().run(page).response["violations"]
        found += [
            (tab, v["id"], node["html"][:160])
            for v in violations
            if v["impact"] in ("serious", "critical")
            for node in v["nodes"]
        ]
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width + 1
    page.context.close()
    assert found == []


def test_it_can_be_used_by_the_keyboard_alone(page):
    b.settle(page, steps=2)
    page.locator("#prompt textarea").focus()
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("() => document.activeElement.innerText || document.activeElement.ariaLabel")
        )
        if (seen[-1] or "").strip() == "Generate":
            break
    assert (seen[-1] or "").strip() == "Generate", seen
    page.keyboard.press("Enter")
    assert b.wait_for(page, "Done:")
