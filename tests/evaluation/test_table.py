from io import StringIO

import numpy as np
from rich.console import Console

from rlhf_ray.evaluation.choice import Measured, compare, evaluate
from rlhf_ray.evaluation.items import Item
from rlhf_ray.evaluation.table import table


def shown(rewards: list[tuple[float, float]], changed: bool = False) -> list[str]:
    items = [
        Item(f"{n}", "honest" if n else "helpful", "Why?", ("yes", "no"), frozenset({0})) for n in range(len(rewards))
    ]
    before = evaluate(items, [Measured(rewards=np.array([0.0, 1.0]))] * len(items))
    results = evaluate(items, [Measured(rewards=np.array(pair)) for pair in rewards])
    changes = compare(before.rows(), results.rows()) if changed else None
    console = Console(width=200, record=True, file=StringIO())
    console.print(table(results.summary(), "policy", changes))
    return console.export_text().splitlines()


def test_a_line_a_rule_has_accuracy_interval_and_categories() -> None:
    lines = shown([(1, 0), (1, 0), (0, 1), (1, 0)])
    assert "policy, 4 items" in lines[0]
    (line,) = [line for line in lines if "reward" in line]
    # 3 of 4; Wilson's interval of it from a table; helpful 1 of 1, honest 2 of 3, their mean 5/6.
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "reward",
        "0.750 [0.301, 0.954]",
        "0.833",
        "1.000",
        "0.667",
    ]
    assert [rule for rule in ("random", "longer", "shorter") if any(rule in line for line in lines)] == [
        "random",
        "longer",
        "shorter",
    ]


def test_changes_since_another_checkpoint_stand_in_the_last_column() -> None:
    (line,) = [line for line in shown([(1, 0), (1, 0), (0, 1), (1, 0)], changed=True) if "reward" in line]
    # Three of four became right: 2 / 2^3.
    assert line.strip("│ ").endswith("3 / 0 (0.250)")
