"""--filter 'COLUMN OP VALUE' is read as it is written, and compares what can be compared."""

import pytest

from megatron_lrc.config import ConfigError
from megatron_lrc.data.filters import Filter, parse_filter
from megatron_lrc.data.token_counts import parse_token_count


@pytest.mark.parametrize(
    "text, column, operator, values",
    [
        ("int_score >= 4", "int_score", ">=", (4,)),
        ("int_score>=4", "int_score", ">=", (4,)),
        ("score < -1.5e3", "score", "<", (-1500.0,)),
        ("dump == CC-MAIN-2024-10", "dump", "==", ("CC-MAIN-2024-10",)),
        ("date >= 2020-01-01", "date", ">=", ("2020-01-01",)),
        ("id != '4'", "id", "!=", ("4",)),
        ('title == "a, b]"', "title", "==", ("a, b]",)),
        ("is_safe == true", "is_safe", "==", (True,)),
        ("'in order' <= 3", "in order", "<=", (3,)),
        ("language in [en, de]", "language", "in", ("en", "de")),
        ("language in en,'d,e'", "language", "in", ("en", "d,e")),
        ("int_score in (4, 5)", "int_score", "in", (4, 5)),
    ],
)
def test_a_condition_is_a_column_an_operator_and_values(text, column, operator, values):
    assert parse_filter(f" {text} ") == Filter(text=text, column=column, operator=operator, values=values)
    assert [type(value) for value in parse_filter(text).values] == [type(value) for value in values]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "is no condition. Give COLUMN OP VALUE, such as 'int_score >= 4'"),
        ("int_score = 4", "is no condition"),
        ("int_score 4", "is no condition"),
        ("__import__('os').abort() == 1", "is no condition"),
        ("int_score >= 4 and score < 3", "4 and score < 3 is no value"),
        ("a >= >= 4", "is no value"),
        ("a == 'x", "is no value"),
        ("a in []", "[] is no list of values"),
        ("a in [x,,y]", "is no list of values"),
        ("a in [x 'y']", "is no list of values"),
        ("a in [1, x]", "mixes a number and text. Quote what is meant as a string."),
        ("a > true", "true and false have no order"),
        ("a == null", "null meets no condition"),
    ],
)
def test_what_is_no_condition_is_refused(text, reason):
    with pytest.raises(ConfigError) as caught:
        parse_filter(text)
    assert str(caught.value).startswith(f"--filter '{text}'") and reason in str(caught.value)


@pytest.mark.parametrize(
    "text, met, unmet",
    [
        ("x >= 4", [4, 5.5, 10**30], [3, 3.999, None]),
        ("x <= 4", [4, -1], [4.5, None]),
        ("x > 4", [5], [4, None]),
        ("x < 4", [3], [4, None]),
        ("x == 4", [4, 4.0], [5, None]),
        ("x != 4", [5], [4, 4.0, None]),
        ("x in [4, 5]", [4, 5.0], [6, None]),
        ("x == true", [True], [False, None]),
        ("x >= 2020-01-01", ["2020-01-01", "2021-05-30"], ["2019-12-31", "", None]),
        ("x in [en, '4']", ["en", "4"], ["de", None]),
    ],
)
def test_values_are_compared_as_they_are_and_null_meets_nothing(text, met, unmet):
    condition = parse_filter(text)
    assert [condition.holds({"x": value}) for value in [*met, *unmet]] == [True] * len(met) + [False] * len(unmet)


@pytest.mark.parametrize(
    "text, record, reason",
    [
        ("x >= 4", {"y": 4}, "no key 'x', which --filter 'x >= 4' asks for"),
        ("x >= 4", {"x": "4"}, "the value of 'x' is text, which --filter 'x >= 4' cannot compare with a number"),
        ("x == 1", {"x": True}, "is true, which --filter 'x == 1' cannot compare with a number"),
        ("x == '4'", {"x": 4}, "is a number, which --filter 'x == '4'' cannot compare with text"),
        ("x in [a]", {"x": ["a"]}, "is a list, which"),
        ("x == true", {"x": 1}, "is a number, which"),
    ],
)
def test_what_cannot_be_compared_is_an_error_and_not_left_out_in_silence(text, record, reason):
    with pytest.raises(ConfigError) as caught:
        parse_filter(text).holds(record)
    assert reason in str(caught.value)


def test_counts_of_tokens_are_exact():
    counts = {"18B": 18 * 10**9, "450m": 450 * 10**6, "0.3B": 300_000_000, "1.5e9": 1_500_000_000, "2 K": 2000, 7: 7}
    assert {text: parse_token_count(text) for text in counts} == counts
    for wrong in ("", "B", "0", "-1", "1.5", "nan", "infB", "1e2e3", True):
        with pytest.raises(ConfigError, match="is no number of tokens. Give one such as"):
            parse_token_count(wrong)
