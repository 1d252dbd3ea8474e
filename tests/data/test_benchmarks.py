import shlex
from dataclasses import dataclass
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.utils import instantiate

from tcopilot.data import Cloze, DataError, ExactMatch, LetteredOptions, MultipleChoice, NumberAnswer, YesNo
from tcopilot.data.metrics import Metric
from tcopilot.data.sources import open_split

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
CONFIGS = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))
MIXTURES = {
    "commonsense": ["piqa", "winogrande", "hellaswag", "boolq", "siqa", "openbookqa"],
    "arithmetic": ["aqua", "gsm8k", "mawps", "svamp"],
}
OTHER_MIXTURES = {
    "cloze": ["openbookqa_cloze", "piqa_cloze", "siqa_cloze", "hellaswag_cloze"],
    "equations": ["mawps_equations", "svamp_equations"],
    "mawps_svamp": ["mawps", "svamp"],
}
# Test rows whose gold target is wrong under the lenient reading, by number from 1. AQuA: that reading takes the first
# capital A to E of the text, and these rows' rationales have another one than the answer's.
AQUA_LENIENT = """
    1 2 4 5 6 7 8 10 13 14 15 17 18 19 20 21 23 24 25 26 29 31 33 34 35 37 39 43 45 46 47 49 50 54 55 56 57 59 60 61
    62 63 64 65 66 67 70 72 74 75 76 77 78 80 81 83 85 86 87 89 90 92 94 97 99 102 104 105 106 107 108 109 111 112
    114 115 116 117 118 120 121 122 123 125 126 127 128 129 130 134 135 136 138 140 142 143 144 145 146 147 149 152
    155 156 157 158 159 160 161 162 163 166 167 171 173 174 175 176 177 178 179 180 181 182 186 188 190 191 192 193
    194 195 199 201 202 203 204 205 206 207 208 209 210 213 214 216 217 220 221 222 223 224 225 226 228 231 232 235
    238 239 240 241 242 245 246 249 250 251
"""
WRONG_WHEN_LENIENT = {"aqua": [int(number) for number in AQUA_LENIENT.split()]}


def choice(**settings) -> MultipleChoice:
    columns = {"question_column": "q", "option_columns": ["o"], "label_column": "l", "label": "letter"}
    return MultipleChoice(name="choice", **(columns | settings))


def true_false() -> YesNo:
    return YesNo(name="yes", question_column="q", label_column="l")


def number(**settings) -> NumberAnswer:
    columns = {"prompt": "{q}", "target": " {reasoning}\n#### {number}", "answer_column": "a"}
    return NumberAnswer(name="n", **(columns | settings))


def lettered(**settings) -> LetteredOptions:
    columns = {"question_column": "q", "options_column": "o", "label_column": "l", "option_count": 2}
    return LetteredOptions(name="lettered", **(columns | settings))


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


@pytest.mark.parametrize(
    ("kind", "label", "expected"),
    [
        ("letter", "C", "A to B"),
        ("letter", "", "A to B"),
        ("letter", "ß", "A to B"),
        ("one_based", "0", "1 to 2"),
        ("one_based", True, "1 to 2"),
        ("zero_based", "x", "0 to 1"),
        ("zero_based", "²", "0 to 1"),
        ("zero_based", -1, "0 to 1"),
        ("zero_based", None, "0 to 1"),
    ],
)
def test_unknown_labels_are_refused_with_what_was_expected(kind, label, expected):
    with pytest.raises(DataError, match=f"l is {label!r}, expected {expected} .*of 2 options"):
        choice(label=kind).render({"q": "?", "o": ["a", "b"], "l": label})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a", "b"], r"o gives 2 options \['a', 'b'\], expected 3"),
        (["a", "b", None], "o is .*None.*expected a text or a list of texts"),
        (["a", " ", "b"], r"o has an empty option: \['a', ' ', 'b'\]"),
        (None, "o is None, expected a text or a list of texts"),
        ({"text": "a"}, "expected a text or a list of texts"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        choice(option_count=3).render({"q": "?", "o": options, "l": "A"})


def test_one_option_is_no_choice():
    with pytest.raises(DataError, match="expected at least 2"):
        choice().render({"q": "?", "o": ["a"], "l": "A"})


@pytest.mark.parametrize("value", [None, ["a"], {"text": "a"}])
def test_a_text_column_must_hold_a_text(value):
    with pytest.raises(DataError, match=r"q is .*expected a text"):
        choice().render({"q": value, "o": ["a", "b"], "l": "A"})


def test_a_column_of_a_template_must_not_be_null():
    with pytest.raises(DataError, match="q is null or missing, expected a text"):
        number().render({"q": None, "a": "1"})


def test_options_are_all_targets_of_the_row_and_the_gold_one_is_among_them():
    example = choice(option_name="ending").render({"q": "?", "o": ["a", "b", "c"], "l": "B"})
    assert example.options == tuple(f" the correct answer is ending{n}" for n in (1, 2, 3))
    assert example.target == example.options[1]
    example = true_false().render({"q": "?", "l": False})
    assert example.options == (" the correct answer is true", " the correct answer is false")
    assert example.target == example.options[1]
    assert number().render({"q": "?", "a": 1}).options == ()
    assert lettered().render({"q": "?", "o": ["A)a", "B)b"], "l": "A"}).options == ()


def test_a_heading_is_left_out_where_it_is_empty():
    row = {"q": "text", "o": ["a", "b"], "l": "A"}
    benchmark = choice(heading_column="h")
    assert benchmark.columns == ["h", "q", "o", "l"]
    for heading, start in (("Top", "Top: text"), ("", "text"), (" ", "text"), (None, "text")):
        assert benchmark.render(row | {"h": heading}).prompt.startswith(f"Question: {start}\n")


def test_scores_name_both_readings_and_whether_there_was_an_answer():
    benchmark = choice(option_count=2)
    names = [metric.name for metric in benchmark.metrics]
    assert names == ["accuracy", "accuracy_lenient", "no_answer"]
    texts = {
        " the correct answer is answer2": (1, 1, 0),
        " the correct answer is answer1": (0, 0, 0),
        "answer2": (0, 1, 1),
        "answer1, no: the correct answer is answer2": (1, 0, 0),
        "the correct answer is answer2 or answer1": (0, 1, 1),
        "": (0, 0, 1),
    }
    for text, values in texts.items():
        assert benchmark.score(text, "answer2") == dict(zip(names, values, strict=True))
        assert list(benchmark.score(text, "answer2")) == names
    assert ExactMatch(name="e").metrics == (Metric("accuracy"),)
    assert ExactMatch(name="e").score("a", "a") == {"accuracy": 1}


def test_the_answer_sentence_is_the_targets_own():
    benchmark = choice(target=" I choose {answer}, thanks")
    assert benchmark.extract("I choose answer1, thanks") == "answer1"
    assert benchmark.extract("the correct answer is answer1") is None
    assert choice(target=" {answer}").extract("answer1") == "answer1"


@pytest.mark.parametrize(
    ("labels", "gold", "answer"),
    [("ABC", "B", "answer2"), ("CAB", "B", "answer3"), ("ABC", "b", "answer2"), (["1", "2", "3"], 3, "answer3")],
)
def test_a_gold_label_is_found_among_the_options_own_labels(labels, gold, answer):
    row = {"q": "?", "o": {"text": ["a", "b", "c"], "label": list(labels)}, "l": gold}
    benchmark = choice(option_columns=["o.text"], option_labels_column="o.label")
    assert benchmark.render(row).answer == answer
    assert benchmark.columns == ["q", "o", "l"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["A", "B"], r"o\.label is \['A', 'B'\], expected 3 different labels, one for each option"),
        (["A", "A", "B"], "expected 3 different labels"),
        ("ABC", "expected 3 different labels"),
        (["C", "B", "A"], "l is 'D', expected one of C, B, A"),
    ],
)
def test_labels_that_do_not_fit_the_options_are_refused(labels, message):
    row = {"q": "?", "o": {"text": ["a", "b", "c"], "label": labels}, "l": "D"}
    with pytest.raises(DataError, match=message):
        choice(option_columns=["o.text"], option_labels_column="o.label").render(row)


def test_options_without_labels_of_their_own_are_counted():
    row = {"q": "?", "o": {"text": ["a", "b", "c"]}, "l": "B"}
    assert choice(option_columns=["o.text"], option_labels_column="o.label").render(row).answer == "answer2"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_openbookqas_options_may_stand_in_any_order(order):
    texts = ["a", "b", "c", "d"]
    choices = {"text": [texts[place] for place in order], "label": ["ABCD"[place] for place in order]}
    benchmark = instantiate(compose("openbookqa").benchmarks.openbookqa)
    example = benchmark.render({"question_stem": "?", "choices": choices, "answerKey": "C"})
    assert f"{example.answer}: c\n" in example.prompt


@pytest.mark.parametrize("label", ["true", 1, None, "yes"])
def test_a_label_that_is_no_boolean_is_refused(label):
    mend = "JSON or Parquet" if isinstance(label, str) else "without quotes$"
    with pytest.raises(DataError, match=f"l is {label!r}, expected a boolean.*{mend}"):
        true_false().render({"q": "?", "l": label})


def test_lettered_options_are_set_apart_from_their_letters():
    benchmark = lettered(reasoning_column="r")
    example = benchmark.render({"q": "?", "o": ["A)a", "B) b"], "l": "B", "r": " Easy. "})
    assert example[:3] == ("Question: ?\nA) a\nB) b\nAnswer:", " Easy.\n#### B", "B")
    assert benchmark.columns == ["q", "o", "l", "r"]
    assert benchmark.score("Easy.\n#### B", "B") == {"accuracy": 1, "accuracy_lenient": 1, "no_answer": 0}
    assert benchmark.score("An easy one.\n#### B", "B") == {"accuracy": 1, "accuracy_lenient": 0, "no_answer": 0}
    assert benchmark.score("B", "B") == {"accuracy": 0, "accuracy_lenient": 1, "no_answer": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l": "C"}, "l is 'C', expected a letter A to B"),
        ({"l": 1}, "l is 1, expected a letter A to B"),
        ({"l": ""}, "l is '', expected a letter A to B"),
        ({"o": ["A)a", "C)b"]}, r"o has 'C\)b', expected it to begin with 'B\)'"),
        ({"o": ["A)a"]}, "o gives 1 options"),
        ({"r": None}, "r is None, expected a text"),
    ],
)
def test_lettered_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        lettered(reasoning_column="r").render({"q": "?", "o": ["A)a", "B)b"], "l": "A", "r": "x"} | change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choice(target=" two"), "lacks '{answer}'"),
        (lambda: number(target=" {number}"), "lacks '####'"),
        (lambda: number(target=" ####"), "lacks '{number}'"),
        (lambda: lettered(target=" {answer}"), "lacks '####'"),
    ],
)
def test_targets_that_could_never_be_right_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize("label", [145, 145.0, "145", "145.0", "145.00 "])
def test_numbers_may_be_numbers_or_texts(label):
    example = number().render({"q": "?", "a": label})
    assert example[:3] == ("?", " \n#### 145", "145")


def test_numbers_are_compared_with_a_tolerance_under_both_readings():
    benchmark = number()
    gold = benchmark.render({"q": "?", "a": "0.6666666666666666"}).answer
    assert benchmark.score("#### 0.667", gold) == {"accuracy": 1, "accuracy_lenient": 1, "no_answer": 0}
    assert benchmark.score("#### 0.66", gold) == {"accuracy": 0, "accuracy_lenient": 0, "no_answer": 0}
    assert benchmark.score("0.667", gold) == {"accuracy": 0, "accuracy_lenient": 1, "no_answer": 1}
    assert benchmark.correct("#### 0.667", gold)


def test_number_answers_split_reasoning_from_number_and_drop_notes():
    benchmark = number(split_on="####", remove="<<.*?>>")
    example = benchmark.render({"q": "?", "a": "2*600=<<2*600=1200>>1200\n#### 1,200"})
    assert example[:3] == ("?", " 2*600=1200\n#### 1200", "1200")
    assert benchmark.columns == ["q", "a"]
    assert benchmark.correct("well #### 1,200.0 dollars", example.answer)
    assert not benchmark.correct("1200", example.answer)


def test_a_label_is_read_as_what_it_is_and_becomes_the_target():
    for label, read in {"3/4": "0.75", "1 1/2": "1.5", "2*10^6": "2000000", "1 000": "1000", "5 eggs": "5"}.items():
        assert number().render({"q": "?", "a": label})[1:3] == (f" \n#### {read}", read)
    assert number().correct("#### 3/4", "0.75")
    assert not number().correct("#### 3/4", "3")


def test_a_solution_without_its_marker_is_refused():
    with pytest.raises(DataError, match=r"a is '2 eggs, 3 more: 5', which gives no number: it has no '####'"):
        number(split_on="####").render({"q": "?", "a": "2 eggs, 3 more: 5"})


def test_a_number_answer_without_a_number_is_refused():
    for label in ("many", "nan", "", "12:30", "1,2", "3 or 4", "about 5"):
        with pytest.raises(DataError, match=f"a is '{label}', which gives no number; expected one"):
            number().render({"q": "?", "a": label})


def test_exact_match_ignores_white_space_only():
    benchmark = ExactMatch(name="e", target=" {target}")
    example = benchmark.render({"prompt": "p", "target": "v 1"})
    assert example[:3] == ("p", " v 1", "v 1")
    assert benchmark.correct("v  1\n", example.answer)
    assert not benchmark.correct("V 1", example.answer)
    assert not benchmark.correct("", example.answer)


def test_a_line_break_typed_in_a_shell_is_a_line_break():
    row = {"prompt": "p", "target": "t"}
    assert ExactMatch(name="e", prompt=r"Q: {prompt}\nA:").render(row).prompt == "Q: p\nA:"
    assert ExactMatch(name="e", prompt=r"Q: {prompt}\\nA:").render(row).prompt == r"Q: p\nA:"
    benchmark = number(target=r" {reasoning}\nTotal: {number}", marker=r"\nTotal:", split_on=r"\n#")
    assert benchmark.render({"q": "?", "a": "easy\n# 5"}).target == " easy\nTotal: 5"
    assert benchmark.extract("\nTotal: 5") == "5"


def test_the_command_that_shows_boolqs_passage_works():
    text = (ROOT / "configs" / "data" / "boolq.yaml").read_text()
    (override,) = shlex.split(next(line for line in text.splitlines() if "{passage}" in line).removeprefix("#"))
    benchmark = instantiate(compose("boolq", override).benchmarks.boolq)
    example = benchmark.render({"question": "is it", "passage": "It is.", "answer": True})
    assert example.prompt == "It is.\nQuestion: is it\nReply with true/false.\nReply:"


def test_a_template_reaches_into_a_row():
    row = {"prompt": "p", "target": "t", "meta": {"lang": "fr"}, "turns": [{"text": "hi"}], "price": 1.5}
    example = ExactMatch(name="e", prompt="{meta.lang} {turns.0.text} {price:.2f} {prompt!r}").render(row)
    assert example.prompt == "fr hi 1.50 'p'"
    chat = ExactMatch(name="e", prompt_column="turns.0.text", target_column="meta.lang")
    assert chat.render(row)[:2] == ("hi", "fr")
    assert chat.columns == ["turns", "meta"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "turns",
            r"turns is \[\{'text': 'hi'\}\], expected a text; write turns\.0 for what is in it",
        ),
        ("meta", r"meta is .*write meta\.lang for what is in it"),
        ("meta.country", r"no 'meta\.country' in the row: found lang"),
        ("turns.1.text", r"no 'turns\.1\.text' in the row"),
        ("empty", "empty is null or missing, expected a text"),
    ],
)
def test_a_template_never_writes_what_is_no_text(word, message):
    row = {"prompt": "p", "target": "t", "meta": {"lang": "fr"}, "turns": [{"text": "hi"}], "empty": None}
    with pytest.raises(DataError, match=message):
        ExactMatch(name="e", prompt="{" + word + "}").render(row)


@pytest.mark.parametrize(
    ("prompt", "target", "joined"),
    [
        ("A: ", " 5", "A: 5"),
        ("A:", " 5", "A: 5"),
        ("A: ", "5", "A: 5"),
        ("A:\n", "5", "A:\n5"),
        ("A:  ", " 5", "A: 5"),
    ],
)
def test_no_space_is_doubled_between_prompt_and_target(prompt, target, joined):
    example = ExactMatch(name="e").render({"prompt": prompt, "target": target})
    assert example.prompt + example.target == joined


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "base"])
def test_every_data_config_composes_and_instantiates(name):
    module = instantiate(compose(name))
    assert module.benchmark_names == {**MIXTURES, **OTHER_MIXTURES}.get(name, [name])
    assert type(module.benchmarks) is dict
    assert module.rounds == 2


@pytest.mark.parametrize("target", [" {answer}", " So it is: {answer}."])
def test_a_cloze_reads_its_own_targets(target):
    columns = {"question_column": "q", "option_columns": ["o"], "label_column": "l"}
    task = Cloze(name="mine", target=target, label="zero_based", **columns)
    for option in ("two  spaces", "a", "caf\N{LATIN SMALL LETTER E}\N{COMBINING ACUTE ACCENT}"):
        example = task.render({"q": "?", "o": [option, "other"], "l": 0})
        assert task.correct(example.target, example.answer)
        assert not task.correct(example.options[1], example.answer)


def test_a_cloze_shows_no_options_and_its_answer_is_the_text_of_one():
    task = instantiate(compose("cloze")).benchmarks["openbookqa_cloze"]
    row = {
        "question_stem": "The sun is",
        "choices": {"text": ["a star ", "ice"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    task.option_count = 2
    example = task.render(row)
    assert (example.prompt, example.target) == ("Question: The sun is\nAnswer:", " a star")
    assert example.options == (" a star", " ice")
    for text, right in ((" a star\n", True), (" a star maybe", False), ("", False)):
        assert task.read(text, example.answer).correct == right


def test_a_mixture_is_a_list_of_data_configs():
    module = instantiate(compose("[gsm8k,openbookqa]", "data.weights={gsm8k:1,openbookqa:2}"))
    assert module.benchmark_names == ["gsm8k", "openbookqa"]
    assert module.weights == {"gsm8k": 1, "openbookqa": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_the_mixtures_of_the_paper_are_built_from_the_single_configs(name):
    mixture = compose(name)
    assert list(mixture.weights) == MIXTURES[name]
    assert (mixture.batch_size, mixture.max_source_length, mixture.max_target_length) == (16, 256, 256)
    for part in MIXTURES[name]:
        single = compose(part)
        assert mixture.benchmarks[part] == single.benchmarks[part]
        assert (single.batch_size, single.max_source_length, single.overflow) == (16, 256, "truncate")


def test_the_example_of_options_in_jsonl_yaml_works(tmp_path):
    lines = (ROOT / "configs" / "data" / "jsonl.yaml").read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("#   benchmarks:"))
    rest = lines[first : next(n for n, line in enumerate(lines) if n > first and not line.startswith("#  "))]
    settings = yaml.safe_load("\n".join(line.removeprefix("#") for line in rest))["benchmarks"]["mine"]
    row = next(line for line in lines if '"query"' in line)
    row = yaml.safe_load(row[row.index("{") : row.index("}") + 1])
    example = instantiate(settings).render(row)
    assert example.prompt == (
        "Question: Which is a fruit?\nanswer1: fig\nanswer2: fog\nReply with one of answer1/answer2.\nReply:"
    )
    assert example.target == " the correct answer is answer1"


@pytest.mark.parametrize("split", ["test", pytest.param("train", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for parts in MIXTURES.values() for name in parts])
def test_every_gold_target_of_the_real_rows_is_correct(name, split):
    benchmark = instantiate(compose(name)).benchmarks[name]
    if not (SHARED / (benchmark.folder or name)).is_dir():
        pytest.skip(f"no local copy of {name}")
    examples = [benchmark.render(row) for row in open_split(benchmark, split, SHARED)]
    scores = [benchmark.score(example.target, example.answer) for example in examples]
    assert len(examples) >= 238
    assert [e for e in examples if not e.prompt.strip() or (e.options and e.target not in e.options)] == []
    assert {(score["accuracy"], score["no_answer"]) for score in scores} == {(1.0, 0.0)}
    if split == "test":
        lenient = [number for number, score in enumerate(scores, start=1) if not score["accuracy_lenient"]]
        assert lenient == WRONG_WHEN_LENIENT.get(name, [])


def test_a_class_may_name_types_that_only_type_checkers_import():
    @dataclass(kw_only=True)
    class Own(ExactMatch):
        extra: "OnlyForTypeCheckers" = None  # noqa: F821

    assert Own(name="own").extra is None
    with pytest.raises(DataError, match=r"own\.folder=3: expected a text"):
        Own(name="own", folder=3)
