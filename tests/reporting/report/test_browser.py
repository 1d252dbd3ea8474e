"""The report in a real browser: desktop, phone and keyboard. Needs Chromium on the machine."""

import shutil

import composed
import pytest
from reports import BROKEN, FIXED, traced_run, with_outcomes

from tcopilot.reporting.report.page import main

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium here: none of {', '.join(NAMES)} is on the PATH"),
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run with known outcomes and its report."""
    folder = tmp_path_factory.mktemp("page")
    run = with_outcomes(traced_run(folder), folder / "known")
    assert main([str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root in containers
        yield opened
        opened.close()


@pytest.fixture(params=SIZES)
def page(request, browser, run):
    """The report at one size; it must not have complained or fetched anything when the test is over."""
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    opened, said, asked = context.new_page(), [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda call: asked.append(call.url))
    opened.goto((run / "report" / "index.html").as_uri())
    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def kinds(page):
    """Outcomes of the examples listed."""
    return [entry.get_attribute("data-kind") for entry in page.locator("details.example").all()]


def test_the_figures_on_the_page_are_those_of_results_json(page, run):
    rows = page.locator("table.gain tbody tr")
    gains = composed.results(run)["gain"]
    assert rows.count() == len(gains)
    for place, gain in enumerate(gains):
        row = rows.nth(place)
        for key in ("pilot", "fused", "difference", "fixed", "broken"):
            cell = row.locator(f"[data-key={key}]")
            assert float(cell.get_attribute("data-value")) == gain[key]
            scale = 1 if key in ("fixed", "broken") else 100
            assert float(cell.inner_text()) == pytest.approx(scale * gain[key], abs=0.006)
    assert page.locator("table.gain .bad").count() == 0
    assert page.locator(".sum .good").count() == len(gains)


def test_filters_work_by_click(page):
    assert len(kinds(page)) == 20
    page.click("button[data-kind=fixed]")
    assert kinds(page) == ["fixed"] * len(FIXED)
    page.click("button[data-kind=broken]")
    assert kinds(page) == ["broken"] * len(BROKEN)
    page.select_option("#benchmark", "multiple_choice")
    assert page.locator("#where").inner_text() == "No example fits."
    page.click("button[data-kind=all]")
    assert page.locator("#where").inner_text() == "1–20 of 30 examples"
    page.click("text=Next")
    assert len(kinds(page)) == 10
    page.fill("#search", "what is r1 of e1")
    prompts = page.locator("details.example summary .clip:nth-child(2)").all_inner_texts()
    assert all("what is r1 of e1" in prompt for prompt in prompts)


def test_filters_and_examples_work_by_keyboard(page):
    page.locator("button[data-kind=all]").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert set(kinds(page)) == {"fixed"}
    assert page.locator("button[data-kind=fixed]").get_attribute("aria-pressed") == "true"
    page.locator("details.example > summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.example").first.get_attribute("open") is not None


def test_an_opened_example_shows_positions_of_both_answers_and_the_lens(page):
    page.locator("details.example > summary").first.click()
    example = page.locator("details.example").first
    tokens = example.locator(".positions tbody tr td:nth-child(2)").all_inner_texts()
    assert tokens[-1] == "<eos>"
    assert example.locator(".positions tbody tr").first.locator("ol.top").count() == 3
    layers = example.locator(".lens tbody th").all_inner_texts()
    assert layers == ["Copilot layer 2", "Copilot layer 1", "Pilot layer 2", "Pilot layer 1"]
    example.get_by_role("button", name="along the emitted answer").click()
    said = example.locator(".said dd").last.locator(".token").all_inner_texts()
    assert example.locator(".positions tbody tr td:nth-child(2)").all_inner_texts() == said


def test_nothing_is_wider_than_the_screen(page):
    page.locator("details.example > summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_every_control_has_a_name(page):
    for control in page.locator("button, select, input, summary, figure svg").all():
        labels = control.evaluate("e => [e.getAttribute('aria-label'), e.labels?.[0]?.innerText, e.textContent]")
        assert any(label and label.strip() for label in labels)
