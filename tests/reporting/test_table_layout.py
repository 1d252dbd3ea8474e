"""The layout of tables: sheets, Markdown, CSV and JSON."""

import csv
import io
import json
from pathlib import Path

import pytest
from written_runs import CUTS, published_run, summaries_of, write_run

from tcopilot.reporting.tables import lay_out, main


def test_an_average_without_all_members_is_not_printed_but_the_missing_are(tmp_path):
    present = ("piqa", "winogrande", "siqa", "openbookqa")
    (summary,) = summaries_of(published_run(tmp_path, present))
    assert summary.line("commonsense_avg", "accuracy") is None
    assert summary.missing == {"commonsense_avg accuracy": ["hellaswag", "boolq"]}
    paper = lay_out([summary])[1]
    assert paper.rows[0][paper.head.index("avg")] == "–"
    assert any("missing: hellaswag, boolq" in note for note in paper.notes)


def test_published_figures_stand_beside_ours_in_the_papers_columns(tmp_path):
    (summary,) = summaries_of(published_run(tmp_path, shift=1.0))
    assert summary.group.label == "LLaMA-3.2-1B + T-Copilot-1B"
    paper = lay_out([summary])[1]
    assert " ".join(paper.head) == " PIQA WinoG HellaS BoolQ SIQA OBQA avg AQuA GSM8K MAWPS SVAMP avg"
    by_name = [(row[0].strip(), row[1:]) for row in paper.rows if row]
    assert [name for name, _ in by_name][1:3] == ["published", "ours minus it"]
    assert " ".join(by_name[1][1]) == "77.5 71.1 61.8 63.9 71.9 66.8 68.8 25.6 27.3 77.1 47.3 44.3"
    assert " ".join(by_name[4][1]) == "80.2 73.7 63.3 65.5 74.9 68.9 71.1 28.3 32.2 81.5 51.6 48.4"
    assert by_name[0][1][8] == "28.3"  # GSM8K: 27.3 + 1
    assert by_name[2][1] == ["+1.0"] * 12
    assert "metric: accuracy" in paper.notes[0]


def test_tiny_models_have_a_dash_beside_them(tmp_path):
    (summary,) = summaries_of(write_run(tmp_path, {("gsm8k", "accuracy"): (0.4, 0.5)}))
    gains, paper = lay_out([summary])
    assert [gains.rows[0][i] for i, head in enumerate(gains.head) if head == "published"] == ["–", "–"]
    assert paper.rows[1] == ["  published", *["–"] * 5]  # four benchmarks and their average


def recommendation_run(folder: Path, pilot: str) -> Path:
    figures = {(f"{kind}@{k}"): 0.01 * i for i, (kind, k) in enumerate((m, k) for k in CUTS for m in ("ndcg", "hit"))}
    rows = {("beauty", metric): (value, value + 0.01) for metric, value in figures.items()}
    return write_run(folder, rows, n=22363, pilot__path=pilot)


def test_impossible_ndcg_of_t5_small_on_beauty_is_said(tmp_path):
    (summary,) = summaries_of(recommendation_run(tmp_path, "google-t5/t5-small"))
    assert summary.line("beauty", "hit@20").beyond("pilot") == pytest.approx(5.0 - 5.4)
    assert summary.line("beauty", "ndcg@20").beyond("pilot") is None
    note = "published NDCG here is arithmetically impossible: T5-small on beauty, ndcg@20 - ndcg@10 = 2.1"
    assert any(note in line and "0.57 to 0.70" in line for line in summary.notes)
    assert any(note.startswith("the size of the Copilot") for note in summary.notes)
    paper = lay_out([summary])[-1]
    assert (paper.title, paper.head[1:4], paper.head[-1]) == ("Beauty", ["hit@5", "hit@10", "hit@20"], "ndcg@100")
    published_row = dict(zip(paper.head, paper.rows[1], strict=True))
    assert (published_row["hit@20"], published_row["ndcg@20"], published_row["ndcg@5"]) == ("5.4", "3.5†", "1.0")
    assert any(note in line for line in paper.notes)


def test_possible_ndcg_is_compared(tmp_path):
    (summary,) = summaries_of(recommendation_run(tmp_path, "Llama-3.2-1B"))
    assert summary.line("beauty", "ndcg@20").beyond("pilot") == pytest.approx(4.0 - 5.1)
    assert not [note for note in summary.notes if "impossible: LLaMA-3.2-1B on" in note]


def test_markdown_csv_and_json_hold_the_same_figures(three_seeds, capsys):
    paths = {kind: three_seeds / f"table.{kind}" for kind in ("markdown", "csv", "json")}
    arguments = [part for kind, path in paths.items() for part in (f"--{kind}", str(path))]
    assert main([str(three_seeds), *arguments]) == 0
    assert "42.0 ± 2.0" in capsys.readouterr().out
    (record,) = json.loads(paths["json"].read_text())["groups"][0]["lines"]
    (line,) = csv.DictReader(io.StringIO(paths["csv"].read_text()))
    assert float(line["pilot_mean"]) == record["pilot_mean"] == pytest.approx(42.0)
    assert float(line["gain_sd"]) == record["gain_sd"] == pytest.approx(1.0)
    assert (line["seeds"], record["seeds"]) == ("0 1 2", [0, 1, 2])
    assert (line["published_pilot"], record["published_pilot"]) == ("", None)
    table = [row for row in paths["markdown"].read_text().splitlines() if row.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[:3]]
    assert len({len(row) for row in cells}) == 1
    shown = dict(zip(cells[0], cells[2], strict=True))
    assert (shown["Pilot"], shown["Pilot + Copilot"], shown["gain"]) == ("42.0 ± 2.0", "45.0 ± 2.6", "+3.0 ± 1.0")


@pytest.mark.parametrize("kind", ["markdown", "csv", "json"])
def test_a_dash_leaves_stdout_to_the_file(three_seeds, capsys, kind):
    (three_seeds / "stopped").mkdir()
    (three_seeds / "stopped" / "config.yaml").write_text("seed: 9\n")
    assert main([str(three_seeds), f"--{kind}", "-"]) == 0
    shown = capsys.readouterr()
    assert main([str(three_seeds), f"--{kind}", str(three_seeds / "file")]) == 0
    assert shown.out == (three_seeds / "file").read_text()
    assert shown.err == f"unfinished: {three_seeds / 'stopped'}\n"
