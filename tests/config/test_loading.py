from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.advice import advice
from rlhf_ray.config.base import leaves
from rlhf_ray.config.common import DataConfig
from rlhf_ray.config.load import dump, load
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.supervised import RewardConfig, SFTConfig
from rlhf_ray.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"

PPO = """
name: laptop
policy: models/policy
reward:
  model: models/reward
data:
  path: prompts.jsonl
"""


@pytest.fixture
def ppo_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(PPO)
    return path


def refusal(path: Path, *overrides: str, kind: type = PPOConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load(kind, path, list(overrides))
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value) or "override" in str(caught.value)
    return str(caught.value)


# Unknown keys


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("polcy=x", "policy"),
        ("rolout={}", "rollout"),
        ("rollout.max_new_token=3", "rollout.max_new_tokens"),
        ("ppo.kl.coeficient=1", "ppo.kl.coefficient"),
        ("learner.optimizer.lerning_rate=1", "learner.optimizer.learning_rate"),
        ("roles.learner.rank=2", "roles.learner.ranks"),
        ("roles.reward.gpu=1", "roles.reward.gpus"),  # its own section's, though four others have one as well
        ("reward.parts.a.ensemble.modls=[m]", "reward.parts.a.ensemble.models"),
        ("learner.zero.offload_optimizer=true", "learner.zero.offload"),  # not bf16_optimizer, which has more letters
        ("learner.critic_learning_rate=1", "ppo.algorithm.critic_learning_rate"),
        ("ppo.kl.placement=loss", "ppo.kl.estimator.placement"),
    ],
)
def test_an_unknown_key_is_refused_at_each_level_with_the_nearest_known_one(
    ppo_yaml: Path, typed: str, meant: str
) -> None:
    message = refusal(ppo_yaml, typed)
    assert f"unknown key '{typed.partition('=')[0]}'; did you mean '{meant}'?" in message


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("max_new_tokens=3", "rollout.max_new_tokens"), ("ppo.temperature=1", "rollout.temperature")],
)
def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one(ppo_yaml: Path, typed: str, meant: str) -> None:
    assert f"did you mean '{meant}'?" in refusal(ppo_yaml, typed)


def test_a_key_like_no_other_gets_no_guess(ppo_yaml: Path) -> None:
    assert "did you mean" not in refusal(ppo_yaml, "zzzzqqq=1")


def test_a_section_of_another_stage_is_unknown(ppo_yaml: Path) -> None:
    assert "unknown key 'training'" in refusal(ppo_yaml, "training.epochs=1")


# Values


@pytest.mark.parametrize(
    "override",
    [
        "rollout.prompts_per_update=-64",
        "rollout.prompts_per_update=0",
        "ppo.algorithm.gamma=-0.1",
        "ppo.algorithm.dual_clip=0.5",
        "learner.optimizer.learning_rate=0",
        "learner.optimizer.learning_rate=.inf",
        "ppo.kl.coefficient=.nan",
        "rollout.temperature=warm",
        "learner.zero.stage=4",
        "name=../elsewhere",
        "roles.rollout.gpus=1.5",
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(ppo_yaml: Path, override: str) -> None:
    key, _, value = override.partition("=")
    message = refusal(ppo_yaml, override)
    assert f"'{key}'" in message
    assert value.lstrip(".").removeprefix("-") in message


def test_every_fault_has_a_line_of_its_own(ppo_yaml: Path) -> None:
    lines = refusal(ppo_yaml, "ppo.updates=-1", "rollout.temprature=1", "seed=x").splitlines()
    assert len(lines) == 3
    assert all(line.startswith(str(ppo_yaml)) for line in lines)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\npolicy: p\nreward: {model: r}\ndata: {}\n")
    assert "'data.path' is missing" in refusal(path)


# Fields that contradict each other


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["reward.url=http://h"], "exactly one of model, ensemble, function, url and parts; model, url given"),
        (["reward.model=null"], "none given"),
        (["reward.parts.a.model=m"], "model, parts given"),
        (["reward={parts: {a: {model: m, url: 'http://h'}}}"], "exactly one of model, ensemble, function and url"),
        (["reward={ensemble: {models: [m]}}"], "at least 2 items"),
        (["reward={ensemble: {combine: worst}}"], "'reward.ensemble.models' is missing"),
        (["reward={ensemble: {models: [m, n], combine: best}}"], "there is no 'best'; expected one of 'mean', 'worst'"),
        (["reward={ensemble: {models: [m, n], combine: {coefficient: 2}}}"], "uncertainty has it: give the name as"),
        (
            ["reward={parts: {a: {ensemble: {models: [m, n], combine: {coefficient: 2}}}}}"],
            "unknown key 'reward.parts.a.ensemble.combine.coefficient'; uncertainty has it: give the name as well",
        ),
        (["reward={parts: {a: {modle: m}}}"], "did you mean 'reward.parts.a.model'?"),
        (["rollout.prompts_per_update=2", "ppo.minibatches=3"], "only 2 samples"),
        (["data.max_tokens=4000"], "data.max_tokens + rollout.max_new_tokens = 4128"),
        (["roles.learner.gpus=1"], "device is cpu"),
        (["device=gpu"], "roles.rollout.gpus is 0"),
        (["publication.backend=nccl"], "does not work with device cpu"),
        (["roles.shared=[[rollout, learner], [learner, reward]]"], "'learner' more than once"),
        (["learner.zero.stage=0", "learner.zero.offload=optimizer"], "stage is 0"),
    ],
)
def test_contradicting_fields_are_refused(ppo_yaml: Path, overrides: list[str], said: str) -> None:
    assert said in refusal(ppo_yaml, *overrides)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("workers.gpus=1", "device is cpu"),
        ("device=gpu", "workers.gpus is 0"),
        ("data.max_tokens=9999", "smaller than the longest row"),
        ("data.path=null", "exactly one of data.path and data.sources; none given"),
        ("data.sources.ai.path=a", "exactly one of data.path and data.sources; both given"),
        ("data={sources: {ai: {path: a, weight: 1}, people: {path: p}}}", "data.sources: people has no weight"),
        (
            "data={sources: {ai: {path: a, wieght: 1}}}",
            "'data.sources.ai.wieght'; did you mean 'data.sources.ai.weight'?",
        ),
        ("data={sources: {'a/b': {path: a}}}", "should match pattern"),
    ],
)
def test_contradicting_fields_of_supervised_stages_are_refused(tmp_path: Path, override: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nmodel: m\ndata: {path: d}\n")
    assert load(SFTConfig, path) and load(RewardConfig, path)
    assert said in refusal(path, override, kind=SFTConfig)


# Overrides


def test_rewards_by_name_know_their_models_and_the_columns_they_send(ppo_yaml: Path) -> None:
    parts = (
        "{good: {ensemble: {models: [m, n], combine: worst}}, warm: {ensemble: {models: [p, q], combine: weights}}, "
        "brief: {url: 'http://h'}}"
    )
    reward = load(PPOConfig, ppo_yaml, [f"reward={{parts: {parts}}}", "reward.parts.brief.weight=-0.5"]).reward
    assert {place: source.weight for place, source in reward.sources.items()} == {
        "reward.parts.good": 1.0,
        "reward.parts.warm": 1.0,
        "reward.parts.brief": -0.5,
    }
    assert reward.members == ["m", "n", "p", "q"]
    # Of averaged weights there is one score, and nothing to disagree with.
    assert reward.details == ["scores/good", "scores/warm", "scores/brief", "disagreement/good"]


def test_a_single_reward_has_no_parts_and_an_ensemble_disagrees_by_the_rewards_own_name(ppo_yaml: Path) -> None:
    config = load(PPOConfig, ppo_yaml)
    assert config.reward.details == [] and config.critic_body == "models/reward"
    ensemble = load(PPOConfig, ppo_yaml, ["reward={ensemble: {models: [m, n], combine: worst}}"])
    assert ensemble.reward.details == ["disagreement/reward"] and ensemble.critic_body == "m"
    assert load(PPOConfig, ppo_yaml, ["reward={function: 'a:b'}"]).critic_body == "models/policy"


def test_sources_are_data_sets_of_their_own_and_share_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nmodel: m\ndata: {sources: {ai: {path: a, split: test}}, max_tokens: 9}\n")
    config = load(RewardConfig, path, ["data.sources.people.path=p"])
    assert config.data.weights is None
    assert config.data.parts == {
        "ai": DataConfig(path="a", split="test", max_tokens=9),
        "people": DataConfig(path="p", max_tokens=9),
    }
    weights = ["data.sources.people.weight=3", "data.sources.ai.weight=1", "data.sources.people.path=p"]
    assert load(RewardConfig, path, weights).data.weights == {"ai": 1, "people": 3}


def test_the_last_override_of_a_key_wins(ppo_yaml: Path) -> None:
    assert load(PPOConfig, ppo_yaml, ["ppo.updates=3", "ppo.updates=4"]).ppo.updates == 4


def test_an_override_may_hold_equals_signs_and_structure(ppo_yaml: Path) -> None:
    config = load(PPOConfig, ppo_yaml, ["data.path=a=b.jsonl", "roles.shared=[[rollout, learner]]"])
    assert config.data.path == "a=b.jsonl"
    assert config.roles.shared == [["rollout", "learner"]]


def test_an_override_fills_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(PPO + "rollout:\n")
    assert load(PPOConfig, path, ["rollout.temperature=0.5"]).rollout.temperature == 0.5


@pytest.mark.parametrize("override", ["ppo.updates", "=3", "ppo.updates=[1", "policy.name=x"])
def test_an_override_that_cannot_be_applied_is_quoted(ppo_yaml: Path, override: str) -> None:
    assert f"override '{override}'" in refusal(ppo_yaml, override)


# YAML


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("", "expected keys and values"),
        ("- 1", "expected keys and values, found list"),
        ("name: a\nseed: 1\nseed: 2\n", "'seed' stands twice"),
        ("data:\n  path: a\n  path: b\n", "'path' stands twice"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert said in refusal(path)


def test_a_yaml_error_says_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nseed: 1\npolicy: [a\n")
    assert "line 3" in refusal(path)


def test_a_missing_file_or_a_folder_or_bytes_are_refused(tmp_path: Path) -> None:
    assert "no such configuration file" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe")
    assert "cannot be read" in refusal(tmp_path / "run.yaml")


def test_off_is_text_and_not_false(ppo_yaml: Path) -> None:
    assert load(PPOConfig, ppo_yaml, ["telemetry.wandb=off"]).telemetry.wandb == "off"
    assert load(PPOConfig, ppo_yaml, ["trust_remote_code=true"]).trust_remote_code is True


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(PPO + "roles:\n  reference: &one {replicas: 2}\n  reward: {<<: *one}\n")
    assert load(PPOConfig, path).roles.reward.replicas == 2


# Choices of sections


def test_a_choice_is_a_name_or_a_section_and_has_a_default(ppo_yaml: Path) -> None:
    groups = "rollout.samples_per_prompt=4"
    assert load(PPOConfig, ppo_yaml).ppo.algorithm.name == "ppo"
    assert load(PPOConfig, ppo_yaml, ["ppo.algorithm=grpo", groups]).ppo.algorithm.aggregation == "sequence_mean"
    chosen = load(PPOConfig, ppo_yaml, ["ppo.algorithm={name: dapo, max_refills: 1}", groups]).ppo.algorithm
    assert (chosen.name, chosen.clip_ratio, chosen.max_refills) == ("dapo", (0.2, 0.28), 1)
    assert load(PPOConfig, ppo_yaml, ["ppo.algorithm.gamma=0.9"]).ppo.algorithm.gamma == 0.9
    assert load(PPOConfig, ppo_yaml, ["ppo.algorithm.clip_ratio=0.3"]).ppo.algorithm.clip_ratio == (0.3, 0.3)


def test_an_override_reaches_into_a_section_that_stands_as_its_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(PPO + "rollout: {samples_per_prompt: 4}\nppo: {algorithm: grpo, correction: mask}\n")
    config = load(PPOConfig, path, ["ppo.algorithm.clip_ratio=0.3", "ppo.correction.low=0.1"])
    assert (config.ppo.algorithm.name, config.ppo.algorithm.clip_ratio) == ("grpo", (0.3, 0.3))
    assert (config.ppo.correction.name, config.ppo.correction.low) == ("mask", 0.1)
    assert "'policy' is a value, not a section" in refusal(path, "policy.name=x")


def test_a_key_of_another_choice_says_whose_it_is(ppo_yaml: Path) -> None:
    message = refusal(ppo_yaml, "ppo.algorithm.max_refills=2")
    assert "unknown key 'ppo.algorithm.max_refills'; dapo has it: give the name as well" in message


def test_a_gpu_for_a_reference_without_an_actor_is_not_asked_for(ppo_yaml: Path) -> None:
    gpus = [f"roles.{role}.gpus=1" for role in ("rollout", "reward", "learner")]
    shared = "learner.lora.share_reference=true"
    assert load(PPOConfig, ppo_yaml, ["device=gpu", shared, *gpus]).shares_reference
    assert "roles.reference.gpus is 0" in refusal(ppo_yaml, "device=gpu", *gpus)


def test_a_choice_that_is_none_and_a_key_of_another_are_refused(ppo_yaml: Path) -> None:
    assert "'ppo.algorithm': there is no 'grop'; expected one of 'ppo', 'grpo'" in refusal(
        ppo_yaml, "ppo.algorithm=grop"
    )
    assert "did you mean 'grpo'?" in refusal(ppo_yaml, "ppo.algorithm=grop")
    message = refusal(ppo_yaml, "ppo.algorithm={name: dapo, max_refil: 3}")
    assert "unknown key 'ppo.algorithm.max_refil'; did you mean 'ppo.algorithm.max_refills'?" in message
    message = refusal(ppo_yaml, "ppo.algorithm={name: grpo, gamma: 1}")
    assert "unknown key 'ppo.algorithm.gamma'" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.algorithm=grpo", "grpo compares answers to the same prompt, but rollout.samples_per_prompt is 1"),
        ("ppo.algorithm={name: reinforce_pp, baseline: true}", "reinforce_pp compares answers to the same prompt"),
        ("ppo.kl.estimator.placement=loss", "k2, k3, full has it: give the name as well"),  # of k1, the default
        ("ppo.kl.estimator={name: k2, placement: both}", "'ppo.kl.estimator.placement'"),
        ("ppo.kl={coefficient: 0, controller: adaptive}", "controller adaptive multiplies the coefficient, which is 0"),
        ("ppo.kl.estimator={name: k3, top_k: 20}", "unknown key 'ppo.kl.estimator.top_k'; full has it"),
        ("ppo.algorithm.clip_ratio=[1.5, 0.2]", "'ppo.algorithm.clip_ratio.0'"),
        ("ppo.correction={name: mask, low: 2}", "'ppo.correction.low'"),
        ("learner.zero={stage: 2, offload: all}", "offload all works with stage 3, but stage is 2"),
        ("learner.zero={bf16_optimizer: true, offload: optimizer}", "do not work together; choose one"),
        ("learner.zero.bf16_optimizer=true", "bf16_optimizer needs bf16 weights, but device is cpu"),
    ],
)
def test_what_cannot_work_together_is_refused(ppo_yaml: Path, override: str, said: str) -> None:
    assert said in refusal(ppo_yaml, override)


def test_an_overlong_buffer_is_no_longer_than_an_answer(ppo_yaml: Path) -> None:
    dapo = "ppo.algorithm={name: dapo, overlong_buffer: 500}"
    assert "overlong_buffer is 500, more than rollout.max_new_tokens 128" in refusal(
        ppo_yaml, dapo, "rollout.samples_per_prompt=2"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ppo.kl.estimator=k2", "k2 in the reward"),
        ("ppo.kl.estimator=k3", "k3 in the reward"),
        ("ppo.kl.estimator={name: k3, placement: loss}", "k3 as a loss"),
        ("ppo.kl.estimator=full", "full in the reward alone"),
        ("ppo.kl.estimator={name: full, placement: loss}", "full as a loss alone"),
        ("ppo.correction=none", "ppo.correction is none"),
        ("ppo.on_breach=warn", "ppo.on_breach is warn"),
    ],
)
def test_what_is_known_to_be_biased_or_risky_is_said(ppo_yaml: Path, override: str, said: str) -> None:
    config = load(PPOConfig, ppo_yaml, [override])
    assert [sentence for sentence in advice(config) if said in sentence]
    assert advice(load(PPOConfig, ppo_yaml)) == []
    assert advice(load(PPOConfig, ppo_yaml, ["ppo.max_staleness=1"])) == []
    overlapped = load(PPOConfig, ppo_yaml, ["ppo.max_staleness=1", "roles.shared=[[rollout, learner]]"])
    assert ["each slows the other down" in sentence for sentence in advice(overlapped)] == [True]
    assert advice(load(PPOConfig, ppo_yaml, ["ppo.kl.estimator={name: full, placement: both}"])) == []


# Round trip and size


@given(
    seed=st.integers(0, 2**31),
    rate=st.floats(1e-12, 1.0),
    wandb=st.sampled_from(["auto", "online", "offline", "off"]),
    path=st.text(st.characters(exclude_categories=["C"]), min_size=1),
    shared=st.sampled_from([[], [["rollout", "learner"]], [["reference", "reward"], ["learner", "rollout"]]]),
)
def test_a_dumped_configuration_loads_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rate: float, wandb: str, path: str, shared: list
) -> None:
    config = PPOConfig.model_validate(
        {
            "name": "off",
            "seed": seed,
            "policy": "null",
            "reward": {"function": "a:b"},
            "data": {"path": path},
            "learner": {"optimizer": {"learning_rate": rate}},
            "telemetry": {"wandb": wandb},
            "roles": {"shared": shared},
        }
    )
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(PPOConfig, file) == config


def test_a_configuration_cannot_be_changed_after_loading(ppo_yaml: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(PPOConfig, ppo_yaml).seed = 3


def test_ppo_stays_small() -> None:
    assert len(leaves(PPOConfig)) <= 60


def test_a_choice_is_one_leaf_and_its_settings_are_its_own() -> None:
    found = leaves(PPOConfig)
    chosen = ["reward.ensemble", "ppo.algorithm", "ppo.kl.controller", "ppo.kl.estimator", "ppo.correction"]
    for key in [*chosen, "learner.lora"]:
        assert key in found and not [name for name in found if name.startswith(f"{key}.")]


def test_a_complete_laptop_run_takes_few_lines(ppo_yaml: Path) -> None:
    config = load(PPOConfig, ppo_yaml)
    assert config.device == "cpu"
    laptop = [path for path in CONFIGS.glob("demo/*.yaml") if "device: gpu" not in path.read_text()]
    for path in laptop:
        assert len(path.read_text().splitlines()) <= 40, path
