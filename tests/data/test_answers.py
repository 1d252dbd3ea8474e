import time

import pytest

from tcopilot.data.answers import (
    close,
    first_name,
    first_number,
    last_number,
    letter_after,
    name_after,
    number_after,
    read_number,
    tidy,
    until_end,
)

SENTENCE, NAMES = "the correct answer is", "answer[1-4]"


def test_what_follows_the_first_end_token_is_no_answer():
    assert until_end([5, 6, 2, 7, 2], 2) == [5, 6]
    assert until_end((5, 6), 2) == [5, 6]
    assert until_end([2, 5], 2) == until_end([], 2) == []


def test_a_tidy_text_has_single_spaces():
    assert tidy("  answer :  v13 \n") == "answer : v13"
    assert tidy(" ") is None


# What a strict reader finds in a text behind the marker: the whole number or nothing.
NUMBERS = {
    "1,234,567 coins": "1234567",
    "$1,200.50.": "1200.5",
    "72 km/h": "72",
    "5 m2": "5",
    "50%": "50",
    "-3": "-3",
    "−3": "-3",
    "-$5": "-5",
    "$-5": "-5",
    "- $5": "-5",
    "9-5": None,
    "-0.0": "0",
    ".5": "0.5",
    "2.50": "2.5",
    "100": "100",
    "3 of 4": "3",
    "1,2345": None,
    "18.": "18",
    "v13": None,
    "twelve": None,
    "": None,
    "1/2": "0.5",
    "-1/2": "-0.5",
    "3/4 cup": "0.75",
    "1 / 4": "0.25",
    "1/0": None,
    "2 1/2": "2.5",
    "-2 1/2": "-2.5",
    "2½": "2.5",
    "½": "0.5",
    "-½": "-0.5",
    "⅓ of it": "0.3333333333333333",
    "2 3/2": None,
    "1/2/2024": None,
    "3/4/5": None,
    "\\frac{1}{2}": "0.5",
    "$\\frac{3}{4}$": "0.75",
    "1\\frac{1}{2}": "1.5",
    "\\boxed{18}": "18",
    "\\boxed{\\dfrac{1}{4}}": "0.25",
    "**18**": "18",
    "$18$": "18",
    "`7`": "7",
    "5e3": "5000",
    "5E-3": "0.005",
    "1.5e+2": "150",
    "2*10^6": "2000000",
    "2 × 10^6": "2000000",
    "2x10^3": "2000",
    "2 \\times 10^{6}": "2000000",
    "2×10⁶": "2000000",
    "10^3": "1000",
    "10^-2": "0.01",
    "2^10": None,
    "1e999999999": None,
    "1.5 · 10^2": "150",
    "5 x 3": None,
    "2*3": None,
    "2**3": None,
    "5²": None,
    "5 m²": "5",
    "72.0%": "72",
    "about 72.0%": "72",
    "50 %": "50",
    "50 percent": "50",
    "50%-60%": None,
    "50 to 60%": None,
    "$18": "18",
    "18$": "18",
    "€ 5": "5",
    "5 €": "5",
    "£1,000": "1000",
    "5 dollars": "5",
    "$5 and 20 cents": None,
    "5 dollars and 20 cents": None,
    "$5.20": "5.2",
    "US$5": "5",
    "5 million": "5000000",
    "5 Million": "5000000",
    "$5 million dollars": "5000000",
    "2.5 billion": "2500000000",
    "5 hundred": "500",
    "5 hundred thousand": "500000",
    "3 dozen eggs": "36",
    "5 thousands": "5000",
    "5k": "5000",
    "$5K": "5000",
    "5M": "5000000",
    "5bn": "5000000000",
    "5 M": None,
    "5 K": None,
    "5 mln": None,
    "5m": "5",
    "5 km": "5",
    "5 kg": "5",
    "5kg": "5",
    "5-million": "5000000",
    "2 1/2 million": "2500000",
    "5 thousand 200": None,
    "5 million 300 thousand": None,
    "12-15": None,
    "12–15": None,
    "12 - 15": None,
    "12 to 15": None,
    "3 or 4": None,
    "between 3 and 4": None,
    "from 3 to 4": None,
    "3 and 4": None,
    "5 and a half": None,
    "5 and one half": None,
    "3~4": None,
    "5 ± 1": None,
    "5 apples or 6 apples": None,
    "5 apples to 6 apples.": None,
    "12:30": None,
    "12 : 30": None,
    "2 hours 30 minutes": None,
    "2 hours and 30 minutes": None,
    "2h30m": None,
    "2h 30m": None,
    "5 feet 6 inches": None,
    "5'6\"": None,
    "5 ft. 6 in.": None,
    "3 apples and 4 pears": None,
    "2:1": None,
    "1 000": "1000",
    "12 345 678": "12345678",
    "1 000.5": "1000.5",
    "3 4": None,
    "72 100 20": None,
    "1,2": None,
    "1,2,3": None,
    "1, 2, 3": None,
    "1; 2": None,
    "1.2.3": None,
    "1.234.567": None,
    "1,234,56": None,
    "1'234": None,
    "1_000": None,
    "0x1F": None,
    "1...5": None,
    "12,34,567": None,
    "5 apples, 2 of them red": "5",
    "72 of 80": "72",
    "72 out of 80 eggs": "72",
    "5 + 3": None,
    "2+3=5": None,
    "x = 5": "5",
    "x=5": "5",
    "A-5": None,
    "x-5": None,
    "3(4)": None,
    "5 (five)": "5",
    "5 (or 6)": None,
    "5 or so": "5",
    "not 5 but 6": None,
    "isn't 5": None,
    "√5": None,
    "so 18.": "18",
    "18\nQuestion: 5 apples": "18",
    "\n18": "18",
    "\n\n 18\n19": "18",
    "18 eggs left after 3 days": "18",
    "5.": "5",
    "007": "7",
    "5!": "5",
    "+5": "5",
    "(5)": "5",
    "5/hour": "5",
    "$5/2": "2.5",
    "18=18": None,
    "five": None,
    "a hundred": None,
    "5 over 6": None,
    "0.333...": "0.333",
    "3rd": "3",
    "5 plus 3": None,
    "5 times 3": None,
    "None": None,
    "$18 every 2 days": "18",
    "1/2 million": "500000",
    "-5e-1": "-0.5",
    "2 - 1/2": None,
    "½ dozen": "6",
    "５": "5",
    "٣": "3",
    "1{,}234": "1234",
    r"1\,234": "1234",
    r"\$18": "18",
    "18 dollars.": "18",
    "18, since 3*6": "18",
    "18 (3*6)": "18",
    "20% of 50": "20",
    "3:00 PM": None,
    f"1e{'9' * 5000}": None,
}
# What it finds in a label, which must be a number and at most its unit.
LABELS = {
    "7": "7",
    "145.0": "145",
    "1.8333333333333335": "1.8333333333333335",
    "1e-05": "0.00001",
    "1,200": "1200",
    "$18": "18",
    "-Infinity": None,
    "none": None,
    "1E+16": "10000000000000000",
    "18 eggs": "18",
    "nan": None,
    "inf": None,
    "": None,
    "3/4": "0.75",
    "1 1/2": "1.5",
    "12:30": None,
    "2*10^6": "2000000",
    "1,2": None,
    "1 000": "1000",
    "72 km/h": "72",
    "5 m2": "5",
    "50%": "50",
    "145.00 ": "145",
    " 1,200\n": "1200",
    "about 5": None,
    "5 or 6": None,
    "5 and six": None,
    "18 (eggs)": "18",
    "18.": "18",
    "3 red balls left": "3",
    "x=5": None,
    "5 = 5": None,
    "5\n6": None,
    "5, 6": None,
    "5 eggs, 6 hens": None,
    "True": None,
    "72 of 80": None,
    "5 m/s²": "5",
    "+5": "5",
}


def test_a_number_is_read_whole_or_not_at_all():
    assert len(NUMBERS) >= 120
    assert {text: first_number(text) for text in NUMBERS} == NUMBERS


def test_a_number_of_any_length_is_read_in_linear_time():
    start = time.perf_counter()
    for text in (
        "1" * 20_000 + "x",
        "1 " * 20_000,
        "1," * 20_000,
        "5 a" * 20_000,
        "a 5/" * 20_000,
        "1 million " * 5_000,
    ):
        first_number(text)
    assert time.perf_counter() - start < 2


def test_a_label_is_a_number_and_at_most_its_unit():
    assert {text: read_number(text) for text in LABELS} == LABELS


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("2 + 3 = 5\n#### 5 apples, 2 of them red", "5", "2"),
        ("#### 4\nno:\n#### 5", "5", "5"),
        ("48/2 = 24\n#### 72", "72", "72"),
        ("#### 1,234", "1234", "1234"),
        ("#### -1.5 degrees", "-1.5", "-1.5"),
        ("#### 72 of 80", "72", "80"),  # two numbers after the marker
        ("#### 72\nso #### 73 dollars", "73", "73"),  # two markers
        ("#### 5 m2", "5", "2"),
        ("the answer is 72", None, "72"),  # no marker
        ("72 ####", None, "72"),  # nothing behind it
        ("#### none", None, None),
        ("", None, None),
    ],
)
def test_two_readings_of_a_number(text, strict, lenient):
    assert (number_after(text, "####"), last_number(text)) == (strict, lenient)


def test_a_lenient_number_is_the_last_digits_anywhere():
    texts = {"#### 1,234": "1234", "5 apples, 2 of them red": "2", "9-5": "-5", "in m2": "2", "18.": "18.", ".5": "5"}
    assert {text: last_number(text) for text in texts} == texts


def test_numbers_are_equal_within_a_thousandth():
    assert close("0.333", "0.3333333333333333")
    assert close("0.667", "0.6666666666666666")
    assert not close("0.66", "0.6666666666666666")
    assert close("18.", "18")
    assert close("2.001", "2")
    assert not close("2.0011", "2")
    assert not close("2", "-2")
    assert not close(None, "0")


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (" the correct answer is answer2", "answer2", "answer2"),
        ("the correct\nanswer is: answer2.", "answer2", "answer2"),
        ("the correct answer is answer2, answer2", "answer2", "answer2"),  # repeated
        ("the correct answer is answer2\nthe correct answer is answer2", "answer2", "answer2"),
        ("answer1 is wrong, the correct answer is answer2", "answer2", "answer1"),
        ("not answer1: the correct answer is: 'answer2'", "answer2", "answer1"),
        ("the correct answer is answer2, not answer1", None, "answer2"),
        ("the correct answer is answer2 or answer3", None, "answer2"),  # two different ones
        ("the correct answer is answer2 or 3", None, "answer2"),
        ("the correct answer is answer2/3", None, "answer2"),
        ("the correct answer is answer2-4", None, "answer2"),
        ("the correct answer is answer2.5", None, "answer2"),
        ("the correct answer is answer2. 3 are wrong", "answer2", "answer2"),
        ("the correct answer is answer2\nthe correct answer is answer3", None, "answer2"),
        ("the correct answer is not answer2", None, "answer2"),
        ("the correct answer isn't answer2", None, "answer2"),
        ("answer2", None, "answer2"),  # no sentence
        ("the correct answer is answer5", None, None),  # no such option
        ("the correct answer is answer12", None, "answer1"),
        ("the correct answer is Answer2", None, None),
        ("nonanswer2", None, "answer2"),
        ("the correct answer is B", None, None),
        ("", None, None),
    ],
)
def test_two_readings_of_a_name(text, strict, lenient):
    assert (name_after(text, SENTENCE, NAMES), first_name(text, NAMES)) == (strict, lenient)


def test_true_inside_a_word_counts_leniently_only():
    assert name_after("the correct answer is untrue", SENTENCE, "true|false") is None
    assert name_after("the correct answer is false", SENTENCE, "true|false") == "false"
    assert first_name("untrue, so false", "true|false") == "true"


def test_a_sentence_may_end_in_a_sign_or_be_missing():
    assert name_after("Answer:answer2", "Answer:", NAMES) == "answer2"
    assert name_after("(answer2)", "", NAMES) == "answer2"
    assert name_after("answer2 answer1", "", NAMES) is None


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("3 * 4 = 12\n#### B", "B", "B"),
        ("Each has 4.\n#### B", "B", "E"),  # a capital inside a word
        ("#### Because", None, "B"),
        ("#### B) 12", "B", "B"),
        ("#### (B)", "B", "B"),
        ("#### A\n#### B", "B", "A"),
        ("#### B\nA is wrong", "B", "B"),
        ("#### F", None, None),
        ("#### B and C", None, "B"),  # two letters
        ("#### B or C", None, "B"),
        ("#### B, C", None, "B"),
        ("#### B/C", None, "B"),
        ("#### (B) and (C)", None, "B"),
        ("#### B & C", None, "B"),
        ("#### B-D", None, "B"),
        ("#### BC", None, "B"),
        ("#### B) A dog", "B", "B"),
        ("#### B, because", "B", "B"),
        ("#### the answer is B", None, "B"),
        ("B ####", None, "B"),
        ("#### b", None, None),
        ("Answer: B", None, "A"),
        ("so B", None, "B"),
        ("12", None, None),
    ],
)
def test_two_readings_of_a_letter(text, strict, lenient):
    assert (letter_after(text, "####", "ABCDE"), first_name(text, "[ABCDE]")) == (strict, lenient)
