from rlhf_ray.config.layout import groups, needs
from rlhf_ray.config.ppo import PPOConfig


def config(roles: dict, reward: dict | None = None, device: str = "gpu") -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "name": "x",
            "device": device,
            "policy": "p",
            "reward": reward or {"model": "r"},
            "data": {"path": "d"},
            "roles": roles,
        }
    )


def test_each_role_alone_has_a_bundle_for_each_worker() -> None:
    found = groups(
        config(
            {
                "rollout": {"engines": 2, "gpus": 4},
                "reference": {"gpus": 1},
                "reward": {"gpus": 1},
                "learner": {"ranks": 3, "gpus": 1},
            }
        )
    )
    assert {group.name: group.bundles for group in found} == {
        "rollout": ({"CPU": 1, "GPU": 4}, {"CPU": 1, "GPU": 4}),
        "reference": ({"CPU": 1, "GPU": 1},),
        "reward": ({"CPU": 1, "GPU": 1},),
        "learner": ({"CPU": 1, "GPU": 1},) * 3,
    }


def test_shared_roles_add_up_worker_by_worker() -> None:
    found = groups(
        config(
            {
                "rollout": {"engines": 2, "gpus": 0.5},
                "reference": {"gpus": 0.25},
                "reward": {"gpus": 0.25},
                "learner": {"ranks": 1, "gpus": 0.5},
                "shared": [["rollout", "learner"], ["reference", "reward"]],
            }
        )
    )
    assert {group.name: group.bundles for group in found} == {
        "rollout+learner": ({"CPU": 2, "GPU": 1.0}, {"CPU": 1, "GPU": 0.5}),
        "reference+reward": ({"CPU": 2, "GPU": 0.5},),
    }


def test_a_reward_that_is_not_a_model_takes_no_gpu() -> None:
    roles = {role: {"gpus": 1} for role in ("rollout", "reference", "reward", "learner")}
    assert needs(config(roles, {"url": "http://localhost:1"}), "reward") == {"CPU": 1}
    assert needs(config(roles), "reward") == {"CPU": 1, "GPU": 1}
