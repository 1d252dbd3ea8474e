"""Keys that change nothing: slips are refused with what was probably meant, idle settings are named in the summary."""

import composed
import pytest

from tcopilot.app import build, console, joint
from tcopilot.app.checks.config import config_problems
from tcopilot.app.checks.groups import group_problems
from tcopilot.app.checks.problems import ConfigError, attempt
from tcopilot.app.checks.unused import idle_overrides, set_in_files, watch
from tcopilot.models.modeling import TCopilotForSeq2SeqLM

SLIPS = {  # a key that nothing reads, and what the message says
    "+rnds=3": "rnds=3: nothing reads this key; did you mean rounds?",
    "+foo=1": "foo=1: nothing reads this key; leave it out",
    "+paths.x=1": "paths.x=1: nothing reads this key; leave it out",
    "+pilot.lr=1": "did you mean pilot.optimizer.lr?",
    "+copilot.lr=1": "did you mean copilot.optimizer.lr?",
    "+fusion.weights=[3]": "did you mean fusion.weight?",
    "+evaluation.beams=3": "did you mean evaluation.num_beams?",
    "+mistake_log.capacity_rounds=1": "did you mean mistake_log.log.capacity_rounds?",
}


def test_every_slip_is_refused_at_once_with_what_was_meant():
    problems = config_problems(composed.compose_config(*SLIPS, "paths.run_dir=x"))
    assert len(problems) == len(SLIPS)
    for override, said in SLIPS.items():
        (problem,) = (text for text in problems if text.startswith(override.removeprefix("+").partition("=")[0]))
        assert said in problem


def test_a_key_that_others_refer_to_is_no_slip():
    assert config_problems(composed.compose_config("+width=32", "pilot.config.d_ff=${width}", "paths.run_dir=x")) == []


def test_reading_is_noted_by_whatever_means_and_following_references():
    cfg = composed.compose_config("+width=32", "pilot.config.d_ff=${width}", "paths.run_dir=x")
    watched, read = watch(cfg)
    assert read == set()
    assert watched.copilot.layers == cfg.copilot.layers
    assert watched.data.rounds == cfg.rounds
    assert build.OmegaConf.to_container(watched.pilot.config, resolve=True) == build.OmegaConf.to_container(
        cfg.pilot.config, resolve=True
    )
    assert {"copilot.layers", "data.rounds", "rounds", "pilot.config.d_ff", "width"} <= read
    assert not any(key.startswith("fusion") for key in read)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Pilot of the tokenizer that the small configs have."""
    folder = tmp_path_factory.mktemp("pilot")
    ready = build.prepare(composed.compose_config(*composed.SMALL, "paths.run_dir=x"))
    pilot = ready.pilot.load(ready.tokenizer)
    pilot.save_pretrained(folder)
    ready.tokenizer.save_pretrained(folder)
    return folder


IDLE = [  # what is given, and which of it changes nothing
    (
        ["pilot.frozen=true", "pilot.path=<saved>", "pilot.optimizer.lr=3", "optimizer@pilot.optimizer=adamw"],
        ["pilot.optimizer.lr=3", "optimizer@pilot.optimizer=adamw"],
    ),
    (
        ["copilot=none", "mistake_log=latest", "objective=mse", "fusion.weight=3", "pilot.clip=2"],
        ["mistake_log=latest", "objective=mse", "fusion.weight=3"],
    ),
    (
        ["data.path=/tmp", "evaluation.ranking=exhaustive", "fusion.per=benchmark", "copilot.dtype=bfloat16"],
        ["data.path=/tmp", "evaluation.ranking=exhaustive", "fusion.per=benchmark", "copilot.dtype=bfloat16"],
    ),
    (["data.epochs=1", "data.overflow=truncate"], ["data.epochs=1", "data.overflow=truncate"]),
    (
        [
            *("debug=limit", "rounds=3", "pilot.optimizer.lr=0.1", "copilot.layers=1", "copilot.clip=null", "seed=3"),
            *("evaluation.num_beams=2", "mistake_log=latest", "mistake_log.every_n_rounds=1", "objective=mse"),
            *(
                "fusion=logits",
                "fusion.weight=2",
                "fusion.per=all",
                "data.batch_size=8",
                "logger=csv",
                "compile=false",
            ),
            *("callbacks.checkpoint.keep=1", "trainer.val_check_interval=1", "pilot.config.d_model=32", "name=x"),
            *("data.benchmarks.word_problems.train=100", "log_storage@mistake_log.log.storage=topk"),
        ],
        [],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "idle"), IDLE)
def test_what_changes_nothing_is_found_and_nothing_else(given, idle, saved, tmp_path):
    given = [override.replace("<saved>", str(saved)) for override in given]
    cfg = composed.compose_config(*composed.SMALL, *given, f"paths.run_dir={tmp_path}/run")
    ready = build.prepare(cfg)
    model = build.fused_model(ready.config, ready)
    assert isinstance(model, TCopilotForSeq2SeqLM)
    build.training_module(ready.config, model, 3)
    assert idle_overrides(cfg, ready.read, ready.data, given) == idle


def test_what_an_experiment_sets_is_what_its_groups_do_not_say():
    plain = composed.compose_config("pilot=tiny_llama", "data=base")
    cfg = composed.compose_config("pilot=tiny_llama", "pilot.clip=2", "seed=3", "fusion.weight=[0,1]", "rounds=9")
    found = set_in_files(cfg, plain, ["seed=3", "fusion.weight=[0,1]"])
    assert {"pilot.clip=2", "rounds=9"} <= set(found)
    assert all(text.startswith(("pilot.clip=", "rounds=", "data.")) for text in found)
    assert set_in_files(cfg, None, []) == []


@pytest.mark.slow
def test_idle_keys_of_an_experiment_are_named_and_those_that_act_are_not(tmp_path):
    """As a user's own file sets them, through the program."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nname: mine\npilot: {clip: 2}\ncopilot: {dtype: bfloat16, clip: 3}\n"
        "data: {weights: {word_problems: 1}, batch_size: 16}\nevaluation: {compile: false, ranking: exhaustive}\n"
    )
    given = [*composed.SMALL, "experiment=mine", f"hydra.searchpath=[file://{tmp_path}]", "data.path=/tmp"]
    with composed.without_estimate():
        done = composed.forked("train.py", *given, "fusion.weight=[0,1]", f"paths.run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.split("\n") if "not used here" in line)
    named = {text.strip() for text in line.strip("│ ").split("│")[1].split(",")}
    assert {"data.path=/tmp", "copilot.dtype=bfloat16", "evaluation.compile=False"} <= named
    assert not any(text.startswith(("pilot.clip", "copilot.clip", "data.batch_size", "name")) for text in named)


def test_the_summary_names_idle_keys_and_the_budget_that_counts(tmp_path, monkeypatch, capsys):
    given = ["data.path=/tmp", "data.epochs=1"]
    monkeypatch.setattr(console, "given_overrides", lambda: given)
    monkeypatch.setattr(joint, "_fit", lambda *_: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        composed.train(tmp_path / "run", *composed.SMALL, *given)
    printed = " ".join(capsys.readouterr().out.split())
    assert "not used here │ data.path=/tmp, data.epochs=1" in printed
    assert "rounds=4 counts, data.epochs=1 does not (rounds=null makes it count)" in printed


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "objective=null",
            "objective is a config group; leave it out, or choose one of ce, kl, mse, rmse",
        ),
        ("pilot=5", "pilot=5: pilot is a config group"),
        ("logger={csv: null}", "choose one of csv, tensorboard, wandb"),
        ("objective=ce", None),
        ("objective=ce,kl", None),
        ("~objective", None),
        ("rounds=null", None),
        ("--cfg", None),
    ],
)
def test_what_names_no_file_of_a_group_is_one_message(override, said):
    problems = group_problems([override], composed.CONFIGS)
    assert [said in problem for problem in problems] == ([] if said is None else [True])


def test_a_folder_that_may_not_be_entered_is_a_problem_of_the_users():
    def enter():
        raise PermissionError(13, "Permission denied", "/data/secret")

    problems: list[str] = []
    assert attempt(problems, enter) is None
    assert problems == ["/data/secret: Permission denied; make it readable, or give another place"]
    with pytest.raises(ConfigError):
        raise ConfigError(problems)
