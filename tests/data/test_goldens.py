"""Prompts and targets of the reasoning sets, letter by letter. The rows are invented; their columns are the Hub's."""

from pathlib import Path

import hydra
import pytest
from hydra.utils import instantiate

CONFIGS = Path(__file__).parents[2] / "configs"

GOLDENS = {
    "piqa": [
        (
            {"goal": "Dry a wet shoe.", "sol1": "Fill it with paper. ", "sol2": "Fill it with soup.", "label": 0},
            "Goal: Dry a wet shoe.\nWhich solution reaches it?\n"
            "solution1: Fill it with paper.\nsolution2: Fill it with soup.\n"
            "Reply with one of solution1/solution2.\nReply:",
            " the correct answer is solution1",
        ),
        (
            {"goal": "kite", "sol1": "swims in  tea", "sol2": "flies in wind", "label": 1},
            "Goal: kite\nWhich solution reaches it?\nsolution1: swims in  tea\nsolution2: flies in wind\n"
            "Reply with one of solution1/solution2.\nReply:",
            " the correct answer is solution2",
        ),
        (
            {"goal": " Open {the} jar? ", "sol1": "Twist, don't pull.", "sol2": "Pull.", "label": "0"},
            "Goal: Open {the} jar?\nWhich solution reaches it?\nsolution1: Twist, don't pull.\nsolution2: Pull.\n"
            "Reply with one of solution1/solution2.\nReply:",
            " the correct answer is solution1",
        ),
    ],
    "winogrande": [
        (
            {
                "sentence": "The cup fell off the shelf as the _ broke.",
                "option1": "cup",
                "option2": "shelf",
                "answer": "2",
            },
            "Sentence: The cup fell off the shelf as the _ broke.\nWhich option belongs in the blank?\n"
            "option1: cup\noption2: shelf\nReply with one of option1/option2.\nReply:",
            " the correct answer is option2",
        ),
        (
            {"sentence": "Ida thanked Olga, for _ had helped.", "option1": "Ida", "option2": "Olga", "answer": 2},
            "Sentence: Ida thanked Olga, for _ had helped.\nWhich option belongs in the blank?\n"
            "option1: Ida\noption2: Olga\nReply with one of option1/option2.\nReply:",
            " the correct answer is option2",
        ),
        (
            {"sentence": "_ won.", "option1": "Ida", "option2": "Olga", "answer": "1"},
            "Sentence: _ won.\nWhich option belongs in the blank?\n"
            "option1: Ida\noption2: Olga\nReply with one of option1/option2.\nReply:",
            " the correct answer is option1",
        ),
    ],
    "hellaswag": [
        (
            {
                "activity_label": "Baking bread",
                "ctx": "A man kneads dough. he",
                "endings": ["sings.", "bakes it.", "sleeps.", "flies."],
                "label": "1",
            },
            "Text: Baking bread: A man kneads dough. he\nWhich ending goes on from it?\n"
            "ending1: sings.\nending2: bakes it.\nending3: sleeps.\nending4: flies.\n"
            "Reply with one of ending1/ending2/ending3/ending4.\nReply:",
            " the correct answer is ending2",
        ),
        (
            {"activity_label": "", "ctx": "A dog digs. it", "endings": ["a", "b", "c", "d"], "label": "3"},
            "Text: A dog digs. it\nWhich ending goes on from it?\nending1: a\nending2: b\nending3: c\nending4: d\n"
            "Reply with one of ending1/ending2/ending3/ending4.\nReply:",
            " the correct answer is ending4",
        ),
        (
            {
                "activity_label": " ",
                "ctx": "[header] How to whistle [title] Wet your lips.",
                "endings": ["[step] Blow.", "[step] Bite.", "Sit.", "Run."],
                "label": 0,
            },
            "Text: [header] How to whistle [title] Wet your lips.\nWhich ending goes on from it?\n"
            "ending1: [step] Blow.\nending2: [step] Bite.\nending3: Sit.\nending4: Run.\n"
            "Reply with one of ending1/ending2/ending3/ending4.\nReply:",
            " the correct answer is ending1",
        ),
    ],
    "boolq": [
        (
            {"question": "do snails have legs", "passage": "Snails have one foot.", "answer": False},
            "Question: do snails have legs\nReply with true/false.\nReply:",
            " the correct answer is false",
        ),
        (
            {"question": "is tin a metal ", "passage": "", "answer": True},
            "Question: is tin a metal\nReply with true/false.\nReply:",
            " the correct answer is true",
        ),
        (
            {"question": "is false the same as untrue", "passage": "It is.", "answer": True},
            "Question: is false the same as untrue\nReply with true/false.\nReply:",
            " the correct answer is true",
        ),
    ],
    "siqa": [
        (
            {
                "context": "Kim lost the keys.",
                "question": "What will Kim do next?",
                "answerA": "look for them",
                "answerB": "buy a boat",
                "answerC": "lose the keys",
                "label": "1",
            },
            "Situation: Kim lost the keys.\nQuestion: What will Kim do next?\n"
            "answer1: look for them\nanswer2: buy a boat\nanswer3: lose the keys\n"
            "Reply with one of answer1/answer2/answer3.\nReply:",
            " the correct answer is answer1",
        ),
        (
            {"context": "A.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": " z", "label": 3},
            "Situation: A.\nQuestion: Q?\nanswer1: x\nanswer2: y\nanswer3: z\n"
            "Reply with one of answer1/answer2/answer3.\nReply:",
            " the correct answer is answer3",
        ),
        (
            {"context": "A.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2\n"},
            "Situation: A.\nQuestion: Q?\nanswer1: x\nanswer2: y\nanswer3: z\n"
            "Reply with one of answer1/answer2/answer3.\nReply:",
            " the correct answer is answer2",
        ),
    ],
    "openbookqa": [
        (
            {
                "question_stem": "Ice is",
                "choices": {"text": ["hot", "cold", "loud", "green"], "label": ["A", "B", "C", "D"]},
                "answerKey": "B",
            },
            "Question: Ice is\nanswer1: hot\nanswer2: cold\nanswer3: loud\nanswer4: green\n"
            "Reply with one of answer1/answer2/answer3/answer4.\nReply:",
            " the correct answer is answer2",
        ),
        (
            {"question_stem": "Why? ", "choices": {"text": ["1", "2", "3", "4"]}, "answerKey": "D"},
            "Question: Why?\nanswer1: 1\nanswer2: 2\nanswer3: 3\nanswer4: 4\n"
            "Reply with one of answer1/answer2/answer3/answer4.\nReply:",
            " the correct answer is answer4",
        ),
        (
            {"question_stem": "Sun:", "choices": {"text": ["a star", "a moon", "a", "b"]}, "answerKey": "a"},
            "Question: Sun:\nanswer1: a star\nanswer2: a moon\nanswer3: a\nanswer4: b\n"
            "Reply with one of answer1/answer2/answer3/answer4.\nReply:",
            " the correct answer is answer1",
        ),
    ],
    "aqua": [
        (
            {
                "question": "What is 2 + 3?",
                "options": ["A)4", "B)5", "C)6", "D)7", "E)8"],
                "rationale": "2 + 3 = 5\nAnswer: B",
                "correct": "B",
            },
            "Question: What is 2 + 3?\nA) 4\nB) 5\nC) 6\nD) 7\nE) 8\nAnswer:",
            " 2 + 3 = 5\nAnswer: B\n#### B",
        ),
        (
            {
                "question": "Half of 3,000 km?",
                "options": ["A)1,500 km", "B) 1.5 km", "C)√3", "D)-3", "E)None of these"],
                "rationale": " 3,000 / 2 = 1,500 ",
                "correct": "A",
            },
            "Question: Half of 3,000 km?\nA) 1,500 km\nB) 1.5 km\nC) √3\nD) -3\nE) None of these\nAnswer:",
            " 3,000 / 2 = 1,500\n#### A",
        ),
        (
            {
                "question": "x?",
                "options": ["A)", "B)b", "C)c", "D)d", "E)e"],
                "rationale": "#### is no heading here",
                "correct": "E",
            },
            "Question: x?\nA) \nB) b\nC) c\nD) d\nE) e\nAnswer:",
            " #### is no heading here\n#### E",
        ),
    ],
    "gsm8k": [
        (
            {"question": "Two bags of 3 figs?", "answer": "2*3=<<2*3=6>>6 figs\n#### 6"},
            "Question: Two bags of 3 figs?\nAnswer:",
            " 2*3=6 figs\n#### 6",
        ),
        (
            {"question": "Debt?", "answer": "It is $<<5-1205=-1200>>-1,200.\n#### -1,200"},
            "Question: Debt?\nAnswer:",
            " It is $-1,200.\n#### -1200",
        ),
        (
            {"question": "Share?", "answer": "3/2=<<3/2=1.5>>1.5\n#### 1.50"},
            "Question: Share?\nAnswer:",
            " 3/2=1.5\n#### 1.5",
        ),
    ],
    "mawps": [
        (
            {"question": "2 pens cost $ 6.00 . One ?", "result": "3", "result_float": 3.0, "equation": "X=(6.0/2.0)"},
            "Question: 2 pens cost $ 6.00 . One ?\nAnswer:",
            " X=(6.0/2.0)\n#### 3",
        ),
        (
            {"question": "2 over 3 ?", "result": "0.6666666666666666", "equation": "x=2/3"},
            "Question: 2 over 3 ?\nAnswer:",
            " x=2/3\n#### 0.6666666666666666",
        ),
        (
            {"question": "Which number ?", "result": "-15", "equation": "(2.0+x)=-13.0"},
            "Question: Which number ?\nAnswer:",
            " (2.0+x)=-13.0\n#### -15",
        ),
    ],
    "svamp": [
        (
            {
                "Body": "Ed has 8 figs.",
                "Question": "He eats 3. How many now?",
                "Equation": "( 8.0 - 3.0 )",
                "Answer": "5.0",
            },
            "Question: Ed has 8 figs. He eats 3. How many now?\nAnswer:",
            " ( 8.0 - 3.0 )\n#### 5",
        ),
        (
            {"Body": "If 2 sell 3 each", "Question": "How many?", "Equation": "( 2.0 * 3.0 )", "Answer": 6.0},
            "Question: If 2 sell 3 each How many?\nAnswer:",
            " ( 2.0 * 3.0 )\n#### 6",
        ),
        (
            {"Body": "A", "Question": "B?", "Equation": "( 1.0 - 4.0 )", "Answer": -3},
            "Question: A B?\nAnswer:",
            " ( 1.0 - 4.0 )\n#### -3",
        ),
    ],
}


@pytest.mark.parametrize("name", GOLDENS)
def test_prompts_and_targets_are_exactly_these(name):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose(overrides=[f"+data={name}", "+seed=0", "+rounds=2"])["data"]
    benchmark = instantiate(cfg).benchmarks[name]
    assert len(GOLDENS[name]) == 3
    for row, prompt, target in GOLDENS[name]:
        example = benchmark.render(row)
        assert (example.prompt, example.target) == (prompt, target)
        assert set(benchmark.columns) <= set(row)
        assert benchmark.score(target, example.answer)["accuracy"] == 1
