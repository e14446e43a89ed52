"""RLlib's PPO or DQN on a token MDP: a second opinion on learning, from code that is not ours.

Everything runs in this process; RLlib's own weights, metrics and checkpoints stay behind this file. An answer that was
cut off has been paid for, and no learner may add the value of a state behind it: RLlib would, at a truncation, and so
it is shown none.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_ray import interrupts
from rlhf_ray.config.rllib import DQN, PPO, RLlibConfig
from rlhf_ray.environments.random_walks import Edges, random_graph
from rlhf_ray.environments.token_mdp import walks
from rlhf_ray.errors import ConfigError, StopRequested, TrainingError
from rlhf_ray.models.threads import one_thread
from rlhf_ray.runtime import checkpoints, session
from rlhf_ray.telemetry.tracker import Tracker

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

HIDDEN = [128, 128]
ENVIRONMENTS = 16
"""Episodes sampled side by side."""
LAST_EPSILON = 0.05
BEFORE_LEARNING = 1000
"""Tokens in DQN's buffer before it learns."""
REPLAYED = 50_000
"""Newest tokens that DQN's buffer holds."""
SAMPLES, LAST_SAMPLES = 5, 50
"""Walks from every start, by which a policy is measured after an update and at the end."""

Policy = Callable[[NDArray[np.integer]], Tensor]
"""[B, window] states -> [B, V] probabilities of the next token."""


def run(config: RLlibConfig, address: str | None = None) -> dict[str, Any]:
    """The whole stage; returns what summary.json says. Any failure ends it with an RLHFError."""
    with Tracker(config, "rllib") as tracker:
        edges = graph(config)
        with session.connect(address), interrupts.stoppable(), one_thread(), _built(config, edges) as algorithm:
            summary = train(config, edges, algorithm, tracker)
        tracker.summary(summary)
        return summary


def graph(config: RLlibConfig) -> Edges:
    """Raises ConfigError when no graph of so few edges was found that leads from everywhere to the goal."""
    told = config.environment
    try:
        return random_graph(told.nodes, told.share, config.seed)
    except ValueError as error:
        raise ConfigError(f"environment: {error}; raise environment.share, now {told.share:g}") from None


def train(config: RLlibConfig, edges: Edges, algorithm: "Algorithm", tracker: Tracker) -> dict[str, Any]:
    """Every update of the run, and the policy's measures at its end."""
    progress = tracker.progress(config.updates, "RLlib")
    began, tokens, saved = time.monotonic(), 0, ""
    for update in range(config.updates):
        started = time.monotonic()
        try:
            interrupts.Interrupt.check()
        except StopRequested as stop:
            saved = save(config, algorithm, tracker, update, "stopped")
            raise StopRequested(f"{stop}; the policy as it was is saved in '{saved}'") from None
        result = algorithm.train()
        metrics = learned(config, result, update)
        measured = examined(policy_of(config, algorithm), config, edges, SAMPLES, update)
        metrics |= {f"rllib/{name}": value for name, value in measured.items()}
        last = update + 1 == config.updates
        if last or (config.checkpoint.every and (update + 1) % config.checkpoint.every == 0):
            saved = save(config, algorithm, tracker, update + 1)
        before, tokens = tokens, int(result["env_runners"]["num_env_steps_sampled_lifetime"])
        seconds = time.monotonic() - started
        metrics |= {
            "tokens/generated": float(tokens - before),
            "tokens/total": float(tokens),
            "tokens/per_s": (tokens - before) / seconds,
            "time/update": seconds,
        }
        tracker.log(update, metrics)
        progress.advance(optimality=metrics["rllib/optimality"], tokens_per_s=metrics["tokens/per_s"])
    measured = examined(policy_of(config, algorithm), config, edges, LAST_SAMPLES, config.updates)
    greedy = examined(policy_of(config, algorithm, greedy=True), config, edges, 1, config.updates)
    return {
        "updates": config.updates,
        "tokens": tokens,
        **measured,
        "optimality_greedy": greedy["optimality"],
        "seconds": time.monotonic() - began,
        "policy": saved,
    }


def learned(config: RLlibConfig, result: Mapping[str, Any], update: int) -> dict[str, float]:
    """RLlib's numbers by the names of ours; those that it has not got yet are absent. Raises TrainingError for a loss
    that is not finite."""
    names = {"total_loss": "loss"} | (
        {"entropy": "entropy", "vf_loss": "value_loss"} if isinstance(config.algorithm, PPO) else {"qf_mean": "q"}
    )
    losses = result.get("learners", {}).get("default_policy", {})  # DQN learns nothing before its buffer has enough
    found = {f"rllib/{ours}": float(losses[theirs]) for theirs, ours in names.items() if theirs in losses}
    if not math.isfinite(found.get("rllib/loss", 0.0)):
        raise TrainingError(f"update {update}: the loss is {found['rllib/loss']}; lower algorithm.learning_rate")
    if "episode_return_mean" in result["env_runners"]:
        found["rllib/return"] = float(result["env_runners"]["episode_return_mean"])
    return found


class Learnable(gymnasium.Wrapper[NDArray[np.float32], np.int64, NDArray[np.integer], np.int64]):
    """Walks as RLlib's networks take them: states one-hot, and an answer that was cut off ended for good."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        mdp = walks(**told)
        super().__init__(mdp)
        self.vocabulary = mdp.padding
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (mdp.window * (mdp.padding + 1),), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        state, info = self.env.reset(seed=seed, options=options)
        return one_hot(state[None], self.vocabulary)[0], info

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        state, reward, terminated, truncated, info = self.env.step(action)
        return one_hot(state[None], self.vocabulary)[0], float(reward), terminated or truncated, False, info


def one_hot(states: NDArray[np.integer], vocabulary: int) -> NDArray[np.float32]:
    """[B, window] ids up to `vocabulary`, the padding, to [B, window (vocabulary + 1)]."""
    return np.eye(vocabulary + 1, dtype=np.float32)[states].reshape(len(states), -1)


def policy_of(config: RLlibConfig, algorithm: "Algorithm", greedy: bool = False) -> Policy:
    """What the algorithm has learnt to do, without exploration: DQN's policy is always `greedy`."""
    module: Any = algorithm.get_module()
    of_actor = isinstance(config.algorithm, PPO)

    def probabilities(states: NDArray[np.integer]) -> Tensor:
        batch = {"obs": torch.from_numpy(one_hot(states, config.environment.nodes))}
        if of_actor:
            scores = module.forward_inference(batch)["action_dist_inputs"]
        else:
            scores = module.compute_q_values(batch)["qf_preds"]
        if greedy or not of_actor:
            return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).double()
        return scores.double().softmax(-1)

    return probabilities


@torch.no_grad()
def examined(policy: Policy, config: RLlibConfig, edges: Edges, samples: int, seed: int) -> dict[str, float]:
    """Means over `samples` walks from every start: `optimality`; `kl` to the reference, nats a walk, from the
    cross-entropy of the tokens taken less the entropy of the states gone through; `tokens`."""
    starts = config.environment.nodes - 1
    walkers = [walks(edges, config.environment.longest) for _ in range(starts * samples)]
    states = np.stack([walker.reset(options={"prompt": row % starts})[0] for row, walker in enumerate(walkers)])
    random = torch.Generator().manual_seed(seed)
    going, optimality, kl = np.arange(len(walkers)), np.zeros(len(walkers)), np.zeros(len(walkers))
    while len(going):
        probabilities = policy(states[going])
        kl[going] += torch.special.xlogy(probabilities, probabilities).sum(-1).numpy()
        chosen = torch.multinomial(probabilities, 1, generator=random)[:, 0].numpy()
        left = []
        for row, token in zip(going, chosen, strict=True):
            states[row], _, terminated, truncated, info = walkers[row].step(token)
            if terminated or truncated:
                optimality[row] = info["score"]
                kl[row] += info["cross_entropy"]
            else:
                left.append(row)
        going = np.array(left, np.int64)
    lengths = [len(walker.answer) for walker in walkers]
    return {"optimality": float(optimality.mean()), "kl": float(kl.mean()), "answer_tokens": float(np.mean(lengths))}


def save(config: RLlibConfig, algorithm: "Algorithm", tracker: Tracker, updates: int, name: str = "") -> str:
    """A checkpoint after `updates` updates; its `policy` is what RLlib's `RLModule.from_checkpoint` reads."""
    module: Any = algorithm.get_module()

    def write(folder: Path) -> None:
        module.save_to_path(folder / "policy")

    place = checkpoints.write(
        tracker.folder.checkpoints,
        name or f"update_{updates:06d}",
        write,
        {"updates": updates},
        config.checkpoint.keep,
        sum(weight.nbytes for weight in module.parameters()),
    )
    return str(place / "policy")


@contextmanager
def _built(config: RLlibConfig, edges: Edges) -> Iterator["Algorithm"]:
    """RLlib's algorithm; it and the folder that it makes in the person's home are gone afterwards."""
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # or it tells what its newest defaults are
    algorithm = _settings(config, edges).build_algo()
    try:
        yield algorithm
    finally:
        algorithm.stop()
        shutil.rmtree(Path(algorithm.logdir), ignore_errors=True)


def _settings(config: RLlibConfig, edges: Edges) -> "AlgorithmConfig":
    """Sampling and learning in this process: for networks of this size any other would cost more than it saves."""
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    told = config.environment
    activation = "tanh" if isinstance(config.algorithm, PPO) else "relu"  # with tanh Q goes astray for half of a run
    network = DefaultModelConfig(fcnet_hiddens=HIDDEN, fcnet_activation=activation, vf_share_layers=False)
    return (
        (_ppo(config, config.algorithm) if isinstance(config.algorithm, PPO) else _dqn(config, config.algorithm))
        .environment(Learnable, env_config={"edges": edges, "longest": told.longest, "beta": told.beta})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=ENVIRONMENTS)
        .learners(num_learners=0, num_gpus_per_learner=0)
        .rl_module(model_config=network)
        .debugging(seed=config.seed, log_level="ERROR")
    )


def _ppo(config: RLlibConfig, told: PPO) -> "AlgorithmConfig":
    from ray.rllib.algorithms.ppo import PPOConfig

    return PPOConfig().training(
        lr=told.learning_rate,
        gamma=told.gamma,
        lambda_=told.gae_lambda,
        clip_param=told.clip_ratio,
        num_epochs=told.epochs,
        train_batch_size_per_learner=config.tokens_per_update,
        minibatch_size=config.tokens_per_update // told.minibatches,
        entropy_coeff=told.entropy_bonus,
        use_kl_loss=False,  # to the policy before the update, which is not the reference
        grad_clip=1.0,
    )


def _dqn(config: RLlibConfig, told: DQN) -> "AlgorithmConfig":
    from ray.rllib.algorithms.dqn import DQNConfig

    explored = max(1, int(told.exploration_share * config.updates * config.tokens_per_update))
    return (
        DQNConfig()
        .training(
            lr=told.learning_rate,
            gamma=told.gamma,
            train_batch_size_per_learner=told.transitions_per_step,
            epsilon=[(0, 1.0), (explored, LAST_EPSILON)],
            target_network_update_freq=told.sync_every,
            num_steps_sampled_before_learning_starts=BEFORE_LEARNING,
            replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": REPLAYED},
            double_q=True,
            dueling=True,
            grad_clip=10.0,
        )
        .reporting(min_sample_timesteps_per_iteration=config.tokens_per_update)
    )
