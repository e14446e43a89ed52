"""The items that come with the package: nothing but their content tells a good answer from a bad one."""

from collections import Counter
from random import Random

import numpy as np
import pytest
from bias import characters, found_out, gram, presence, unigrams

from rlhf_ray.config.common import DataConfig
from rlhf_ray.data.quarantine import Quarantine
from rlhf_ray.evaluation.items import OWN, Item, items

CATEGORIES = ("helpful", "honest", "harmless", "not_evasive")
ITEMS = items(DataConfig(path=str(OWN), max_bad_share=0), Quarantine())
# 1.96 standard errors of a fair coin: of all 160 items, and of the 40 of a category.
BAND, WIDE_BAND = 1.96 * (0.25 / 160) ** 0.5, 1.96 * (0.25 / 40) ** 0.5


def of(category: str) -> list[Item]:
    return [item for item in ITEMS if item.category == category]


def good_and_bad(item: Item) -> tuple[str, str]:
    (good,) = item.correct
    return item.choices[good], item.choices[1 - good]


def test_there_are_forty_items_in_each_of_four_categories_and_no_prompt_twice() -> None:
    assert Counter(item.category for item in ITEMS) == dict.fromkeys(CATEGORIES, 40)
    assert len({str(item.prompt).strip().lower() for item in ITEMS}) == 160
    assert len({answer for item in ITEMS for answer in item.choices}) == 320
    assert [item.id for item in ITEMS] == [f"{category}-{n:02}" for category in CATEGORIES for n in range(1, 41)]


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("length", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_the_good_answer_is_the_longer_one_as_often_as_not(category: str, length) -> None:  # type: ignore[no-untyped-def]
    lengths = [tuple(map(length, good_and_bad(item))) for item in of(category)]
    longer = sum((good > bad) + (good == bad) / 2 for good, bad in lengths)
    assert 18 <= longer <= 22
    good, bad = (sum(column) / 40 for column in zip(*lengths, strict=True))
    assert good / bad == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_good_answer_stands_first_in_exactly_half_of_the_items_whether_it_is_longer_or_not(category: str) -> None:
    first = Counter(
        (0 in item.correct, len(good_and_bad(item)[0]) > len(good_and_bad(item)[1])) for item in of(category)
    )
    assert first[True, True] + first[True, False] == 20
    assert first[True, True] == first[False, True]


@pytest.mark.parametrize("bag", [unigrams, presence, characters])
def test_a_bag_of_words_cannot_tell_good_from_bad(bag) -> None:  # type: ignore[no-untyped-def]
    assert abs(found_out(gram([good_and_bad(item) for item in ITEMS], bag)) - 0.5) < BAND


@pytest.mark.parametrize("category", CATEGORIES)
def test_nor_can_one_that_has_learnt_from_the_same_category_alone(category: str) -> None:
    """From above only: where words are balanced one for one, what is held out tips the rest the other way."""
    assert found_out(gram([good_and_bad(item) for item in of(category)])) - 0.5 < WIDE_BAND


def test_the_check_finds_a_word_that_is_planted_in_some_good_answers() -> None:
    rng = Random(0)
    planted = [(good + " Certainly." * (rng.random() < 0.4), bad) for good, bad in map(good_and_bad, ITEMS)]
    assert found_out(gram(planted)) - 0.5 > BAND


def test_the_check_is_at_one_half_on_average_where_a_coin_says_which_answer_is_good() -> None:
    products = gram([good_and_bad(item) for item in ITEMS])
    coins = np.random.default_rng(0).choice([-1, 1], (40, 160))
    assert np.mean([found_out(products * np.outer(coin, coin), seeds=1) for coin in coins]) == pytest.approx(
        0.5, abs=0.03
    )


def test_answers_are_whole_and_short() -> None:
    for answer in (answer for item in ITEMS for answer in item.choices):
        assert answer == " ".join(answer.split())
        assert answer[-1] in ".!?\"'" and 10 < len(answer) < 260, answer
