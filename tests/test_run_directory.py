"""Names in a run directory, files that are whole or not there, and configs by dotted keys."""

from pathlib import Path

import pytest

from tcopilot.run_directory import RUNLESS, RunDirectory, flatten, share, write_whole


def test_a_name_is_known_with_and_without_a_folder():
    run = RunDirectory("runs/a")
    assert run.results == Path("runs/a/results.json")
    assert run.control("equal_time").predictions == Path("runs/a/control/equal_time/predictions")
    assert RunDirectory.config.name == run.config.name == "config.yaml"
    assert f"{run}" == "runs/a"
    assert {"predictions", "control", "export"} <= RUNLESS


def test_a_file_is_written_with_its_folder_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "done.json"
    for text in ("one\n", "λ\n"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("config", "flat"),
    [
        ({"a": {"b": {"c": 1}, "d": []}}, {"a.b.c": 1, "a.d": []}),
        ({"a": {}, "b": None}, {"a": {}, "b": None}),
        ({"policy": {"_target_": "x.Fifo"}}, {"policy": "x.Fifo"}),
    ],
)
def test_a_config_goes_by_dotted_keys(config, flat):
    assert flatten(config) == flat


def test_a_disk_that_knows_no_permissions_costs_no_results(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_text("results")

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(f"{path}: {mode:o}")

    monkeypatch.setattr(Path, "chmod", refuse)
    share(file)
    assert file.read_text() == "results"
