from dataclasses import replace

import yaml
from transformers import LlamaConfig, T5Config
from written_runs import write_run

from tcopilot.evaluation.results import Control, Results
from tcopilot.reporting.model_card import ALONE, NO_CONTROL, model_card


def test_the_card_names_pilot_data_weight_gain_and_controls(tmp_path):
    results = Results.load(write_run(tmp_path / "run", {("gsm8k", "accuracy"): (0.2, 0.25)}) / "results.json")
    results = replace(results, data={"gsm8k/train": {"rows": 7473}}, notes=["a remark"])
    header, text = model_card(results, "meta-llama/Llama-3.2-1B", LlamaConfig()).split("---\n", 2)[1:]
    assert yaml.safe_load(header) == {
        "library_name": "tcopilot",
        "tags": ["transformer-copilot"],
        "pipeline_tag": "text-generation",
        "base_model": "meta-llama/Llama-3.2-1B",
    }
    for part in ("gsm8k/train: 7,473 rows", "0.5, chosen on validation", "20.00 %", "25.00 %", "+5.00 [+4.00, +6.00]"):
        assert part in text
    assert NO_CONTROL in text
    assert "- a remark" in text
    control = Control(
        *("gsm8k", "test", "accuracy", 0.26, 100, (0.2, 0.3)), name="pilot_for_the_same_time", rounds=900,
        train_seconds=60.0,
    )  # fmt: skip
    folder = tmp_path / "models" / "my-t5"
    folder.mkdir(parents=True)
    card = model_card(replace(results, controls=[control]), str(folder), T5Config())
    assert "| pilot_for_the_same_time | gsm8k | accuracy | 26.00 % | 900 | 60 |" in card
    assert NO_CONTROL not in card
    assert str(tmp_path) not in card, "a card is published, and tells no folders"
    assert "Pilot and Copilot from my-t5" in card
    assert "base_model" not in card
    assert "AutoModelForSeq2SeqLM" in card
    assert ALONE not in card
    alone = model_card(results, None, T5Config(), is_alone=True)
    assert ALONE in alone
    assert "from_pretrained" not in alone
