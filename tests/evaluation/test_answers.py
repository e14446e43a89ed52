import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.evaluation.answers import commonest_ngram, describe, distinct, words

Texts = st.lists(st.text("ab ", max_size=20), min_size=1, max_size=8)


def test_the_commonest_ngram_is_counted_once_a_response() -> None:
    texts = [
        "You are valued and cared for.",
        "Know that you are valued and cared, ok?",
        "so it goes so it goes so it goes so it goes",  # its own 5-grams, several times
        "No.",
    ]
    assert commonest_ngram(texts) == ("you are valued and cared", 2 / 4)


def test_no_ngram_runs_from_one_response_into_the_next() -> None:
    assert commonest_ngram(["a b c", "d e", "a b c", "d e"]) == ("", 0)
    assert commonest_ngram(["a b c", "d e"], n=3) == ("a b c", 1 / 2)


def test_of_equally_common_ones_it_is_the_first_in_the_alphabet() -> None:
    assert commonest_ngram(["b b", "a a"], n=2) == ("a a", 1 / 2)


@given(Texts, st.integers(1, 3))
def test_its_share_is_the_largest_found_by_looking_for_each_in_all(texts: list[str], n: int) -> None:
    padded = [f" {' '.join(words(text))} " for text in texts]
    found = {tuple(w[i : i + n]) for w in map(words, texts) for i in range(len(w) - n + 1)}
    shares = [sum(f" {' '.join(ngram)} " in text for text in padded) / len(texts) for ngram in found]
    assert commonest_ngram(texts, n).share == max(shares, default=0)


def test_distinct_ngrams_within_the_budget_by_hand() -> None:
    texts = ["a b a", "b a c c c"]
    # Unigrams a b a b a | c c c; bigrams ab ba ba | ac cc cc.
    assert distinct(texts, 1, budget=5) == 2 / 5
    assert distinct(texts, 1, budget=8) == 3 / 8
    assert distinct(texts, 2, budget=6) == 4 / 6


def test_too_little_text_has_no_distinct_share() -> None:
    assert distinct(["a b"], 1, budget=3) is None
    assert distinct(["a b"], 2, budget=2) is None


def test_more_text_of_the_same_kind_does_not_lower_it() -> None:
    assert distinct(["a b c"] * 100, 1, budget=30) == distinct(["a b c"] * 10, 1, budget=30) == 3 / 30


def test_everything_at_once_by_hand() -> None:
    found = describe(["one", "two words", "three of them"], [2, 4, 6], [True, True, False], {"gold": [1, 0, 0.5]})
    assert found["responses"] == 3
    assert found["tokens"] == {"mean": 4, "se": pytest.approx(math.sqrt(4 / 3))}
    assert (found["eos_rate"], found["truncation_rate"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found["commonest_5gram"] == {"text": "", "share": 0}
    assert found["distinct_1"] is None
    assert found["rewards"]["gold"] == {"mean": 0.5, "se": pytest.approx(math.sqrt(0.25 / 3))}
    assert json.loads(json.dumps(found)) == found


def test_unequal_numbers_and_no_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="2 responses, but 1 values of gold"):
        describe(["a", "b"], [1, 1], [True, True], {"gold": [1]})
    with pytest.raises(ValueError, match="no responses"):
        describe([], [], [])
