"""Answering as a Markov decision process: a state is what is written so far, an action the next token.

What is paid is the answer's score, at its last token, and at every token a price for straying from a reference. The
price of the objective is beta KL(pi || ref), and an environment never sees pi. But at every state

    KL(pi || ref) = -H(pi) - sum_a pi(a) log ref(a)

so that the KL-regularised return (Ziegler et al. 2019, equation 2) is

    E[score - beta sum_t KL(pi(.|s_t) || ref(.|s_t))]
        = E[score + beta sum_t log ref(a_t|s_t)] + beta E[sum_t H(pi(.|s_t))]

The first term is paid here. The second is the learner's, who knows pi: a bonus on entropy. A deterministic policy has
none, and its return here is the whole. A log-probability of the policy is never made up, such as a uniform one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from rlhf_ray.environments import random_walks
from rlhf_ray.environments.random_walks import GOAL, Edges

Ids = Sequence[int]
Score = Callable[[Ids, Ids], float]
"""Of a prompt and an answer."""
Reference = Callable[[Ids, Ids], NDArray[np.float64]]
"""[V] log-probabilities of the token after a prompt and an answer so far; all finite, or there is an infinite price."""


class TokenMDP(gymnasium.Env[NDArray[np.integer], np.int64]):
    """Observations are the last `window` ids of prompt and answer, [window], oldest first, the id `vocabulary` where
    there are none yet. Actions are ids below `vocabulary`.

    An episode is one prompt, drawn evenly, and one answer. It is terminated when `ends` says so of prompt and answer
    (at EOS, say), and truncated when the answer has `longest` tokens and has not ended. Either way the answer is scored
    as it stands and nothing follows: a learner that adds the value of a state beyond a truncation pays twice.

    `info` of the last step has the `score` and the `cross_entropy`, -sum_t log ref(a_t|s_t), in nats; the return is
    score - beta cross_entropy.
    """

    def __init__(
        self,
        prompts: Sequence[Ids],
        score: Score,
        ends: Callable[[Ids, Ids], bool],
        vocabulary: int,
        longest: int,
        window: int,
        reference: Reference | None = None,
        beta: float = 0.0,
    ) -> None:
        """Raises ValueError when `beta` is a price without a `reference` to stray from."""
        if beta and reference is None:
            raise ValueError(f"beta is {beta:g}, but there is no reference; give one, or beta 0")
        self.prompts, self.score, self.ends = prompts, score, ends
        self.longest, self.window = longest, window
        self.reference, self.beta = reference, beta
        self.padding = vocabulary
        self.observation_space = gymnasium.spaces.MultiDiscrete([vocabulary + 1] * window)
        self.action_space = gymnasium.spaces.Discrete(vocabulary)
        self.prompt: list[int] = []
        self.answer: list[int] = []
        self.cross_entropy = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """`options` may name the `prompt`, by its number."""
        super().reset(seed=seed)
        number = (options or {}).get("prompt", self.np_random.integers(len(self.prompts)))
        self.prompt, self.answer, self.cross_entropy = list(self.prompts[number]), [], 0.0
        return self.state(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.int64], float, bool, bool, dict[str, Any]]:
        token, reward, info = int(action), 0.0, {}
        if self.reference is not None:
            price = -float(self.reference(self.prompt, self.answer)[token])
            self.cross_entropy += price
            reward -= self.beta * price
        self.answer.append(token)
        terminated = self.ends(self.prompt, self.answer)
        truncated = not terminated and len(self.answer) == self.longest
        if terminated or truncated:
            info = {"score": self.score(self.prompt, self.answer), "cross_entropy": self.cross_entropy}
            reward += info["score"]
        return self.state(), reward, terminated, truncated, info

    def state(self) -> NDArray[np.int64]:
        """[window]"""
        ids = [*self.prompt, *self.answer][-self.window :]
        return np.array([self.padding] * (self.window - len(ids)) + ids, np.int64)


def walks(edges: Edges, longest: int, beta: float = 0.0) -> TokenMDP:
    """Walks from every node but the goal; a token is the node gone to, and the score a walk's optimality.

    A walk ends at the goal, and where there is no edge, from where nothing can come any more. The state shows the whole
    walk, start included, of which its optimality is a function. The reference knows nothing: all nodes are alike to it.
    """
    nodes = len(edges)
    uniform = np.full(nodes, -np.log(nodes))

    def ends(prompt: Ids, answer: Ids) -> bool:
        before = answer[-2] if len(answer) > 1 else prompt[-1]
        return answer[-1] == GOAL or not edges[before, answer[-1]]

    return TokenMDP(
        prompts=[[start] for start in range(nodes) if start != GOAL],
        score=lambda prompt, answer: random_walks.optimality(edges, prompt[-1], answer),
        ends=ends,
        vocabulary=nodes,
        longest=longest,
        window=1 + longest,
        reference=lambda prompt, answer: uniform,
        beta=beta,
    )
