"""Bad input is refused before weights load: what is wrong, where, and how to mend it, all of it at once."""

import json
from pathlib import Path
from types import SimpleNamespace

import composed
import pytest
import torch
from transformers import LlamaConfig, MambaConfig

from tcopilot.app import build, console, run
from tcopilot.app.checks import config as checks
from tcopilot.app.checks import data as checks_of_data
from tcopilot.app.checks.problems import ConfigError
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.pilot import ModelSource

LORA = ["adapter@pilot.adapter=lora"]
LLAMA = ["pilot=tiny_llama"]
BAD = {  # overrides, and what the message must say: key, value and the way out
    "negative λ": (["fusion.weight=-1"], ["fusion.weight=-1", "0 (the Pilot) or positive"]),
    "negative λ among others": (["fusion.weight=[0,-0.5]"], ["fusion.weight=[0, -0.5]", "positive"]),
    "λ is text": (["fusion.weight=much"], ["fusion.weight=much", "a number, a list of numbers or auto"]),
    "λ among text": (["fusion.weight=[0,auto]"], ["fusion.weight=[0, 'auto']", "a list of numbers or auto"]),
    "λ is infinite": (["fusion.weight=inf"], ["fusion.weight=inf", "a number, a list"]),
    "λ is null": (["fusion.weight=null"], ["fusion.weight=None", "a number, a list"]),
    "no λ at all": (["fusion.weight=[]"], ["fusion.weight=[]", "a number, a list"]),
    "λ alike": (
        ["fusion.weight=[0,0.1234567,0.12345671]"],
        ["fusion.weight: 0.1234567 and 0.12345671 are equal in six"],
    ),
    "fusion space": (["fusion.space=log"], ["fusion.space=log", "probability, logits"]),
    "feedback": (["fusion.feedback=mine"], ["fusion.feedback=mine", "observed, own"]),
    "context": (["copilot.context=loose"], ["copilot.context=loose", "strict, inclusive"]),
    "head": (["copilot.head=hard"], ["copilot.head=hard", "linear, soft"]),
    "positions": (["copilot.positions=mine"], ["copilot.positions=mine", "pilot, none"]),
    "pooling": (["copilot.pooling=median"], ["copilot.pooling=median", "mean, max, sum"]),
    "pattern": (["copilot.pattern=5"], ["copilot.pattern=5", "1, 2, 3, 4"]),
    "error input": (["copilot.error_input=zero"], ["copilot.error_input=zero", "embedding, normal"]),
    "own feedback": (["copilot.own_feedback=2"], ["copilot.own_feedback=2", "[0, 1]"]),
    "fp16": (["trainer.precision=16-mixed"], ["trainer.precision=16-mixed", "loss scaler", "bf16-mixed or 32-true"]),
    "precision": (["trainer.precision=64-true"], ["trainer.precision=64-true", "32-true, bf16-mixed"]),
    "deepspeed": (["trainer.strategy=deepspeed"], ["trainer.strategy=deepspeed", "two optimisers", "ddp"]),
    "fsdp alone": (["trainer.strategy=fsdp"], ["trainer.devices=1 with trainer.strategy=fsdp", "trainer=gpu"]),
    "fsdp": (
        [
            *("trainer=two_ranks", "trainer.strategy=fsdp", "compile=true", "control=equal_time"),
            *("optimizer@pilot.optimizer=adamw_8bit", "data.eval_batch_size=1"),
        ],
        [
            *("compile=True with trainer.strategy=fsdp", "use compile=false", "control=equal_time", "copilot=none"),
            *(
                "pilot.optimizer._target_=bitsandbytes",
                "use optimizer@pilot.optimizer=adamw",
                "data.eval_batch_size=1",
            ),
        ],
    ),
    "no device": (["trainer.devices=0"], ["trainer.devices=0", "at least 1"]),
    "micro batch": (["pilot.micro_batch_size=7"], ["pilot.micro_batch_size=7", "batch_size=16", "a divisor of 16"]),
    "devices": (["trainer.devices=3"], ["data.batch_size=16", "3 processes", "trainer.devices"]),
    "a list of devices": (["trainer.devices=[0,1,2]"], ["data.batch_size=16", "3 processes"]),
    "rounds": (["rounds=0"], ["rounds=0", "at least 1"]),
    "rounds is text": (["rounds=many"], ["rounds=many", "whole number"]),
    "half a round": (["rounds=1.5"], ["rounds=1.5", "whole number"]),
    "no budget": (["rounds=null"], ["rounds=null", "data.epochs=null", "give one of them"]),
    "epochs": (["rounds=null", "data.epochs=-1"], ["data.epochs=-1", "above 0"]),
    "steps": (["copilot.steps_per_round=0"], ["copilot.steps_per_round=0", "at least 1"]),
    "no batch": (["data.batch_size=0"], ["data.batch_size=0", "at least 1"]),
    "batch is null": (["data.batch_size=null"], ["data.batch_size=None", "whole number"]),
    "no rows": (["data.max_train_rows=0"], ["data.max_train_rows=0", "at least 1"]),
    "learning rate": (["pilot.optimizer.lr=-1"], ["pilot.optimizer.lr=-1", "above 0"]),
    "learning rate is text": (["copilot.optimizer.lr=fast"], ["copilot.optimizer.lr=fast", "a number above 0"]),
    "capacity": (["mistake_log.log.capacity_rounds=0"], ["mistake_log.log.capacity_rounds=0", "at least one round"]),
    "bytes": (["mistake_log.log.max_bytes=-5"], ["mistake_log.log.max_bytes=-5", "null for no limit"]),
    "k": (
        ["log_storage@mistake_log.log.storage=topk", "mistake_log.log.storage.k=0"],
        ["mistake_log.log.storage.k=0", "at least one"],
    ),
    "statistics": (["mistake_log.every_n_rounds=0"], ["mistake_log.every_n_rounds=0", "at least 1"]),
    "log type": (["mistake_log.log.dtype=float"], ["mistake_log.log.dtype=float", "float32, bfloat16, float16"]),
    "storage type": (["mistake_log.log.storage.dtype=f32"], ["mistake_log.log.storage.dtype=f32", "float32"]),
    "Pilot type": (["pilot.dtype=half"], ["pilot.dtype=half", "float32, bfloat16"]),
    "trained in bfloat16": (["pilot.dtype=bfloat16"], ["pilot.dtype=bfloat16", "pilot.dtype=float32", "lora"]),
    "nothing to train": (["pilot.frozen=true", "copilot=none"], ["pilot.frozen=true", "copilot=none"]),
    "adapters that stay": (["pilot.frozen=true", *LLAMA, *LORA], ["pilot.frozen=true", "pilot.adapter=null"]),
    "control": (["control=equal_rounds"], ["control=equal_rounds", "null, equal_time"]),
    "control of itself": (["control=equal_time", "copilot=none"], ["control=equal_time", "control=null"]),
    "a frozen Pilot of nobody": (["pilot.frozen=true"], ["pilot.path=null", "pilot.path=<model or export>"]),
    "a stop for nobody": (["callbacks=[default,copilot_stop]", "copilot=none"], ["callbacks.copilot_stop", "default"]),
    "compiled or not": (["evaluation.compile=maybe"], ["evaluation.compile=maybe", "true or false"]),
    "frozen control": (
        ["control=averaged", "pilot.frozen=true"],
        ["control=['averaged']", "pilot.frozen=true", "equal_time"],
    ),
    "beams": (["evaluation.num_beams=0"], ["evaluation.num_beams=0", "at least 1"]),
    "λ from test": (["+evaluation.select_on=test"], ["evaluation.select_on=test", "never", "use validation"]),
    "reported split": (["evaluation.report_on=train"], ["evaluation.report_on=train", "test, validation"]),
    "overflow": (["data.overflow=cut"], ["data.overflow", "'cut'", "error, drop or truncate"]),
    "long prompts": (["data.max_source_length=5"], ["data.max_source_length is 5", "data.overflow=drop|truncate"]),
    "weights": (["data.weights={gsm8k: 1}"], ["data.weights", "gsm8k", "word_problems"]),
    "too deep": (["copilot.layers=3"], ["copilot.layers=3", "2 layers", "use 1 to 2"]),
    "no layer": (["copilot.layers=0"], ["copilot.layers=0", "use 1 to 2"]),
    "more than all": (["copilot.layers=1.5"], ["copilot.layers=1.5", "a share"]),
    "layers is text": (["copilot.layers=half"], ["copilot.layers=half", "a share", "0.5"]),
    "pattern 1 with one layer": (
        [*LLAMA, "copilot.layers=1"],
        ["copilot.layers=1 of 2", "copilot.pattern=1", "copilot.pattern=2"],
    ),
    "positions of the model": (
        [*LLAMA, "pilot.config.max_position_embeddings=12"],
        ["12 positions", "data.max_source_length", "data.overflow=truncate"],
    ),
    "adapter targets": (
        [*LLAMA, *LORA, "pilot.adapter.targets=[q_proj,o_porj]"],
        ["pilot.adapter", "o_porj", "down_proj, gate_proj, k_proj, lm_head, o_proj"],
    ),
    "adapter targets of the Copilot": (
        ["adapter@copilot.adapter=lora"],
        ["copilot.adapter", "q_proj", "there are k, o, q, v, wi_0"],
    ),
    "adapter rank": ([*LLAMA, *LORA, "pilot.adapter.r=0"], ["pilot.adapter", "r=0", "at least 1"]),
    "no Pilot": (["pilot.config=null"], ["pilot.path is not set", "a Hub id or a folder"]),
    "unknown Pilot": (["pilot.path=no/such-model"], ["pilot.path=no/such-model", "a folder with config.json"]),
    "unknown family": (["pilot.config.model_type=gtp"], ["pilot.config", "gtp"]),
    "impossible sizes": ([*LLAMA, "pilot.config.hidden_size=63"], ["pilot.config", "63", "multiple"]),
    "unsupported family": (["pilot.path=<mamba>"], ["'mamba' is not supported", "from a cache"]),
    "donor of a Copilot that is only a head": (
        [*LLAMA, "copilot=head", "copilot.path=<llama>"],
        ["copilot.path=<llama>: a Copilot that is only a head starts without a checkpoint; leave it out"],
    ),
    "adapter of a Copilot that is only a head": (
        [*LLAMA, "copilot=head", "adapter@copilot.adapter=lora"],
        ["copilot.adapter: a Copilot that is only a head has nothing to adapt; use copilot.adapter=null"],
    ),
    "unsupported donor": (["copilot.path=<mamba>"], ["copilot", "'mamba' is not supported", "from a cache"]),
    "donor of another family": (["copilot.path=<llama>"], ["copilot.path=<llama>", "t5", "same family"]),
    "donor of another vocabulary": ([*LLAMA, "copilot.path=<llama>"], ["<llama>", "99 tokens", "same family and tok"]),
    "an argument that nobody takes": (["+data.rows=5"], ["data", "'rows'"]),
    "a value left open": (["pilot.path=???"], ["pilot.path is not set", "pilot.path=<value>"]),
}


@pytest.fixture
def no_weights(monkeypatch):
    """Fail a test that gets as far as weights."""
    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("weights were loaded"))


@pytest.fixture
def place(tmp_path):
    """Put folders of models that cannot serve in place of their names: configs only, weights must not be asked for."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=50).save_pretrained(tmp_path / "mamba")
    LlamaConfig(hidden_size=8, vocab_size=99, **small).save_pretrained(tmp_path / "llama")
    return lambda text: text.replace("<mamba>", f"{tmp_path}/mamba").replace("<llama>", f"{tmp_path}/llama")


def complaint(folder: Path, *overrides: str) -> str:
    """The message that a run is refused with."""
    with pytest.raises(ConfigError) as refused:
        composed.train(folder, *overrides)
    assert not folder.exists()  # a refused run leaves nothing behind
    return str(refused.value)


@pytest.mark.parametrize("name", composed.sampled(BAD))
def test_bad_values_are_refused_with_key_value_and_mend(name, tmp_path, place, no_weights):
    overrides, said = BAD[name]
    message = complaint(tmp_path / "run", *composed.SMALL, *map(place, overrides))
    for part in map(place, said):
        assert part in message
    assert "\n    " not in message  # one line a problem, nothing of a traceback


@pytest.mark.slow
def test_one_mistake_is_told_once(tmp_path, no_weights):
    for bad in ("rounds=0", "pilot.path=no/such-model", "mistake_log.log.dtype=float", "data.overflow=cut"):
        assert complaint(tmp_path / "run", *composed.SMALL, bad).startswith("1 problem in the config or data:\n  - ")


def test_all_problems_are_told_at_once(tmp_path, no_weights):
    bad = ["rounds=0", "fusion.weight=-1", "trainer.precision=16-mixed", "copilot.layers=9", "copilot.head=hard"]
    log = ["mistake_log.log.capacity_rounds=0"]
    message = complaint(tmp_path / "run", *composed.SMALL, *bad, *log, "data.max_source_length=5")
    for part in (*bad, *log, "data.max_source_length is 5"):
        assert part in message


GOOD = [{"prompt": f"say {i}", "target": str(i)} for i in range(40)]
FILES = {  # rows of each split (text is written as it is), and what the message must say
    "a column is missing": (
        {"train": [*GOOD, {"prompt": "say 3", "answer": "3"}], "test": GOOD},
        ["train.jsonl", "row 41", "'target'", "'answer'", "data.benchmarks.jsonl"],
    ),
    "a file is missing": ({"train": GOOD}, ["test.jsonl does not exist", "data.path"]),
    "a line is broken": ({"train": [*GOOD, '{"prompt": '], "test": GOOD}, ["train.jsonl, line 41", "not JSON"]),
    "a line is no object": ({"train": GOOD, "test": [*GOOD, "[1, 2]"]}, ["test.jsonl, line 41", "an object"]),
    "a split is empty": ({"train": GOOD, "test": []}, ["test.jsonl", "no rows"]),
    "two splits are broken": (
        {"train": ["{"], "test": [*GOOD, "{"]},
        ["train.jsonl, line 1", "test.jsonl, line 41", "Mend or remove it"],
    ),
}


def own_rows(folder: Path, splits: dict[str, list[object]]) -> list[str]:
    """Overrides that read JSON lines of one's own, by bytes."""
    folder.mkdir()
    for split, rows in splits.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return ["data=jsonl", f"data.path={folder}", "debug=limit"]


@pytest.mark.parametrize("name", FILES)
def test_bad_files_are_refused_with_file_and_line(name, tmp_path, no_weights):
    splits, said = FILES[name]
    message = complaint(tmp_path / "run", *own_rows(tmp_path / "rows", splits))
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.benchmarks.jsonl.prompt_column=question", "'question'"),
        ("data.benchmarks.jsonl.target='{answer}'", "'answer'"),
        ("data.benchmarks.jsonl.target='{target'", "target"),
        ("data.benchmarks.jsonl.prompt='{}'", "prompt"),
        ("data.path=/no/such/folder", "/no/such/folder"),
        ("data.path=null", "data.path=<folder"),
        ("data.validation_size=40", "data.validation_size=40"),
        ("data.streaming=true", "data.validation_size=0.1"),
        ("~data.benchmarks.jsonl.splits.train", "no train split"),
        ("data.benchmarks.jsonl.name=mine", "data.benchmarks.jsonl.name"),
    ],
)
def test_settings_that_do_not_fit_the_rows_are_refused(override, said, tmp_path, no_weights):
    own = own_rows(tmp_path / "rows", {"train": GOOD, "test": GOOD})
    assert said in complaint(tmp_path / "run", *own, override)


def test_data_without_test_rows_asks_for_another_split_to_report(tmp_path, no_weights):
    own = [*own_rows(tmp_path / "rows", {"train": GOOD}), "~data.benchmarks.jsonl.splits.test"]
    message = complaint(tmp_path / "run", *own)
    assert "evaluation.report_on=test: jsonl has no test rows; there are jsonl/train, jsonl/validation" in message
    assert "evaluation.report_on=validation" in message


@pytest.mark.parametrize(("given", "storage"), [([], "frozen_head"), (["copilot=head"], "likely_tokens")])
def test_a_log_larger_than_memory_is_refused(given, storage, tmp_path, no_weights, monkeypatch):
    monkeypatch.setattr(checks_of_data.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    message = complaint(tmp_path / "run", *composed.SMALL, *given)
    for part in (
        "0.0 GB are free",
        "mistake_log.log.capacity_rounds=128",
        "max_bytes",
        "storage=topk",
        f"or {storage} where",
    ):
        assert part in message


def test_a_spilled_log_is_measured_against_its_disk(tmp_path, no_weights, monkeypatch):
    monkeypatch.setattr(checks_of_data.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    asked = []
    monkeypatch.setattr(
        checks_of_data.psutil, "disk_usage", lambda place: asked.append(place) or SimpleNamespace(free=1000)
    )
    message = complaint(tmp_path / "run", *composed.SMALL, f"mistake_log.log.spill={tmp_path}/not/there")
    assert f"0.0 GB are free on the disk of mistake_log.log.spill={tmp_path}/not/there" in message
    assert asked == [tmp_path]


def test_a_log_bounded_in_bytes_may_be_as_large_as_it_likes_in_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(checks_of_data.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    monkeypatch.setattr(run.build, "fused_model", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):  # checks are passed
        composed.train(tmp_path / "run", *composed.SMALL, "mistake_log.log.max_bytes=9000")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["log_storage@mistake_log.log.storage=topk"],
        ["copilot=head", "data.max_train_rows=30"],  # of each row one record, and no more
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["data.streaming=true"], marks=pytest.mark.slow),
    ],
)
def test_the_estimate_of_the_log_is_near_its_real_size(overrides, tmp_path, monkeypatch):
    logs, estimates = [], []
    append, estimate = MistakeLog.append, console.log_bytes
    monkeypatch.setattr(
        MistakeLog, "append", lambda log, *given, **more: (logs.append(log), append(log, *given, **more))
    )
    monkeypatch.setattr(console, "log_bytes", lambda *given: estimates.append(estimate(*given)) or estimates[-1])
    composed.train(tmp_path / "run", *composed.SMALL, "fusion.weight=0", *overrides)
    assert estimates[0] == pytest.approx(logs[-1].nbytes, rel=0.25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_a_gpu_trainer_is_refused_where_there_is_no_gpu(tmp_path, no_weights):
    message = complaint(tmp_path / "run", *composed.SMALL, "trainer=gpu")
    assert "trainer.accelerator=gpu" in message
    assert "trainer=cpu" in message


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_refused(name, tmp_path, no_weights, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)
    assert f"pip install {name}" in complaint(tmp_path / "run", *composed.SMALL, f"logger={name}")


def test_an_optimiser_whose_package_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda _: None)
    cfg = composed.compose_config("optimizer@copilot.optimizer=adamw_8bit")
    (message,) = checks.config_problems(cfg)
    for part in ("optimizer@copilot.optimizer=adamw_8bit", "pip install bitsandbytes", "=adamw"):
        assert part in message


@pytest.mark.parametrize("value", ["inductr", "null", "3"])
def test_an_unknown_backend_of_compile_is_refused(value):
    (message,) = checks.config_problems(composed.compose_config(f"compile={value}"))
    assert message.startswith("compile=")
    assert "inductor" in message


@pytest.mark.parametrize("key", ["callbacks.checkpoint.keep", "mistake_log.every_n_rounds", "pilot.optimizer.lr"])
def test_a_value_that_must_be_there_cannot_be_null(key):
    assert [p for p in checks.config_problems(composed.compose_config(f"{key}=null")) if p.startswith(f"{key}=None")]


def test_rows_are_recorded_in_passes_of_any_size_unless_a_control_trains_in_batches():
    given = ["pilot=frozen", "pilot.path=a", "copilot=head", "pilot.micro_batch_size=7", "paths.run_dir=x"]
    assert checks.config_problems(composed.compose_config(*given)) == []
    (problem,) = checks.config_problems(composed.compose_config(*given, "control=equal_flops"))
    assert problem.startswith("pilot.micro_batch_size=7 does not divide")


def test_the_composed_default_has_no_problem():
    assert checks.config_problems(composed.compose_config()) == []


@pytest.mark.parametrize(
    ("part", "error"),
    [("tcopilot.data.module.TCopilotDataModule.prepare", AttributeError), ("tcopilot.data.prepare._frame", TypeError)],
)
def test_bugs_of_ours_are_not_taken_for_mistakes_of_the_user(part, error, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise error("a bug")

    monkeypatch.setattr(part, broken)
    with pytest.raises(error, match="a bug"):
        composed.train(tmp_path / "run", *composed.SMALL, "traceback=false")


def test_a_refusal_is_one_message_and_status_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        composed.train(tmp_path / "run", *composed.SMALL, "rounds=0", "traceback=false")
    assert left.value.code == 1
    printed = capsys.readouterr()
    assert printed.err == "error: 1 problem in the config or data:\n  - rounds=0: must be a whole number, at least 1\n"


@pytest.mark.slow
def test_the_program_refuses_without_a_traceback(tmp_path):
    done = composed.forked("train.py", *composed.SMALL, "fusion.weight=-1", f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 1
    assert "fusion.weight=-1: λ must be 0" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("debug", ["default", "limit"])
def test_debugging_shows_where_an_error_came_from(debug, tmp_path):
    small = composed.SMALL[1:]
    cfg = composed.compose_config(f"debug={debug}", *small, "fusion.weight=-1", f"paths.run_dir={tmp_path}/run")
    with pytest.raises(ConfigError if debug == "default" else SystemExit):
        run.train(cfg)


@pytest.mark.parametrize(("mode", "too_long"), [("generation", True), ("targets", False)])
def test_an_answer_is_too_long_only_where_answers_are_generated(mode, too_long, tmp_path):
    rows = [json.dumps({"prompt": f"say {row}", "target": "a long answer"}) for row in range(20)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    given = ["pilot=tiny_t5", "data=jsonl", f"data.path={tmp_path}", "debug=limit", f"paths.run_dir={tmp_path}/run"]
    given += [f"evaluation.modes=[{mode}]", "evaluation.max_new_tokens=3"]
    remarks = build.prepare(composed.compose_config(*given)).data.remarks
    assert any("longer than the 3 tokens that decoding generates" in text for text in remarks) == too_long
