import pytest

from tcopilot.data.answers import (
    close,
    first_letter,
    first_name,
    first_number,
    last_number,
    letter_after,
    name_after,
    number_after,
    read_number,
    until_end,
)

SENTENCE, NAMES = "the correct answer is", "answer[1-4]"


def test_what_follows_the_first_end_token_is_no_answer():
    assert until_end([5, 6, 2, 7, 2], 2) == [5, 6]
    assert until_end((5, 6), 2) == [5, 6]
    assert until_end([2, 5], 2) == until_end([], 2) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234,567 coins", "1234567"),  # thousands commas
        ("$1,200.50.", "1200.5"),  # currency, trailing zero, trailing period
        ("72 km/h", "72"),  # unit behind
        ("5 m2", "5"),  # digit inside a unit
        ("50%", "50"),
        ("-3", "-3"),
        ("\N{MINUS SIGN}3", "-3"),
        ("-$5", "-5"),
        ("9-5", "9"),  # a minus, not a sign
        ("-0.0", "0"),
        (".5", "0.5"),
        ("2.50", "2.5"),
        ("100", "100"),  # no exponent
        ("3 of 4", "3"),  # the first one
        ("1,2345", "1"),  # no thousands
        ("18.", "18"),
        ("v13", None),
        ("twelve", None),
        ("", None),
    ],
)
def test_the_first_number_in_plain_form(text, number):
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
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


def test_labels_may_be_in_any_notation():
    texts = ("7", "145.0", "1.8333333333333335", "1e-05", "1,200", "$18", "-Infinity", "none")
    assert [read_number(t) for t in texts] == ["7", "145", "1.8333333333333335", "0.00001", "1200", "18", None, None]


def test_numbers_are_equal_within_a_thousandth():
    assert close("0.333", "0.3333333333333333")
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
        ("the correct answer is answer2 or answer3", None, "answer2"),  # two different ones
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
        ("#### b", None, None),
        ("Answer: B", None, "A"),
        ("so B", None, "B"),
        ("12", None, None),
    ],
)
def test_two_readings_of_a_letter(text, strict, lenient):
    assert (letter_after(text, "####", "ABCDE"), first_letter(text, "ABCDE")) == (strict, lenient)
