from pathlib import Path

import hydra
import pytest
from hydra.utils import instantiate

from tcopilot.data import DataError, ExactMatch, MultipleChoice, NumberAnswer
from tcopilot.data.streams import open_split

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
CONFIGS = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))


def choice(**settings) -> MultipleChoice:
    columns = {"question_column": "q", "option_columns": ["o"], "label_column": "l", "label": "letter"}
    return MultipleChoice(name="choice", **(columns | settings))


def compose(name: str, *overrides: str):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose(overrides=[f"+data={name}", "+seed=0", "+rounds=2", *overrides])["data"]


def test_multiple_choice_renders_options_and_names():
    example = choice().render({"q": "Why? ", "o": ["so", "thus"], "l": "B"})
    assert example.prompt == "Question: Why?\nanswer1: so\nanswer2: thus\nReply with one of answer1/answer2.\nReply:"
    assert example.target == " the correct answer is answer2"
    assert example.answer == "answer2"


def test_options_come_from_several_columns_or_from_a_path():
    row = {"q": "?", "o": {"text": ["a", "b"]}, "x": "a", "y": "b", "l": "A"}
    several, path = choice(option_columns=["x", "y"]), choice(option_columns=["o.text"])
    assert several.render(row) == path.render(row)
    assert several.columns == ["q", "x", "y", "l"]
    assert path.columns == ["q", "o", "l"]


@pytest.mark.parametrize(
    ("kind", "label"), [("letter", "B"), ("zero_based", 1), ("zero_based", "1"), ("one_based", "2")]
)
def test_labels_count_as_the_config_says(kind, label):
    assert choice(label=kind).render({"q": "?", "o": ["a", "b"], "l": label}).answer == "answer2"


@pytest.mark.parametrize(("kind", "label"), [("letter", "C"), ("letter", ""), ("one_based", "0"), ("zero_based", "x")])
def test_labels_out_of_range_are_refused(kind, label):
    with pytest.raises(DataError, match="of 2 options"):
        choice(label=kind).render({"q": "?", "o": ["a", "b"], "l": label})


def test_number_answers_split_reasoning_from_number_and_drop_notes():
    benchmark = NumberAnswer(
        name="n",
        prompt="{q}",
        target=" {reasoning}\n#### {number}",
        answer_column="a",
        split_on="####",
        remove="<<.*?>>",
    )
    example = benchmark.render({"q": "?", "a": "2*600=<<2*600=1200>>1200\n#### 1,200"})
    assert example == ("?", " 2*600=1200\n#### 1200", "1200")
    assert benchmark.columns == ["q", "a"]
    assert benchmark.correct("well #### 1,200.0 dollars", example.answer)
    assert not benchmark.correct("1200", example.answer)


def test_a_number_answer_without_a_number_is_refused():
    benchmark = NumberAnswer(name="n", prompt="{q}", target="#### {number}", answer_column="a")
    with pytest.raises(DataError, match="gives no number"):
        benchmark.render({"q": "?", "a": "many"})


def test_exact_match_ignores_white_space_only():
    benchmark = ExactMatch(name="e", target=" {target}")
    example = benchmark.render({"prompt": "p", "target": "v 1"})
    assert example == ("p", " v 1", "v 1")
    assert benchmark.correct("v  1\n", example.answer)
    assert not benchmark.correct("V 1", example.answer)
    assert not benchmark.correct("", example.answer)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "base"])
def test_every_data_config_composes_and_instantiates(name):
    module = instantiate(compose(name))
    assert module.benchmark_names == [name]
    assert type(module.benchmarks) is dict
    assert module.rounds == 2


def test_a_mixture_is_a_list_of_data_configs():
    module = instantiate(compose("[gsm8k,openbookqa]", "data.weights={gsm8k:1,openbookqa:2}"))
    assert module.benchmark_names == ["gsm8k", "openbookqa"]
    assert module.weights == {"gsm8k": 1, "openbookqa": 2}


@pytest.mark.parametrize("name", ["gsm8k", "openbookqa"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_target_of_the_real_rows_is_correct(name, split):
    if not (SHARED / name).is_dir():
        pytest.skip(f"no local copy of {name}")
    benchmark = instantiate(compose(name)).benchmarks[name]
    examples = [benchmark.render(row) for row in open_split(benchmark, split, SHARED)]
    assert len(examples) >= 500
    assert [e for e in examples if not benchmark.correct(e.target, e.answer) or not e.prompt.strip()] == []
