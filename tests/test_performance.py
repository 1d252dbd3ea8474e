"""docs/performance.md holds what its JSON says, and bars are judged by the worst figure."""

import importlib.util
import json
import sys

import composed
import pytest

FOLDER = composed.ROOT / "performance"


@pytest.fixture(scope="module")
def performance():
    spec = importlib.util.spec_from_file_location("all_performance_scripts", FOLDER / "all.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # for the modules beside it
        spec.loader.exec_module(module)
    return module


def round_row(overhead, trainer=1.0):
    return {
        "pilot": "llama", "copilot": "4 layers", "source": 128, "target": 16, "ratio": 1.2, "floor": 1.1,
        "overhead": overhead, "trainer": trainer,
    }  # fmt: skip


def test_the_page_is_what_the_committed_figures_give(performance):
    page, found = performance.PAGE.read_text(), json.loads(performance.FOUND.read_text())
    assert performance.render(page, found) == page


def test_the_page_has_a_place_for_every_table(performance):
    page = performance.PAGE.read_text()
    for name in (*performance.TABLES, "records", "bars"):
        assert page.count(f"<!-- {name} -->\n") == page.count(f"<!-- /{name} -->") == 1, name
    assert set(performance.SCRIPTS) == set(performance.TABLES)


def test_tables_replace_what_stood_between_their_marks_and_nothing_else(performance):
    page = "before\n<!-- round -->\nold\n<!-- /round -->\nbetween\n<!-- log -->\nkept\n<!-- /log -->\nafter\n"
    written = performance.render(page, {"round": [round_row(1.05)]})
    assert "old" not in written
    assert "| llama | 4 layers | 128 | 16 | 1.20 | 1.10 | 1.05 | 1.00 |" in written
    assert written.endswith("between\n<!-- log -->\nkept\n<!-- /log -->\nafter\n")
    assert written.startswith("before\n<!-- round -->\n| Pilot |")
    assert performance.render(written, {"round": [round_row(1.05)]}) == written


@pytest.mark.parametrize(
    ("overheads", "said"),
    [((1.0, 1.25), "1.25, at most 1.25: met"), ((1.3, 1.0), "1.30, at most 1.25: missed")],
)
def test_a_bar_is_judged_by_the_worst_figure(performance, overheads, said):
    assert said in performance.bars({"round": [round_row(overhead) for overhead in overheads]})[0]


def test_what_was_not_measured_has_no_bar(performance):
    assert performance.bars({}) == []


def test_the_scripts_take_the_options_that_they_are_given(performance):
    for command in performance.SCRIPTS.values():
        text = (FOLDER / command[0]).read_text()
        for option in (*command[1:], "--json"):
            assert not option.startswith("--") or f'"{option}"' in text, (command[0], option)
