"""RLlib's algorithms on walks: what they are told, how their policies are measured, and that they learn for real."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_ray import cli
from rlhf_ray.config.load import load
from rlhf_ray.config.rllib import RLlibConfig
from rlhf_ray.environments.random_walks import distances, random_graph
from rlhf_ray.errors import StopRequested, TrainingError
from rlhf_ray.interrupts import Interrupt
from rlhf_ray.stages import rllib
from rlhf_ray.stages.rllib import Learnable, examined, graph, learned, one_hot

ROOT = Path(__file__).parents[2]
TINY = {"nodes": 6, "share": 0.4, "longest": 5}


def config(**changes: Any) -> RLlibConfig:
    return RLlibConfig.model_validate({"name": "run", "environment": TINY, "telemetry": {"wandb": "off"}, **changes})


# Settings


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_the_demo_configurations_are_valid_and_short(name: str) -> None:
    assert load(RLlibConfig, ROOT / f"configs/demo/rllib-{name}.yaml").algorithm.name == name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"algorithm": "sac"}, "does not match any of the expected tags"),
        ({"algorithm": {"name": "dqn", "epochs": 2}}, "Extra inputs"),
        ({"algorithm": {"minibatches": 64}, "tokens_per_update": 32}, "algorithm.minibatches is 64"),
        ({"device": "gpu"}, "leave it at cpu"),
        ({"environment": {"nodes": 1}}, "greater than or equal to 2"),
    ],
)
def test_a_setting_without_a_meaning_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(**changes)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("algorithm=pppo", "'algorithm': there is no 'pppo'; expected one of 'ppo', 'dqn'; did you mean 'ppo'?"),
        ("environment.node=5", "unknown key 'environment.node'; did you mean 'environment.nodes'?"),
        ("environment.share=1e-9", "none of 10000 graphs of 3 nodes with a share of 1e-09 edges leads all to the goal"),
    ],
)
def test_the_command_refuses_bad_input_with_one_message(
    override: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: x\noutput_dir: {tmp_path}\nenvironment: {{nodes: 3}}\ntelemetry: {{wandb: off}}\n")
    monkeypatch.setattr(sys, "argv", ["rlhf-ray", "rllib", str(path), override])
    monkeypatch.setattr(rllib.session, "connect", lambda address: pytest.fail("started Ray"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_the_graph_is_the_seeds() -> None:
    assert np.array_equal(graph(config(seed=3)), random_graph(6, 0.4, 3))


# What RLlib sees


def test_ids_are_one_hot_oldest_first_padding_included() -> None:
    assert one_hot(np.array([[2, 0]]), 2).tolist() == [[0, 0, 1, 1, 0, 0]]


def test_a_cut_answer_is_ended_for_good_so_that_no_value_is_added_behind_it() -> None:
    edges = ~np.eye(4, dtype=bool)
    env = Learnable({"edges": edges, "longest": 2, "beta": 0.0})
    state, _ = env.reset(seed=0, options={"prompt": 0})
    assert env.observation_space.contains(state)
    assert env.step(np.int64(2))[2:4] == (False, False)
    state, reward, terminated, truncated, _ = env.step(np.int64(3))
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert state.tolist() == one_hot(np.array([[1, 2, 3]]), 4)[0].tolist()


# What is measured


def test_who_always_goes_nearer_is_optimal_and_its_kl_is_that_of_a_deterministic_policy() -> None:
    told = config(environment={"nodes": 8, "share": 0.3, "longest": 8})
    edges = graph(told)
    far = distances(edges)
    nearest = np.where(edges, far, np.inf).argmin(1)

    def guide(states: np.ndarray) -> Tensor:
        return torch.nn.functional.one_hot(torch.from_numpy(nearest[states[:, -1]]), 8).double()

    steps = far[far > 0].mean()
    found = examined(guide, told, edges, samples=2, seed=0)
    assert found == pytest.approx({"optimality": 1.0, "kl": steps * np.log(8), "answer_tokens": steps})


def test_who_prefers_nothing_is_at_the_reference() -> None:
    told = config()
    found = examined(lambda states: torch.full((len(states), 6), 1 / 6, dtype=torch.float64), told, graph(told), 200, 0)
    assert found["kl"] == pytest.approx(0.0, abs=1e-9)
    assert 0 < found["optimality"] < 0.5


def test_walks_are_drawn_from_the_policy() -> None:
    """Two nodes: to the goal with probability 0.3, else back to where one is, which is no edge."""
    told = config(environment={"nodes": 2, "share": 1.0, "longest": 3})
    edges = np.array([[False, True], [True, False]])
    found = examined(lambda states: torch.tensor([[0.3, 0.7]]).double().expand(len(states), 2), told, edges, 5000, 0)
    assert found["optimality"] == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 5000))
    assert found["answer_tokens"] == 1.0


def test_a_loss_that_is_not_finite_stops_the_run_and_what_is_not_there_yet_is_absent() -> None:
    losses = {"total_loss": float("nan"), "entropy": 1.0, "vf_loss": 0.5}
    with pytest.raises(TrainingError, match=r"update 3: the loss is nan; lower algorithm\.learning_rate"):
        learned(config(), {"learners": {"default_policy": losses}, "env_runners": {}}, 3)
    assert learned(config(algorithm="dqn"), {"learners": {}, "env_runners": {"episode_return_mean": 0.5}}, 0) == {
        "rllib/return": 0.5
    }


# For real


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.real
def test_ppo_learns_a_small_graph_and_leaves_a_policy_that_can_be_read_and_nothing_at_home(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.rllib.core.rl_module.rl_module import RLModule

    home = tmp_path / "home"
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(home))
    told = config(output_dir=str(tmp_path), updates=30, tokens_per_update=1000, algorithm={"learning_rate": 1e-3})
    summary = rllib.run(told)
    folder = tmp_path / "run"
    found = lines(folder)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert found[0]["rllib/optimality"] < 0.6
    assert summary["optimality"] > 0.85
    assert summary["tokens"] == found[-1]["tokens/total"] >= 30 * 1000
    assert {"rllib/loss", "rllib/value_loss", "rllib/entropy", "rllib/return", "rllib/kl"} <= found[0].keys()
    module: Any = RLModule.from_checkpoint(Path(summary["policy"]))

    def greedy(states: np.ndarray) -> Tensor:
        scores = module.forward_inference({"obs": torch.from_numpy(one_hot(states, 6))})["action_dist_inputs"]
        return torch.nn.functional.one_hot(scores.argmax(-1), 6).double()

    assert examined(greedy, told, graph(told), 1, 0)["optimality"] == summary["optimality_greedy"]
    assert list(home.iterdir()) == []


@pytest.mark.real
def test_dqn_learns_the_same_graph_and_a_stop_saves_its_policy(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = config(output_dir=str(tmp_path), updates=4, tokens_per_update=1500, algorithm="dqn")
    summary = rllib.run(told)
    assert summary["optimality"] == summary["optimality_greedy"] > 0.85
    assert "rllib/q" in lines(tmp_path / "run")[-1]
    assert "rllib/entropy" not in lines(tmp_path / "run")[-1]

    def stop(config: RLlibConfig, result: Any, update: int) -> dict[str, float]:
        Interrupt.received = 15
        return learned(config, result, update)

    monkeypatch.setattr(rllib, "learned", stop)
    with pytest.raises(StopRequested, match=r"stopped by SIGTERM; the policy as it was is saved in '.*stopped/policy'"):
        rllib.run(told.model_copy(update={"name": "stopped"}))
    assert len(lines(tmp_path / "stopped")) == 1
    assert json.loads((tmp_path / "stopped/checkpoints/stopped/state.json").read_text())["updates"] == 1
