"""Stated probabilities: "P(Yes) = 0.1" says no. The number is the score, or the answer is malformed."""

import pytest

from answer_parser import parse_answer

RULES, TRUTH = ("No|no", "Yes|yes"), ("False|false", "True|true")
NOTATIONS = [
    "P({}) = {}", "P({}): {}", "P({})={}", "p({}) = {}", "Pr[{}] = {}", "Pr({}) = {}", "**P({})**: {}", "P({}) ≈ {}",
    r"$P(\text{{{}}}) = {}$", r"\(\Pr[\mathrm{{{}}}] = {}\)", r"$p_{{\text{{{}}}}} = {}$", "p_{}: {}", "P_{} = {}",
    "prob({})={}", "prob_{} = {}", "Probability({}): {}", "{} probability: {}", "{}_prob = {}", 'P("{}") = {}',
    "P(answer={}) = {}", "P({} | post) = {}", "ℙ({}) = {}", "P({}) is {}", "P({}) is about {}, as it only asks.",
    "I see. P({}) = {}\n\nThe post asks.", "Answer: P({}) = {}", '{{"P({})": {}}}', r"\boxed{{P({}) = {}}}",
    "P({})\n= {}", "P({}):\n{}", "conf({}) = {}", "Likelihood({}) = {}", "So P({}) -> {}.",
]  # fmt: skip
NUMBERS = {"0.1": 0.1, ".1": 0.1, "10%": 0.1, "10 %": 0.1, "0,1": 0.1, "1/10": 0.1, "1e-3": 0.001, "0": 0.0, "0.9": 0.9}


@pytest.mark.parametrize("notation", NOTATIONS)
def test_the_number_is_the_score_of_its_own_class(notation):
    """P(yes) = p and P(no) = 1 - p are the same score, whichever class the words name first."""
    for text, share in NUMBERS.items():
        for word, score in (("Yes", share), ("No", 1 - share), ("violation", share), ("not violating", 1 - share)):
            if " " in word and "_" in notation:
                continue
            answer = notation.format(word, text)
            assert parse_answer(answer, RULES)[0] == pytest.approx(score, abs=1e-9), answer
            assert parse_answer(answer, RULES[::-1])[0] == pytest.approx(1 - score, abs=1e-9), answer


SCORES = {  # with the words No and Yes
    "P(Yes)=0.1, P(No)=0.9": 0.1, "P(No) = 0.9; P(Yes) = 0.1": 0.1, '{"yes": 0.1, "no": 0.9}': 0.1, "No: 90%": 0.1,
    "| Yes | 0.9 |\n| No | 0.1 |": 0.9, "p = 0.12 (violation)": 0.12, "p = 0.1": 0.1, "Prob: 10%": 0.1, "90% no": 0.1,
    "No. P(Yes) = 0.1": 0.1, "P(Yes) = 0.1\nAnswer: No": 0.0, "P(compliant) = 0.9": 0.1, "P(¬violation) = 0.9": 0.1,
    "Probability of no violation: 0.9": 0.1, "No 0.9": 0.1, "P(Yes) = 10 out of 100": 0.1, "P(Yes) = one tenth": 0.1,
    "Probability of yes = 0.1": 0.1, "Violation: 0.12": 0.12, "P(spam) = 0.9. No.": 0.0, "Yes. Confidence: 90%": 1.0,
}  # fmt: skip
MALFORMED = """P(Yes) > 0.9 ; P(No) > 0.9 ; P(Yes) <= 0.1 ; P(Yes) is low ; P(Yes) ; P(Yes) = ? ; P(Yes) = 0.1-0.2 ;
    P(Yes) in [0.1, 0.2] ; P(Yes) = 0.1 or 0.2 ; P(Yes) < P(No) ; P(Yes) = 7 ; P(Yes) = -0.1 ; P(Yes) = 150% ;
    P(Yes) = nan ; P(Yes) = 0.1, P(No) = 0.5 ; 1 - P(Yes) = 0.1 ; odds(yes) = 0.1 ; Confidence: 0.1 ; Yes: unlikely ;
    Yes. Confidence: 10% ; A violation is unlikely. ; The probability that it violates the rule is low. ; 10% no ;
    no: 0.1 ; p(Yes)/p(No) = 0.1/0.9 ; P(Yes) = 0.2 + 0.5 ; P(spam) = 0.9 ; Yes (p = 0.1)"""


@pytest.mark.parametrize("answer, score", SCORES.items())
def test_statements_beside_words_and_each_other(answer, score):
    assert parse_answer(answer, RULES)[0] == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("answer", MALFORMED.split(" ;"))
def test_what_states_no_number_of_a_class_is_malformed(answer):
    assert parse_answer(answer.strip(), RULES)[0] is None


def test_other_letters_p_are_no_statements():
    """Mathematics has its own p and P(x)."""
    for answer in (
        "P(x) = x + 1, so the solution is correct.",
        "The solution is correct.\nLet p = 3.",
        "p is prime. True",
    ):
        assert parse_answer(answer, TRUTH) == (1.0, "word"), answer


def test_the_given_answers_are_read_on_their_side(shared):
    import csv

    with open(shared / "cases/stated-probabilities/answers.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            score, _ = parse_answer(row["answer"], tuple(row["words"].split(",")))
            assert score is not None and (score > 0.5) == (row["side"] == "1"), row
