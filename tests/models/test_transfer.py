"""A Copilot on a Pilot that it was not trained with."""

import composed
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tcopilot.app.checks.problems import ConfigError

SMALL = [*composed.SMALL, "pilot=tiny_llama", "fusion.weight=[0,1]", "copilot.scheduler.num_warmup_steps=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs from different seeds on the same words."""
    folder = tmp_path_factory.mktemp("runs")
    return [composed.train(folder / f"{seed}", *SMALL, f"seed={seed}") for seed in (0, 1)]


def transferred(folder, *overrides):
    given = [f"paths.run_dir={folder}", "traceback=true", *overrides]
    composed.run.evaluate(composed.compose_config(*given, name="eval"))
    return composed.results(folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["export", "bare Pilot"])
def test_the_pilot_is_the_other_one_and_the_copilot_is_the_runs(runs, form, tmp_path):
    mine, other = runs
    path = other / "export"
    if form == "bare Pilot":
        path = tmp_path / "pilot"
        export = AutoModelForCausalLM.from_pretrained(other / "export")
        export.pilot.save_pretrained(path)
        for name in (other / "export").glob("tokenizer*"):
            (path / name.name).write_bytes(name.read_bytes())
    found = transferred(tmp_path / "eval", f"pilot.path={path}", f"copilot.path={mine}/export")
    theirs = composed.results(mine)
    for split in ("validation", "test"):  # the rows are those of the Copilot's run
        assert composed.value(found, split, "nll", 0.0, "all") != composed.value(theirs, split, "nll", 0.0, "all")
    assert "not trained with" in found["notes"][0]
    fused, donor = (AutoModelForCausalLM.from_pretrained(run / "export") for run in (other, mine))
    fused.attach(donor.detach_copilot())
    fused.weight = 1.0
    rows = composed.predictions(tmp_path / "eval", "test", 1.0)
    tokenizer = AutoTokenizer.from_pretrained(other / "export")
    for row in rows[:5]:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        with torch.no_grad():
            said = fused.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=1)
        assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True) == row["prediction"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pilot.config.hidden_size=32"], ["width 32", "trained with 64"]),
        (["data=multiple_choice", "data.benchmarks.multiple_choice.train=200"], ["other tokens"]),
    ],
)
def test_a_pilot_that_does_not_fit_is_refused_before_weights_load(runs, overrides, said, tmp_path, monkeypatch):
    small = [o for o in SMALL if "word_problems" not in o] if "data" in overrides[0] else SMALL
    limits = [o.replace("train=200", f"{s}=20") for o in overrides[1:] for s in ("validation", "test")]
    other = composed.train(tmp_path / "other", *small, *overrides, *limits)
    for auto in ("TCopilotForCausalLM", "TCopilotForSeq2SeqLM"):
        monkeypatch.setattr(
            f"tcopilot.models.modeling.{auto}.from_pretrained", lambda *_, **__: pytest.fail("weights loaded")
        )
    with pytest.raises(ConfigError) as refused:
        transferred(tmp_path / "eval", f"run={runs[0]}", f"pilot.path={other}/export")
    for word in said:
        assert word in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "give run=<run dir>"),
        (["run=a", "copilot.path=b"], "give run=<run dir>"),
        (["copilot.path=/no/such/export"], "copilot.path=/no/such/export: no config.yaml beside the export"),
        (["run=<mine>", "pilot.path=/no/such/model"], "pilot.path=/no/such/model"),
    ],
)
def test_what_is_missing_is_named(runs, overrides, said, tmp_path):
    with pytest.raises(ConfigError) as refused:
        transferred(tmp_path / "eval", *(value.replace("<mine>", str(runs[0])) for value in overrides))
    assert said in str(refused.value)
    assert not (tmp_path / "eval").exists()
