from rlhf_ray.config.layout import Group
from rlhf_ray.runtime.placement import shortage


def group(role: str, *bundles: dict[str, float]) -> Group:
    return Group((role,), bundles)  # type: ignore[arg-type]


def test_what_fits_is_not_short() -> None:
    wanted = [group("rollout", {"CPU": 1, "GPU": 4}), group("learner", *[{"CPU": 1, "GPU": 1}] * 4)]
    assert shortage(wanted, [{"CPU": 16, "GPU": 8}]) is None


def test_the_message_says_who_asks_for_how_much_of_what_there_is() -> None:
    wanted = [group("rollout", {"CPU": 1, "GPU": 4}), group("learner", *[{"CPU": 1, "GPU": 1}] * 8)]
    assert shortage(wanted, [{"CPU": 64, "GPU": 8}]) == (
        "12 GPUs are asked for (rollout 4, learner 8), and the cluster has 8"
    )


def test_no_gpus_at_all_is_said_plainly() -> None:
    assert shortage([group("learner", {"CPU": 1, "GPU": 1})], [{"CPU": 2}]) == (
        "1 GPUs are asked for (learner 1), and the cluster has 0"
    )


def test_enough_in_all_but_on_no_single_machine() -> None:
    message = shortage([group("rollout", {"CPU": 1, "GPU": 4})], [{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 2}])
    assert message == "a worker of rollout needs 1 CPUs and 4 GPUs on one machine, and no machine has that left"


def test_large_bundles_are_tried_before_small_ones_take_their_place() -> None:
    wanted = [group("learner", {"GPU": 1}, {"GPU": 1}), group("rollout", {"GPU": 2})]
    assert shortage(wanted, [{"GPU": 2}, {"GPU": 2}]) is None
