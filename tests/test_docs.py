"""The documentation: what it names exists, its commands compose, and its additions are made as written and used."""

import dataclasses
import importlib
import json
import re
import runpy
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import composed
import datasets
import pytest
import torch
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tcopilot import TCopilotForCausalLM
from tcopilot.app.checks.config import config_problems
from tcopilot.data import byte_tokenizer
from tcopilot.models import families

DOCS = composed.ROOT / "docs"
DOCUMENTS = {
    path.relative_to(composed.ROOT).as_posix(): path for path in (composed.ROOT / "README.md", *DOCS.glob("*.md"))
}
ALGORITHM, EXTENDING, DATA = (DOCS / f"{name}.md" for name in ("algorithm", "extending", "data"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"^# (\S+\.(?:yaml|py))\n")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"\btcopilot(?:\.\w+)+")
PATH = re.compile(r"`((?:configs|src|tests|docs|scripts|performance)/[\w./-]+)`")
PROGRAM = re.compile(r"(?:^|\s)(train|eval)\.py\b([^;]*)")
OF_THE_MACHINE = ("torch finds no CUDA device", "the package is not installed")
PLUGINS = {
    "hydra/sweeper/optuna": "hydra_optuna_sweeper",
    "hydra/launcher/submitit": "hydra_submitit_launcher",
    "hydra/launcher/joblib": "hydra_joblib_launcher",
}
MOST_LINES = 30  # of one block


def blocks(document: Path, *languages: str) -> list[str]:
    """Fenced blocks of some languages."""
    return [body for _, language, body in FENCE.findall(document.read_text()) if language in languages]


def files(document: Path) -> dict[str, str]:
    """Blocks that begin with the file that they belong to, by that file."""
    return {FILE.match(body)[1]: body for body in blocks(document, "yaml", "python") if FILE.match(body)}


def rows_shown() -> dict[str, str]:
    """The files of rows that docs/data.md shows, by their names."""
    found = dict(re.findall(r"^`([\w./-]+)`:\n\n```\w*\n(.*?)^```", DATA.read_text(), re.DOTALL | re.MULTILINE))
    return found | {"someone/sentences/train.jsonl": found["continued/train.jsonl"]}  # for a data set on the Hub


def commands(document: Path) -> list[tuple[str, ...]]:
    """Program and overrides of all `train.py` and `eval.py` lines, placeholders filled in; a sweep's first job."""
    text = document.read_text()
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    lines = "\n".join(blocks(document, "bash", "")).replace("\\\n", " ").splitlines()
    found = {}
    for line in (*lines, *spans):
        if match := PROGRAM.search(line):
            program, rest = match.groups()
            given = shlex.split(re.sub(r"\$\w+", "0", re.sub(r"<[^>]*>", "x", rest)), comments=True)
            parts = (
                re.sub(r"=choice\(([^,)]*).*\)", r"=\1", part) for part in given if part != "-m" and "…" not in part
            )
            found[program, *(part if re.search(r"[{[]", part) else part.partition(",")[0] for part in parts)] = None
    return list(found)


def module_of(name: str) -> tuple[str, Path]:
    """The module in which a dotted name is found, and its file."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        place = composed.ROOT.joinpath("src", *parts[:cut])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return ".".join(parts[:cut]), file
    raise ModuleNotFoundError(name)


def resolve(name: str) -> object:
    """The object of a dotted name; fields of dataclasses count as attributes."""
    module, _ = module_of(name)
    found = importlib.import_module(module)
    for part in name.removeprefix(module).split(".")[1:]:
        fields = {field.name for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else ()
        found = None if part in fields and not hasattr(found, part) else getattr(found, part)
    return found


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the configs and of the programs, and beside them what docs/extending.md and docs/data.md add."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(composed.CONFIGS, root / "configs")
    for script in ("train.py", "eval.py"):
        shutil.copy(composed.ROOT / script, root)
    for name, body in (files(EXTENDING) | files(DATA) | rows_shown()).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        assert not name.startswith("src/"), name
        assert not (composed.ROOT / name).exists(), name
        (root / name).write_text(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.syspath_prepend(str(root))
        patch.setattr(composed, "CONFIGS", root / "configs")
        yield SimpleNamespace(root=root)


def documented(program: str, group: str) -> list[str]:
    """The overrides of the one command of docs/extending.md that runs a program with a group or an option."""
    (overrides,) = [
        rest
        for name, *rest in commands(EXTENDING)
        if name == program and any(p == group or p.startswith(f"{group}=") for p in rest)
    ]
    return overrides


def trained(group: str, folder: Path) -> SimpleNamespace:
    """The run of the documented command that sets a group, on generated rows that are quick to draw."""
    overrides = documented("train", group)
    small = composed.SMALL[1:] if not any(part.startswith("data=") for part in overrides) else []
    composed.train(folder, *overrides, *small)
    export = AutoConfig.from_pretrained(folder / "export")
    return SimpleNamespace(folder=folder, results=composed.results(folder), export=export)


# What is named exists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_dotted_name_is_a_thing_in_the_package(name):
    for dotted in sorted(set(NAME.findall(DOCUMENTS[name].read_text()))):
        resolve(dotted)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_and_every_path_leads_to_a_file(name):
    document = DOCUMENTS[name]
    text = FENCE.sub("", document.read_text())
    places = {link: document.parent / link.partition("#")[0] for link in LINK.findall(text) if "://" not in link}
    places |= {path: composed.ROOT / path for path in PATH.findall(text)}
    assert [given for given, place in places.items() if not place.exists()] == []


def anchors(document: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_into_a_page_leads_to_one_of_its_headings(name):
    document = DOCUMENTS[name]
    links = re.findall(r"\]\(([\w./-]*)#([^)]+)\)", FENCE.sub("", document.read_text()))
    pages = {(file, anchor): document.parent / file if file else document for file, anchor in links}
    assert [link for link, page in pages.items() if page.suffix == ".md" and link[1] not in anchors(page)] == []


def test_every_metric_names_a_file_of_the_package():
    files = re.findall(r"\| `([\w/]+\.py)` \|", (DOCS / "metrics.md").read_text())
    assert len(files) > 30
    assert [file for file in set(files) if not (composed.ROOT / "src/tcopilot" / file).is_file()] == []


def test_the_readme_is_short_and_names_every_package_and_page():
    readme = (composed.ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 150
    packages = {path.parent.name for path in (composed.ROOT / "src/tcopilot").glob("*/__init__.py")}
    assert [name for name in packages if f"  {name}/ " not in readme] == []
    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in readme] == []


def test_a_name_that_does_not_exist_would_be_found():
    resolve("tcopilot.mistake_log.log.MistakeRecord.errors_BNV")
    resolve("tcopilot.models.caches.BodyState.cache")
    for wrong in (
        "tcopilot.functional.token_error",
        "tcopilot.nothing",
        "tcopilot.models.caches.BodyState.nothing",
    ):
        with pytest.raises(AttributeError):
            resolve(wrong)


def test_every_function_of_the_algorithm_is_linked_to_its_own_file():
    rows = [line for line in ALGORITHM.read_text().splitlines() if NAME.search(line)]
    assert len(rows) > 25
    for row in rows:
        pairs = re.findall(r"\[`(tcopilot[\w.]+)`\]\(([^)]+)\)", row)
        assert [name for name, _ in pairs] == NAME.findall(row), row
        for name, link in pairs:
            assert (DOCS / link).resolve() == module_of(name)[1], name


def test_every_equation_that_the_code_cites_is_in_the_table():
    table = ALGORITHM.read_text().partition("**Letters.**")[0]
    cited = " ".join(path.read_text() for path in (composed.ROOT / "src").rglob("*.py"))
    numbers = {int(end) for pair in re.findall(r"Eq\. (\d)(?:–(\d))?", cited) for end in pair if end}
    assert numbers >= {4, 5, 6, 7, 8}
    assert [number for number in sorted(numbers) if f"| Eq. {number}" not in table] == []


def test_every_key_of_the_algorithm_page_is_in_the_config():
    cfg = composed.compose_config()
    keys = re.findall(r"`((?:copilot|fusion|mistake_log)\.[\w.]+)(?:=[^`]*)?`", ALGORITHM.read_text())
    assert len(keys) > 10
    for key in keys:
        parent, _, name = key.rpartition(".")
        node = cfg
        for part in parent.split("."):
            node = node[part]
        assert name in node, key


# Commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    # test_experiments.py composes those of experiments.md
    composed.some_fast(
        {c: None for name, path in DOCUMENTS.items() if name != "docs/experiments.md" for c in commands(path)},
        set(commands(DOCUMENTS["README.md"])).__contains__,
    ),
    ids=" ".join,
)
def test_every_documented_command_composes(extended, command):
    program, *overrides = command
    try:
        if any(re.match(r"\+?(hydra|launcher|sweep)\b", override) for override in overrides):
            cfg = composed.compose_whole("paths.run_dir=runs/x", *overrides, name=program, with_hydra=True)
        else:
            cfg = composed.compose_config("paths.run_dir=runs/x", *overrides, name=program)
    except MissingConfigException as error:
        missing = [plugin for group, plugin in PLUGINS.items() if group in str(error)]
        if not missing or (find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{missing[0]}")):
            raise
        pytest.skip(f"{missing[0]} is not installed")
    if program == "train":
        assert [p for p in config_problems(cfg) if not any(part in p for part in OF_THE_MACHINE)] == []


def test_the_commands_are_found():
    assert ("eval", "run=runs/demo/x", "fusion.weight=[0,0.3,1.0]") in commands(DOCUMENTS["README.md"])
    assert ("train", "mistake_log=fifo", "seed=0") in commands(DOCUMENTS["README.md"])
    assert ("train", "data=marbles", "data.path=marbles", "debug=fdr") in commands(EXTENDING)


# docs/data.md, as written -----------------------------------------------------------------------------------------

TARGETS = {  # of the rows of train, validation and test that each example has, in order
    "data=instructions": "Paris|cold,one two three,Madrid",
    "data=completions": " red.| white., blue., green.",
    "data=chat": "Hello|See you|Roses,The sky,Snow",
    "data=chat system": "See you|The sky,Roses,Snow",
    "data=jsonl": " 9| 007, 1.50, 4",
    "data=jsonl splits": " 9| 1.50, 007, 007",
    "data=completions splits": " red.| blue.| white., black., green.",
    "data=completions hub splits": " red.| blue., red.| blue.| white., white.",
    "data=[instructions,completions]": " red.| white.|Paris|cold,one two three| blue.,Madrid| green.",
    "data=two_quizzes": "Paris|cold| red.| white.,one two three| blue.,Madrid| green.",
}


@pytest.mark.slow
def test_every_example_of_the_data_page_gives_the_rows_that_it_shows(extended, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    tokenizer, found = byte_tokenizer(), {}
    for program, *overrides in commands(DATA):
        data = instantiate(composed.compose_whole(*overrides, "paths.run_dir=x", name=program).data)
        data.prepare(tokenizer, "left")
        keys = [override.partition("=")[0].rpartition(".")[2] for override in overrides]
        example = " ".join(
            [overrides[0], *(key for key in keys if key in ("hub", "splits", "system") and "[" not in overrides[0])]
        )
        targets = {
            split: [tokenizer.decode(row["target_ids"][:-1]) for row in data.rows_of(split)]
            for split in ("train", "validation", "test")
        }
        found[example] = ",".join("|".join(texts) for texts in targets.values())
    assert found == TARGETS


# docs/extending.md, as written ------------------------------------------------------------------------------------


def test_every_addition_is_short():
    assert {
        name: len(body.splitlines()) for name, body in files(EXTENDING).items() if body.count("\n") >= MOST_LINES
    } == {}
    assert len(files(EXTENDING)) == len(blocks(EXTENDING, "python", "yaml")) == 12


@pytest.fixture(scope="module")
def marbles(extended):
    runpy.run_path(str(extended.root / "make_marbles.py"))


@pytest.mark.usefixtures("marbles")
def test_a_benchmark_is_added_by_a_yaml_and_rows(extended, tmp_path):
    run = trained("data=marbles", tmp_path)
    assert {row["benchmark"] for row in run.results["rows"]} == {"marbles", "all"}
    (file,) = (run.folder / "predictions").glob("test-marbles-weight=0.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    prompt = re.fullmatch(r"Question: Tim has (\d+) red and 4 blue marbles. How many\?\nAnswer:", rows[0]["prompt"])
    assert rows[0]["answer"] == str(int(prompt[1]) + 4)


@pytest.mark.slow
@pytest.mark.usefixtures("marbles")
def test_a_metric_is_added_by_a_class_and_its_name_in_a_yaml(extended, tmp_path):
    results = trained("data=marbles_off_by", tmp_path).results
    first, *others = results["gain"]
    assert (first["metric"], first["higher_is_better"], first["unit"]) == ("off_by", False, "marbles")
    assert [gain["metric"] for gain in others] == ["accuracy", "accuracy_lenient"]
    by_weight = {
        row["weight"]: row["value"]
        for row in results["rows"]
        if (row["metric"], row["split"]) == ("off_by", results["selected_on"])
    }
    assert by_weight[results["selected_weight"]] == min(by_weight.values())


@pytest.mark.slow
def test_a_log_policy_is_added_by_a_class_and_a_yaml(extended, tmp_path, monkeypatch):
    policy, drawn = importlib.import_module("newer_half").NewerHalf, []
    draw = policy.draw

    def watched(self, log, records, generator):
        places = draw(self, log, records, generator)
        drawn.append((len(log), len(places), int(places.min())))
        return places

    monkeypatch.setattr(policy, "draw", watched)
    trained("mistake_log", tmp_path)
    held = [size for size, _, _ in drawn]
    assert len(drawn) == 8  # two rounds of four updates
    assert held == [16] * 4 + [32] * 4
    assert all(records == 16 and first >= size // 2 for size, records, first in drawn)


@pytest.mark.slow
def test_an_objective_is_added_by_a_class_and_a_yaml(extended, tmp_path, monkeypatch):
    objective, asked = importlib.import_module("huber").Huber, []
    losses = objective.row_losses

    def watched(self, corrections_RV, probs_RV, targets_R):
        found = losses(self, corrections_RV, probs_RV, targets_R)
        asked.append((self.delta, found.shape == targets_R.shape, bool((found >= 0).all())))
        return found

    monkeypatch.setattr(objective, "row_losses", watched)
    trained("objective", tmp_path)
    assert len(asked) >= 8  # two rounds of four updates
    assert set(asked) == {(0.1, True, True)}


@pytest.mark.slow
def test_a_fusion_rule_is_added_by_a_class_and_a_yaml(extended, tmp_path, monkeypatch):
    added, asked = importlib.import_module("unsure").UnsureFusion, []
    rule = added.__call__

    def watched(self, log_probs_BNV, corrections_BNV, weight):
        asked.append(weight)
        return rule(self, log_probs_BNV, corrections_BNV, weight)

    monkeypatch.setattr(added, "__call__", watched)
    run = trained("fusion", tmp_path)
    assert run.export.fusion == {"_target_": "unsure.UnsureFusion"}
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export").fusion) is added
    assert run.results["best_weight"] is None
    assert {row["weight"] for row in run.results["rows"]} == {0, 1, 2, 4}
    assert any(isinstance(weight, torch.Tensor) and weight.max() == 4 for weight in asked)


@pytest.mark.slow
def test_the_programs_find_classes_beside_them(extended, tmp_path):
    """A new process knows of the rule from the config of the run alone."""
    command = [*documented("train", "mistake_log"), "fusion=unsure"]
    given = [*command, *composed.SMALL[1:], f"paths.run_dir={tmp_path / 'run'}"]
    done = composed.program(str(extended.root / "train.py"), *given)
    assert done.returncode == 0, done.stderr
    assert "newer_half.NewerHalf" in (tmp_path / "run" / "config.yaml").read_text()
    weights = sorted({row["weight"] for row in composed.results(tmp_path / "run")["rows"]})
    given = [f"run={tmp_path / 'run'}", f"paths.run_dir={tmp_path / 'eval'}", "trust=[newer_half,unsure]"]
    given.append(f"fusion.weight={weights}".replace(" ", ""))
    done = composed.program(str(extended.root / "eval.py"), *given)
    assert done.returncode == 0, done.stderr
    assert composed.results(tmp_path / "eval")["rows"] == composed.results(tmp_path / "run")["rows"]


@pytest.mark.slow
def test_a_finished_run_takes_the_new_fusion_rule(extended, tmp_path):
    run = composed.train(tmp_path / "run", "debug=fdr", "fusion=logits", *composed.SMALL[1:])
    placeholder, *overrides = documented("eval", "fusion")
    assert placeholder == "run=x"
    composed.evaluate(run, tmp_path / "eval", *overrides)
    assert {row["weight"] for row in composed.results(tmp_path / "eval")["rows"]} == {0, 1, 2, 4}


@pytest.mark.parametrize("option", ["fusion.weight=auto", "fusion.per=token"])
def test_the_new_fusion_rule_is_asked_what_it_can(extended, option):
    given = ["fusion=unsure", "paths.run_dir=runs/x", option]
    (problem,) = config_problems(composed.compose_config(*given))
    assert option in problem
    assert "UnsureFusion" in problem


def test_the_new_fusion_rule_keeps_to_what_the_page_asks_of_rules(extended):
    log_probs = torch.log_softmax(torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 4, dim=-1)
    errors = torch.nn.functional.one_hot(torch.arange(6).view(2, 3), 7) - log_probs.exp()
    rule = importlib.import_module("unsure").UnsureFusion()
    for weight in (2.0, torch.tensor([1.0, 4.0]).view(2, 1, 1)):
        fused = rule(log_probs, errors, weight)
        assert fused.isfinite().all()
        torch.testing.assert_close(fused.exp().sum(-1), torch.ones(2, 3))
        torch.testing.assert_close(rule(log_probs, torch.zeros_like(errors), weight), log_probs)
    sure = torch.log_softmax(torch.tensor([[[40.0, 0.0, 0.0]]]), dim=-1)
    torch.testing.assert_close(rule(sure, torch.tensor([[[-1.0, 1.0, 0.0]]]), 4.0).exp(), sure.exp())


@pytest.mark.slow
def test_a_family_is_added_by_a_yaml(extended, tmp_path):
    run = trained("pilot", tmp_path)
    assert run.export.pilot.model_type == "arcee"
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    attention = [layer.self_attn for layer in model.copilot.body.layers]
    assert [type(one).__name__ for one in attention] == ["ArceeAttention", "LogAttention"]
    assert type(attention[1].attention).__name__ == "ArceeAttention"
    assert model.copilot.head.weight.abs().sum() > 0  # it was 0 before the first update


@pytest.mark.slow
def test_the_check_of_a_new_family_passes(extended, capsys):
    runpy.run_path(str(extended.root / "check_family.py"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["none", "pilot"]


@pytest.mark.slow
def test_the_family_that_is_said_not_to_fit_is_refused_with_the_reason():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 56, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    pilot = AutoModelForCausalLM.from_config(AutoConfig.for_model("stablelm", **sizes, **heads))
    prompt = torch.arange(3, 10)[None]
    pilot(input_ids=prompt)  # nothing is wrong with the model itself
    with pytest.raises(families.UnsupportedFamilyError, match=r"'stablelm' is not supported.*unknown arguments"):
        TCopilotForCausalLM.from_pilot(pilot)
