"""Every kind of run that a config can ask for, how runs stop and go on, and both programs as a user starts them."""

import csv
import gzip
import json
import math
import shutil
import signal
from pathlib import Path

import composed
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.jobs import STOPPED
from tcopilot.data.generated_tasks import GeneratedTask
from tcopilot.data.metrics import Metric
from tcopilot.data.tokenizers import word_tokenizer
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.run_directory import RunDirectory
from tcopilot.training.module import TCopilotModule, TrainingDivergedError
from tcopilot.version import __version__

DATA = composed.ROOT.parent / "shared" / "data"
ACCURACY = Metric("accuracy")
SHORT = [*composed.SMALL, "fusion.weight=[0,1]"]
LLAMA = ["pilot=tiny_llama"]
LORA = [
    "adapter@pilot.adapter=lora",
    "adapter@copilot.adapter=lora",
    "copilot.head=soft",
    "copilot.train_error_input=false",
]


# Every kind of run that a config can ask for ------------------------------------------------------------------------

KINDS = {
    "top-k log, mse": ["log_storage@mistake_log.log.storage=topk", "mistake_log.log.storage.k=8", "objective=mse"],
    "half-precision log, kl": [
        "mistake_log.log.dtype=bfloat16",
        "mistake_log.log.storage.dtype=float16",
        "objective=kl",
    ],
    "latest records of a stream": ["mistake_log=latest", "data.streaming=true"],
    "reservoir, max pooling, pattern 2": ["mistake_log=reservoir", "copilot.pooling=max", "copilot.pattern=2"],
    "prioritised, linear schedule, pattern 3": [
        *("mistake_log=prioritised", "copilot.pattern=3"),
        *("scheduler@pilot.scheduler=linear", "scheduler@copilot.scheduler=constant"),
    ],
    "balanced, random error input, pattern 4": [
        *("mistake_log=balanced", "copilot.error_input=normal", "copilot.pattern=4")
    ],
    "soft head, ce": ["copilot.head=soft", "objective=ce"],
    "own feedback": ["fusion.feedback=own", "copilot.own_feedback=0.5"],
    "only a head": ["copilot=head"],
    "only a head, on a Llama": ["copilot=head", "copilot.head=low_rank", "pilot=tiny_llama"],
    "logits, one layer": ["fusion=logits", "fusion.weight=[0,1]", "copilot=half"],
    "bf16, checkpointing": [
        *("trainer.precision=bf16-mixed", "pilot.gradient_checkpointing=true", "copilot.gradient_checkpointing=true")
    ],
    "no positions in a Llama, pattern 2": [*LLAMA, "copilot.positions=none", "copilot.pattern=2"],
    "inclusive context in a Llama, pattern 3": [*LLAMA, "copilot.context=inclusive", "copilot.pattern=3"],
    "beams and micro-batches of a Llama, pattern 4": [
        *(*LLAMA, "evaluation=beam4", "pilot.micro_batch_size=4", "copilot.pattern=4")
    ],
    "passes instead of rounds": ["rounds=null", "data.epochs=0.25", "data.max_train_rows=128"],
    "Tensorboard": ["logger=tensorboard"],
    "Llama": LLAMA,
}
"""Values of different parts share a run; that they agree with one another is what tests of those parts show."""
FAST = ("own feedback", "only a head", "passes instead of rounds", "Llama")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_every_kind_of_run_trains_evaluates_and_exports(kind, tmp_path):
    budget = ["seed=0"] if kind == "passes instead of rounds" else []
    warm = ["copilot.scheduler.num_warmup_steps=0"]
    if kind == "Tensorboard":
        pytest.importorskip("tensorboard")
    folder = composed.train(tmp_path / "run", *SHORT, *warm, *KINDS[kind], *budget)
    found = composed.results(folder)
    assert found["rounds"] == (2 if budget else 4)
    pilot, fused = (composed.value(found, "test", "nll", w, "all") for w in (0.0, 1.0))
    assert math.isfinite(fused)
    assert pilot != fused  # the Copilot was trained and is heard
    model = "CausalLM" if "pilot=tiny_llama" in KINDS[kind] else "Seq2SeqLM"
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["architectures"] == [f"TCopilotFor{model}"]


@pytest.mark.slow
def test_a_copilot_that_is_only_a_head_is_traced_like_any_other(tmp_path):
    folder = composed.train(tmp_path / "run", *SHORT, "copilot=head")
    traced = composed.evaluate(folder, tmp_path / "eval", "trace=true")
    with gzip.open(RunDirectory(traced).trace_rows("word_problems"), "rt") as file:
        position = json.loads(file.readline())["gold"][0]
    assert len(position["copilot_lens"]) == 1


@pytest.mark.slow
def test_shots_of_a_run_stand_before_rows_for_which_there_is_nothing_to_train_on(tmp_path):
    lines = {
        split: "\n".join(json.dumps({"prompt": f"{split} {i} + 1 =", "target": f" {i + 1}"}) for i in range(30))
        for split in ("train", "validation", "test")
    }
    for place, splits in (("whole", lines), ("new", ["test"])):
        (tmp_path / place).mkdir()
        for split in splits:
            (tmp_path / place / f"{split}.jsonl").write_text(lines[split])
    shots = ["data=jsonl", f"data.path={tmp_path / 'whole'}", "data.shots=3", "pilot=tiny_llama"]
    folder = composed.train(tmp_path / "run", "debug=limit", "fusion.weight=1", *shots)
    assert len(json.loads((folder / "shots.json").read_text())["jsonl"]) == 3
    assert composed.results(folder)["data"]["jsonl/train"]["rows"] == 27
    again = composed.evaluate(folder, tmp_path / "eval", f"data.path={tmp_path / 'new'}")
    assert composed.predictions(again, "test", 1.0, "jsonl") == composed.predictions(folder, "test", 1.0, "jsonl")
    nll = [composed.value(composed.results(place), "test", "nll", 1.0, "all") for place in (folder, again)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-6)


@pytest.mark.slow
def test_fine_tuning_without_a_copilot_is_a_run_like_any_other(tmp_path):
    folder = composed.train(tmp_path / "run", *composed.SMALL, "copilot=none")
    found = composed.results(folder)
    assert (found["selected_weight"], {row["weight"] for row in found["rows"]}) == (0.0, {0.0})
    assert (found["params"]["copilot"], found["gain"][0]["difference"]) == (0, 0.0)
    again = composed.results(composed.evaluate(folder, tmp_path / "eval", "fusion.weight=[0,1]"))
    assert again["rows"] == found["rows"]


@pytest.mark.slow
def test_the_closed_form_weight_can_end_a_training_run(tmp_path):
    found = composed.results(composed.train(tmp_path / "run", *composed.SMALL, "fusion.weight=auto"))
    assert {row["weight"] for row in found["rows"]} == {0.0, found["selected_weight"]}
    assert found["selected_weight"] > 0


@pytest.mark.slow
def test_the_equal_time_control_stands_beside_the_gain(tmp_path, capsys):
    folder = composed.train(tmp_path / "run", *SHORT, "control=equal_time")
    found = composed.results(folder)
    control, likelihood = found["controls"]
    assert (control["name"], control["split"], control["n"]) == ("Pilot, equal time", "test", 16)
    assert (likelihood["name"], likelihood["benchmark"], likelihood["metric"]) == ("Pilot, equal time", "all", "nll")
    assert control["rounds"] > 0
    rows = composed.predictions(folder / "control" / "equal_time", "test", 0.0)
    assert control["value"] == sum(row["scores"]["accuracy"] for row in rows) / 16
    assert control["rounds"] >= composed.results(folder)["rounds"]  # the joint run did all that these do
    assert "Pilot, equal time" in capsys.readouterr().out
    assert found["rounds"] == 4  # the joint run's own


def test_a_copilot_is_trained_for_a_finished_pilot(tmp_path):
    donor = finished_llama(tmp_path / "pilot")
    given = ["pilot.frozen=true", f"pilot.path={tmp_path}/pilot", "copilot.scheduler.num_warmup_steps=0"]
    folder = composed.train(tmp_path / "run", *SHORT, *LLAMA, *given)
    found = composed.results(folder)
    assert found["params"]["pilot_trainable"] == 0
    assert found["params"]["copilot_trainable"] > 0
    export = AutoModelForCausalLM.from_pretrained(folder / "export")
    for name, weight in donor.state_dict().items():
        assert torch.equal(export.pilot.state_dict()[name], weight), name
    assert composed.value(found, "test", "nll", 0.0, "all") != composed.value(found, "test", "nll", 1.0, "all")


@pytest.mark.slow
def test_a_copilot_is_trained_for_the_pilot_of_an_earlier_run(tmp_path):
    first = composed.train(tmp_path / "first", *SHORT, *LLAMA, "copilot=none")
    given = ["pilot.frozen=true", f"pilot.path={first}/export", "copilot.scheduler.num_warmup_steps=0"]
    given += ["data.split_seed=1"]
    second = composed.train(tmp_path / "second", *SHORT, *LLAMA, *given)
    before, after = (AutoModelForCausalLM.from_pretrained(run / "export") for run in (first, second))
    assert before.copilot is None
    assert after.copilot is not None
    assert (before.config.split_seed, after.config.split_seed) == (0, 1)
    notes = "\n".join(composed.results(second)["notes"])
    assert "was trained with data.split_seed=0, and here it is 1" in notes
    for name, weight in before.pilot.state_dict().items():
        assert torch.equal(after.pilot.state_dict()[name], weight), name


@pytest.mark.slow
def test_a_run_shorter_than_the_validation_interval_is_trained_and_validated(tmp_path):
    folder = composed.train(tmp_path, *SHORT, "rounds=3", "trainer.val_check_interval=100")
    assert "val/error_ratio" in (folder / "metrics.csv").read_text()


@pytest.mark.slow
def test_a_copilot_starts_from_a_smaller_model_of_the_family(tmp_path):
    donor = finished_llama(tmp_path / "donor", width=16)
    given = [f"copilot.path={tmp_path}/donor", "copilot.optimizer.lr=1e-12", "copilot.train_error_input=false"]
    folder = composed.train(tmp_path / "run", *SHORT, *LLAMA, *given)
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert (model.pilot.config.hidden_size, model.copilot.body.config.hidden_size) == (64, 16)
    copied = model.copilot.body.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(copied, donor.model.layers[0].mlp.up_proj.weight, atol=1e-8, rtol=0)


def finished_llama(folder: Path, width: int = 32) -> LlamaForCausalLM:
    """A LLaMA of the demo's words with its tokenizer, in a folder as anybody would save it."""
    tokenizer = word_tokenizer(GeneratedTask(name="a", kind="word_problems").vocabulary)
    torch.manual_seed(3)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            **sizes, num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.slow
def test_adapters_are_trained_on_both_models_and_merged_into_the_export(tmp_path):
    folder = composed.train(tmp_path / "run", *SHORT, *LLAMA, *LORA, "copilot.scheduler.num_warmup_steps=0")
    found = composed.results(folder)
    for name in ("pilot", "copilot"):
        assert 0 < found["params"][f"{name}_trainable"] < found["params"][name]
    weights = load_file(folder / "export" / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert model.copilot.config.head == "soft"
    again = composed.results(composed.evaluate(folder, tmp_path / "eval", "fusion.weight=[0,1]"))
    for old, new in zip(found["rows"], again["rows"], strict=True):
        assert new["value"] == pytest.approx(old["value"], rel=1e-4)


@pytest.mark.slow
def test_adapters_learn_in_full_precision_on_weights_in_half(tmp_path):
    finished_llama(tmp_path / "pilot")
    half = [f"pilot.path={tmp_path}/pilot", "pilot.dtype=bfloat16", "trainer.precision=bf16-mixed"]
    seen = {}

    def look(self):
        seen.update({n: p.dtype for n, p in self.model.pilot.named_parameters() if p.requires_grad})

    with pytest.MonkeyPatch.context() as patch:
        start = TCopilotModule.on_train_start
        patch.setattr(TCopilotModule, "on_train_start", lambda self: (look(self), start(self))[1])
        composed.train(tmp_path / "run", *SHORT, *LLAMA, *LORA, *half)
    assert seen
    assert set(seen.values()) == {torch.float32}


@pytest.mark.slow
def test_a_mixture_reports_every_benchmark_beside_the_others(tmp_path):
    small = [o for o in SHORT if "word_problems" in o] + [
        o.replace("word_problems", "multiple_choice") for o in SHORT if "word_problems" in o
    ]
    mixed = ["data=[word_problems,multiple_choice]", "mistake_log=balanced"]
    weights = ["data.weights={word_problems: 1, multiple_choice: 3}"]
    folder = composed.train(tmp_path / "run", *mixed, *small, *weights, "debug=limit", "fusion.weight=[0,1]")
    found = composed.results(folder)
    assert [gain["benchmark"] for gain in found["gain"]] == ["word_problems", "multiple_choice"]
    assert len(composed.predictions(folder, "test", 1.0, "multiple_choice")) == 16
    with (folder / "metrics.csv").open() as file:
        assert any(line["train/pilot_loss"] for line in csv.DictReader(file))


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """A finished run of four rounds, to be read or copied."""
    return composed.train(tmp_path_factory.mktemp("short") / "run", *SHORT)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(short, tmp_path):
    same, other = (composed.results(composed.train(tmp_path / f"{s}", *SHORT, f"seed={s}")) for s in (0, 4))
    assert composed.results(short)["seed"] == 0
    assert composed.results(short)["rows"] == same["rows"] != other["rows"]


@pytest.mark.slow
def test_the_returned_gain_is_what_a_sweep_maximises(tmp_path, monkeypatch):
    """The gain on validation; a sweep that saw the gain on test would choose on test."""
    right = {("validation", 0): 2, ("validation", 1): 8, ("test", 0): 1, ("test", 1): 10}

    def scores(self, split, name, weights):
        return {w: {ACCURACY: [float(i < right[split, int(w)]) for i in range(10)]} for w in weights}

    monkeypatch.setattr(Evaluator, "scores", scores)
    given = (*SHORT, "fusion.select_by=metric", f"paths.run_dir={tmp_path}")
    with composed.without_estimate():
        assert composed.run.train(composed.compose_config(*composed.QUIET, *given)) == pytest.approx(0.6)
    assert composed.results(tmp_path)["gain"][0]["difference"] == pytest.approx(0.9)


# Stops, resumes, divergence ------------------------------------------------------------------------------------------

STOP = ["+callbacks.interrupt._target_=composed.InterruptAfter", "+callbacks.interrupt.rounds=2"]


def test_a_stopped_run_goes_on_where_it_was_and_ends_like_any_other(short, tmp_path):
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit) as left:
        composed.train(folder, *SHORT, *STOP)
    assert left.value.code == STOPPED
    assert not (folder / "results.json").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["round=2"]
    with (folder / "metrics.csv").open() as file:
        before = [line["train/pilot_loss"] for line in csv.DictReader(file) if line["train/pilot_loss"]]
    assert len(before) == 2

    composed.resume(folder)
    found = composed.results(folder)
    assert found["rounds"] == 4
    with (folder / "metrics.csv").open() as file:
        losses = [line["train/pilot_loss"] for line in csv.DictReader(file) if line["train/pilot_loss"]]
    assert losses[:2] == before  # nothing of the first part is lost
    assert len(losses) == 4

    for old, new in zip(composed.results(short)["rows"], found["rows"], strict=True):
        assert new["value"] == pytest.approx(old["value"], rel=1e-5)


def test_a_stopped_run_without_states_does_not_promise_to_go_on(tmp_path, caplog):
    with pytest.raises(SystemExit), caplog.at_level("INFO"):
        composed.train(tmp_path, *SHORT, *STOP, "callbacks.checkpoint=null")
    assert "Stopped after round 2. It cannot go on" in caplog.text
    assert "resume=" not in caplog.text


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_and_says_the_same_again(short, tmp_path):
    folder = shutil.copytree(short, tmp_path / "run")
    before = composed.results(folder)
    composed.resume(folder)
    after = composed.results(folder)
    assert (after["rows"], after["rounds"]) == (before["rows"], before["rounds"])


@pytest.mark.parametrize("files", [[], ["config.yaml"]])
def test_resuming_what_cannot_be_resumed_says_why(files, tmp_path):
    for name in files:
        config = composed.compose_config(*SHORT, f"paths.run_dir={tmp_path}", f"+version={__version__}")
        OmegaConf.save(config, tmp_path / name, resolve=True)
    with pytest.raises(ConfigError) as refused:
        composed.resume(tmp_path)
    assert f"resume={tmp_path}" in str(refused.value)
    assert ("no checkpoint" if files else "no config.yaml") in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "said"), [(1, "round=2"), pytest.param("null", "No state had been saved yet", marks=pytest.mark.slow)]
)
def test_a_run_that_diverges_names_its_last_good_state(every, said, tmp_path, monkeypatch):
    loss = TCopilotModule._pilot_loss
    monkeypatch.setattr(
        TCopilotModule, "_pilot_loss", lambda self, s: loss(self, s) * (float("nan") if self.round == 2 else 1)
    )
    with pytest.raises(TrainingDivergedError) as diverged:
        composed.train(tmp_path / "run", *SHORT, f"callbacks.checkpoint.every_n_rounds={every}")
    for part in ("round 3", "pilot loss nan", "pilot.optimizer.lr", said):
        assert part in str(diverged.value)
    if every == 1:
        assert str(diverged.value).endswith(str(tmp_path / "run" / "checkpoints" / "round=2"))
    with pytest.raises(SystemExit) as left:
        composed.train(tmp_path / "again", *SHORT, "traceback=false")
    assert left.value.code == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_told_to_stop_before_its_first_round_does_not_end_as_if_it_were_done(
    number, tmp_path, monkeypatch, capsys
):
    validate = TCopilotModule.validation_step

    def told(self, *given):
        signal.raise_signal(number)
        return validate(self, *given)

    monkeypatch.setattr(TCopilotModule, "validation_step", told)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs of a shell ignore
    try:
        with pytest.raises(SystemExit) as left:
            composed.train(tmp_path / "run", *SHORT, "trainer.num_sanity_val_steps=1")
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == STOPPED
    assert "To continue, start again with the same command" in capsys.readouterr().err


def test_ctrl_c_works_again_after_a_run_that_failed(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TCopilotModule, "_pilot_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(TrainingDivergedError):
        composed.train(tmp_path / "run", *SHORT)
    assert signal.getsignal(signal.SIGINT) is before


# As a user starts it ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_programs_train_and_evaluate_from_the_command_line(tmp_path):
    trained = composed.program("train.py", *SHORT, f"hydra.run.dir={tmp_path}/run")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.strip().splitlines()[-1] == f"results: {tmp_path}/run/results.json"
    scored = composed.program(
        "eval.py", f"run={tmp_path}/run", "fusion.weight=[0,0.5]", f"hydra.run.dir={tmp_path}/eval"
    )
    assert scored.returncode == 0, scored.stderr
    assert scored.stdout.strip().splitlines()[-1] == f"results: {tmp_path}/eval/results.json"
    missing = composed.forked("eval.py", "run=/no/such/run", f"hydra.run.dir={tmp_path}/none")
    assert missing.returncode == 1
    assert "run=/no/such/run: no export/config.json there" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.slow
def test_a_sweep_runs_every_job_into_a_folder_of_its_own(tmp_path):
    with composed.without_estimate():
        done = composed.forked("train.py", "-m", *SHORT, "copilot=half,none", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    params = [composed.results(tmp_path / f"copilot-{job}")["params"]["copilot"] for job in ("half", "none")]
    assert params[0] > params[1] == 0


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' rows are not here")
@pytest.mark.parametrize(("benchmark", "pilot"), [("gsm8k", "tiny_t5"), ("openbookqa", "tiny_llama")])
def test_real_rows_run_from_the_command_line(benchmark, pilot, tmp_path):
    given = [f"data={benchmark}", f"data.path={DATA}", f"pilot={pilot}", "debug=limit", f"hydra.run.dir={tmp_path}"]
    done = composed.forked("train.py", *given)
    assert done.returncode == 0, done.stderr
    found = composed.results(tmp_path)
    compared = [(gain["benchmark"], gain["metric"]) for gain in found["gain"]]
    assert compared == [(benchmark, "accuracy"), (benchmark, "accuracy_lenient")]
    row = composed.predictions(tmp_path, "test", 1.0, benchmark)[0]
    assert row["prompt"].startswith("Question: ")
    assert row["answer"]
