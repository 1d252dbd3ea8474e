import pytest

from tcopilot.data.answers import first_option, last_number, number_after


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
        ("9-5", "5"),  # a minus, not a sign
        ("-0.0", "0"),
        (".5", "0.5"),
        ("2.50", "2.5"),
        ("100", "100"),  # no exponent
        ("3 of 4", "4"),  # the last one
        ("1,2345", "2345"),  # no thousands
        ("18.", "18"),
        ("v13", None),
        ("twelve", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_a_number_counts_only_behind_the_last_marker():
    assert number_after("48/2 = 24\n#### 72\nso #### 73 dollars", "####") == "73"
    assert number_after("the answer is 72", "####") is None
    assert number_after("72 ####", "####") is None


def test_options_are_words_of_their_own():
    assert first_option("the correct answer is answer2.") == "answer2"
    assert first_option("(answer3)") == "answer3"
    assert [first_option(text) for text in ("nonanswer2", "answer2b", "Answer2", "answer two", "B")] == [None] * 5
