import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config.load import load
from rlhf_ray.config.planning import Prediction, best, load_ppo, predict, render
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.prediction import Cluster, held, models_of, performance_of, seconds_of, work_ahead
from rlhf_ray.config.roofline import GPUS, Device, Engines, Shares, forward_flops, generate_s, learn_s, score_s
from rlhf_ray.errors import ConfigError, ModelError

CONFIGS = Path(__file__).parents[2] / "configs"
ONE_NODE = CONFIGS / "ppo/llama-8b-1x8.yaml"
H100 = Cluster("h100")


@pytest.fixture(autouse=True)
def no_hub(offline: None) -> None:
    """Sizes come from names and from folders of the test."""


def of_8b(*overrides: str) -> PPOConfig:
    return load(PPOConfig, ONE_NODE, list(overrides))


def predictions(config: PPOConfig, cluster: Cluster = H100) -> dict[str, Prediction]:
    return {found.name: found for found in predict(config, cluster, work_ahead(config))}


# Seconds


def test_seconds_of_the_8b_run_by_hand() -> None:
    config = of_8b()
    work = work_ahead(config)
    assert (work.prompt_tokens, work.answer_tokens, work.longest) == (512, 512, 1024)
    seconds = seconds_of(config, models_of(config), H100, work)
    # f(1024) = 2 * 8e9 + 2 * 32 * 32 * 128 * 1024; 524,288 tokens; 0.4 of 989 TFLOP/s.
    forward = 512 * 1024 * (16e9 + 268_435_456) / 395.6e12
    assert seconds["score"] == pytest.approx(2 * forward)  # reference and reward take turns on one GPU
    # Five ranks: old log-probabilities and values, two epochs; eight steps of Adam over 16e9 parameters.
    assert seconds["learn"] == pytest.approx((1 + 2 * 3) * 2 * forward / 5 + 8 * 30 * 16e9 / (5 * 1.675e12))
    assert seconds["publish"] == pytest.approx(16e9 / (0.35 * 450e9))
    # The longest answer reads 16 GB of weights 1024 times, at 1.675 TB/s: 9.8 s; all of them together take longer.
    assert seconds["generate"] > 1024 * 16e9 / 1.675e12
    assert seconds["update"] == pytest.approx(sum(seconds.values()) - seconds["update"])


def test_with_staleness_an_update_takes_as_long_as_the_busiest_gpus() -> None:
    config = of_8b("ppo.max_staleness=1")
    seconds = seconds_of(config, models_of(config), H100, work_ahead(config))
    assert seconds["update"] == pytest.approx(seconds["learn"] + seconds["publish"])
    assert seconds["learn"] > seconds["generate"]


def test_without_staleness_generation_lasts_as_long_as_the_longest_answer() -> None:
    found = []
    for staleness in (0, 1):
        config = of_8b("rollout.prompts_per_update=4", f"ppo.max_staleness={staleness}")
        found.append(seconds_of(config, models_of(config), H100, work_ahead(config))["generate"])
    assert found[0] == pytest.approx(1024 * 16e9 / 1.675e12)
    assert found[1] < 0.6 * found[0]


def test_roles_that_share_gpus_take_turns_whatever_the_staleness() -> None:
    shared = predictions(of_8b("ppo.max_staleness=1"), Cluster("h200"))["all shared"].seconds
    assert shared["update"] == pytest.approx(sum(shared[phase] for phase in ("generate", "score", "learn", "publish")))


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_frozen_model_spread_over_gpus_computes_on_one_at_a_time(gpus: int) -> None:
    config = of_8b("reward={function: 'a:b'}", "roles.shared=[]", f"roles.reference.gpus={gpus}")
    models = models_of(config)
    seconds = seconds_of(config, models, H100, work_ahead(config))
    assert seconds["score"] == pytest.approx(512 * 1024 * forward_flops(models.policy, 1024) / 395.6e12)


def test_adapters_cost_two_forward_passes_instead_of_three_and_no_reference_of_their_own() -> None:
    config = of_8b("learner.lora={share_reference: true}")
    models, work = models_of(config), work_ahead(config)
    assert models.reference == ()
    ratio = seconds_of(config, models, H100, work)["learn"] / (
        512 * 1024 * forward_flops(models.policy, 1024) / 395.6e12
    )
    assert ratio == pytest.approx((1 + 2 * 2) * 2 / 5)


def test_across_nodes_weights_go_through_the_network() -> None:
    config = of_8b()
    seconds = seconds_of(config, models_of(config), Cluster("h100", nodes=2), work_ahead(config))
    assert seconds["publish"] == pytest.approx(16e9 / (0.35 * 50e9))


def test_shapes_of_a_folder_are_its_own_and_the_critic_has_no_head(tmp_path: Path) -> None:
    llama = {"hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(llama | {"vocab_size": 10}))
    tree = {"name": "x", "policy": str(tmp_path), "reward": {"function": "a:b"}, "data": {"path": "d"}}
    models = models_of(PPOConfig.model_validate(tree))
    # Attention 4 * 16, MLP 3 * 4 * 8, norms 3 * 4; head 10 * 4, which the critic does without.
    assert (models.policy.body, models.policy.head) == (172, 40)
    assert [(critic.body, critic.head) for critic in models.critic] == [(172, 0)]
    assert models.reward == () and models.width == 4


# Of a run


def test_an_update_as_long_as_its_bounds_has_a_phi_of_one_where_all_gpus_did_all_of_it() -> None:
    device, config = GPUS["h200"], predictions(of_8b(), Cluster("h200"))["all shared"].config
    models, work = models_of(config), work_ahead(config)
    engines = Engines(8, 1, 0.9 * 141e9 - 16e9)
    learn = score_s(models.trained, work, device, 8) + learn_s(models.trained, work, device, 8)
    scored = score_s((*models.reference, *models.reward), work, device, 8)
    seconds = generate_s(models, work, engines, device) + scored + learn
    metrics = {
        "tokens/prompt": 256 * 512,
        "tokens/trained": 512 * 512,
        "tokens/response_length": 512,
        "time/publish": 0,
    }
    times = {"time/update": seconds, "time/learn": learn}
    found = performance_of(config, models, metrics | times, device)
    assert found == pytest.approx({"perf/phi": 1.0, "perf/mfu": 1.0})
    slower = performance_of(config, models, metrics | {"time/update": 2 * seconds, "time/learn": 4 * learn}, device)
    assert slower == pytest.approx({"perf/phi": 0.5, "perf/mfu": 0.25})


def test_phi_counts_every_gpu_of_the_run_and_mfu_those_of_the_learner() -> None:
    models, metrics = models_of(of_8b()), {"tokens/prompt": 256 * 512, "tokens/trained": 512 * 512}
    metrics |= {"tokens/response_length": 512, "time/update": 100, "time/learn": 60, "time/publish": 1}
    one, other = (
        performance_of(of_8b(f"roles.learner.ranks={ranks}"), models, metrics, GPUS["h100"]) for ranks in (5, 13)
    )
    # 8 GPUs and 16, in whose bound every engine still reads all weights for every token of an answer.
    assert 1.7 * other["perf/phi"] < one["perf/phi"] < 2 * other["perf/phi"]
    assert one["perf/mfu"] == pytest.approx(13 / 5 * other["perf/mfu"])


# Memory


def test_bytes_on_each_gpu_are_those_of_the_dry_run_and_what_they_leave() -> None:
    scoring, rollout, learner = held(of_8b(), H100)
    assert scoring.weights == 2 * 16e9 and scoring.kv_cache == 0
    assert rollout.weights == 16e9 and rollout.kv_cache == 48 * 2**30
    assert (learner.weights, learner.gradients, learner.optimizer) == (6.4e9, 6.4e9, 38.4e9)  # two models, five ranks
    assert learner.left == pytest.approx(0.9 * 80e9 - 51.2e9)


def test_an_engine_spreads_over_its_gpus() -> None:
    config = load(PPOConfig, CONFIGS / "ppo/llama-70b-8x8.yaml")
    rollout = held(config, H100)[0]
    assert (rollout.weights, rollout.kv_cache) == (140e9 / 4, 30 * 2**30)


def test_the_cache_gets_what_others_leave_and_never_less_than_an_answer_takes() -> None:
    many = predictions(of_8b("rollout.prompts_per_update=100000"), Cluster("h200"))
    for found in (many["all shared"], many["apart, rollout on 4 GPUs"]):
        [full] = [held for held in found.held if held.kv_cache]
        assert found.fits and abs(full.left) < 2**10
    [without_room] = predictions(of_8b())["all shared"].held
    assert without_room.kv_cache == (512 + 1024) * 2 * 32 * 8 * 128 * 2


def test_what_does_not_fit_is_said_has_no_seconds_and_is_never_the_best() -> None:
    config = of_8b()
    found = predictions(config)
    assert not found["all shared"].fits and found["as configured"].fits
    tight = replace(found["all shared"], seconds=found["all shared"].seconds | {"update": 1e-9})
    chosen = best([tight, found["as configured"]])
    assert chosen is found["as configured"]
    assert best([tight]) is None
    text = render(config, H100, work_ahead(config), [found["as configured"], tight])
    assert any(line.split()[:5] == ["all", "shared", "no", "-", "-"] for line in text.splitlines())


def test_more_memory_lets_roles_share() -> None:
    assert predictions(of_8b(), Cluster("h200"))["all shared"].fits


# Placements


def test_every_placement_uses_at_most_the_gpus_that_there_are() -> None:
    large = load(PPOConfig, CONFIGS / "ppo/llama-70b-8x8.yaml")
    for config, nodes in ((of_8b(), 1), (of_8b(), 3), (of_8b(), 8), (large, 8)):
        for found in predictions(config, Cluster("a100", nodes)).values():
            assert sum(held.bundles.count * held.bundles.gpus for held in found.held) <= 8 * nodes + 1e-6
            assert max(held.bundles.gpus for held in found.held) <= 8


def test_apart_placements_give_generation_a_quarter_half_and_three_quarters_of_the_nodes() -> None:
    found = predictions(of_8b(), Cluster("h100", nodes=8))
    engines = {name: each.config.roles.rollout.engines for name, each in found.items() if name.startswith("apart")}
    assert engines == {f"apart, rollout on {nodes} nodes": 8 * nodes for nodes in (2, 4, 6)}


def test_a_70b_policy_gets_engines_of_four_gpus_and_frozen_models_of_two() -> None:
    config = load(PPOConfig, CONFIGS / "ppo/llama-70b-8x8.yaml")
    roles = predictions(config, Cluster("h100", nodes=8))["apart, rollout on 2 nodes"].config.roles
    assert (roles.rollout.gpus, roles.reference.gpus, roles.reward.gpus) == (4, 2, 2)


def test_scoring_gets_as_many_gpus_as_make_the_update_shortest() -> None:
    config, cluster = of_8b(), Cluster("h100", nodes=4)
    work = work_ahead(config)
    chosen = predictions(config, cluster)["apart, rollout on 2 nodes"]
    roles = chosen.config.roles
    assert roles.reference.replicas + roles.learner.ranks == 16
    for replicas in (1, 2, 4, 8):
        tree = chosen.config.model_dump()
        tree["roles"]["learner"]["ranks"] = 16 - replicas
        for role in ("reference", "reward"):
            tree["roles"][role]["replicas"] = replicas
        other = PPOConfig.model_validate(tree)
        assert chosen.seconds["update"] <= seconds_of(other, models_of(other), cluster, work)["update"]


def test_the_roles_that_are_printed_give_the_placement_that_was_predicted() -> None:
    config, cluster = of_8b(), Cluster("h100", nodes=2)
    work = work_ahead(config)
    found = predict(config, cluster, work)
    chosen = best(found)
    assert chosen
    text = render(config, cluster, work, found)
    overrides = shlex.split(text.partition("Best: ")[2].partition("\n")[2])
    again = load(PPOConfig, ONE_NODE, overrides)
    assert again.roles == chosen.config.roles
    assert seconds_of(again, models_of(again), cluster, work) == pytest.approx(chosen.seconds)


def test_a_placement_too_large_for_the_cluster_is_left_out_and_said() -> None:
    config = load(PPOConfig, CONFIGS / "ppo/llama-70b-8x8.yaml")
    found = predict(config, H100, work_ahead(config))
    assert all(each.name != "as configured" for each in found)
    text = render(config, H100, work_ahead(config), found)
    assert "asks for 64 GPUs, up to 8 on a node; there are 8, 8 on a node" in text
    assert "Nothing fits" in text


# Wrong input


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no GPU 'h1000'.*a100, h100, h200, gb200"):
        predict(of_8b(), Cluster("h1000"), work_ahead(of_8b()))


def test_a_configuration_of_another_stage_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"sft\.yaml: is not a configuration of `rlhf-ray ppo`.*no policy") as refused:
        load_ppo(CONFIGS / "demo/sft.yaml", [])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("lengths", [{"answer_tokens": 0}, {"answer_tokens": 1025}, {"prompt_tokens": 5000}])
def test_a_mean_beyond_the_longest_is_refused(lengths: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tokens is .* but .* is 1024"):
        work_ahead(of_8b(), **lengths)


def test_a_model_of_unknown_size_is_refused() -> None:
    with pytest.raises(ModelError, match="size of model 'mystery' is unknown"):
        models_of(of_8b("policy=mystery"))


# The command


def test_the_command_says_its_premises_and_answers_within_half_a_second() -> None:
    began = time.process_time()
    ran = CliRunner().invoke(app, ["plan", str(ONE_NODE), "--gpu", "h200", "--mfu", "0.3", "--answer-tokens", "300"])
    assert time.process_time() - began < 0.5
    assert ran.exit_code == 0, ran.output
    for said in ("1 x 8 h200", "0.3 of FLOP/s", "512, half of data.max_tokens", "Best: "):
        assert said in ran.output
    assert "half of rollout.max_new_tokens" not in ran.output


def test_a_lower_share_of_the_peak_is_a_longer_time() -> None:
    slow = Cluster("h100", shares=Shares(compute=0.2))
    assert slow.device == Device(197.8e12, 1.675e12, 80e9, 157.5e9)
    learn = [predictions(of_8b(), cluster)["as configured"].seconds["score"] for cluster in (H100, slow)]
    assert learn[1] == pytest.approx(2 * learn[0])
