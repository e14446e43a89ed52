"""The same mathematics once more: slow, obvious, in Python floats over lists, and without a tensor anywhere.

Each function is the definition as its paper writes it, term by term, and shares nothing with the code it is compared
to: no scan, no algebra to save work, no helper of the package. Ragged batches are flat lists and a list of offsets.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

Floats = Sequence[float]
Ints = Sequence[int]


def spans(offsets: Ints) -> list[range]:
    """The places of each sequence's tokens."""
    return [range(begin, end) for begin, end in pairwise(offsets)]


# Statistics


def whiten(x: Floats, keep_mean: bool) -> list[float]:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((value - mean) ** 2 for value in x) / len(x)
    return [(value - mean) / math.sqrt(variance + 1e-8) + (mean if keep_mean else 0) for value in x]


def sequence_sums(x: Floats, offsets: Ints) -> list[float]:
    return [math.fsum(x[place] for place in span) for span in spans(offsets)]


def sequence_means(x: Floats, offsets: Ints) -> list[float]:
    return [math.fsum(x[place] for place in span) / len(span) if span else math.nan for span in spans(offsets)]


# Rewards and advantages


def token_rewards(kl: Floats, scores: Floats, offsets: Ints, beta: float) -> list[float]:
    rewards = []
    for span, score in zip(spans(offsets), scores, strict=True):
        for place in span:
            rewards.append(-beta * kl[place] + (score if place == span[-1] else 0))
    return rewards


def gae(
    rewards: Floats, values: Floats, offsets: Ints, gamma: float, lam: float, mask: Sequence[bool]
) -> tuple[list[float], list[float]]:
    """A_t = sum_l (gamma lambda)^l delta_{t + l} over the policy's own tokens, written out for each of them."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for span in spans(offsets):
        own = [place for place in span if mask[place]]
        earned = []
        for number, place in enumerate(own):
            until = own[number + 1] if number + 1 < len(own) else span.stop
            earned.append(sum(rewards[place:until]))
        following = [values[place] for place in own[1:]] + [0.0]
        for number, place in enumerate(own):
            for later in range(number, len(own)):
                delta = earned[later] + gamma * following[later] - values[own[later]]
                advantages[place] += (gamma * lam) ** (later - number) * delta
            returns[place] = advantages[place] + values[place]
    return advantages, returns


def rewards_to_go(rewards: Floats, offsets: Ints, gamma: float, mask: Sequence[bool]) -> list[float]:
    result = [0.0] * len(rewards)
    for span in spans(offsets):
        for place in span:
            if mask[place]:
                for later in range(place, span.stop):
                    own_between = sum(mask[place + 1 : later + 1])
                    result[place] += gamma**own_between * rewards[later]
    return result


def group(returns: Floats, groups: Ints, scale: bool) -> list[float]:
    result = []
    for own, name in zip(returns, groups, strict=True):
        members = [value for value, other in zip(returns, groups, strict=True) if other == name]
        mean = math.fsum(members) / len(members)
        squares = math.fsum((value - mean) ** 2 for value in members)
        sd = math.sqrt(squares / (len(members) - 1)) if len(members) > 1 else 0.0
        result.append((own - mean) / (sd + 1e-6) if scale else own - mean)
    return result


def leave_one_out(returns: Floats, groups: Ints) -> list[float]:
    result = []
    for number, (own, name) in enumerate(zip(returns, groups, strict=True)):
        others = [returns[other] for other in range(len(returns)) if groups[other] == name and other != number]
        result.append(own - math.fsum(others) / len(others))
    return result


# Losses


def token_log_ratio(logp: Floats, old: Floats, offsets: Ints) -> list[float]:
    return [new - before for new, before in zip(logp, old, strict=True)]


def sequence_log_ratio(logp: Floats, old: Floats, offsets: Ints) -> list[float]:
    """log (pi(y) / pi_old(y))^(1 / |y|)"""
    result = []
    for span in spans(offsets):
        for _ in span:
            likelihood = math.fsum(logp[place] for place in span) - math.fsum(old[place] for place in span)
            result.append(likelihood / len(span))
    return result


def clipped(
    log_ratio: float, advantage: float, low: float, high: float, dual: float | None
) -> tuple[float, float, bool, float, float]:
    """Loss, ratio, clipped, approximate KL, and the loss's derivative in the log ratio, of one token."""
    ratio = math.exp(log_ratio)
    free = ratio * advantage
    bound = min(max(ratio, 1 - low), 1 + high) * advantage
    surrogate = min(free, bound)
    if dual is not None and advantage < 0:
        surrogate = max(surrogate, dual * advantage)
    is_clipped = surrogate != free
    return -surrogate, ratio, is_clipped, ratio - 1 - log_ratio, 0.0 if is_clipped else -free


def clipped_value(value: float, old: float, target: float, clip: float) -> tuple[float, bool]:
    bound = min(max(value, old - clip), old + clip)
    free, held = (value - target) ** 2, (bound - target) ** 2
    return max(free, held) / 2, held > free


def aggregate(losses: Floats, offsets: Ints, kind: str, longest: int) -> float:
    """A minibatch's loss as a mean of means, from the losses of its tokens."""
    answers = [[losses[place] for place in span] for span in spans(offsets) if span]
    if not answers:
        return 0.0
    if kind == "token_mean":
        tokens = [loss for answer in answers for loss in answer]
        return math.fsum(tokens) / len(tokens)
    if kind == "sequence_mean":
        return math.fsum(math.fsum(answer) / len(answer) for answer in answers) / len(answers)
    assert kind == "constant"
    return math.fsum(math.fsum(answer) / longest for answer in answers) / len(answers)


# Correction


def log_weights(learner: Floats, sampler: Floats, offsets: Ints, level: str) -> list[float]:
    result = []
    for span in spans(offsets):
        for place in span:
            differences = [learner[other] - sampler[other] for other in span]
            result.append(
                {
                    "token": learner[place] - sampler[place],
                    "sequence": math.fsum(differences),
                    "geometric": math.fsum(differences) / len(differences),
                }[level]
            )
    return result


def truncate(log_weight: float, cap: float) -> tuple[float, bool]:
    weight = math.exp(log_weight)
    return (cap, True) if weight > cap else (weight, False)


def mask(log_weight: float, low: float, high: float) -> tuple[float, bool]:
    weight = math.exp(log_weight)
    return (weight, False) if low <= weight <= high else (0.0, True)


def effective_sample_share(weights: Floats) -> float:
    squares = math.fsum(weight**2 for weight in weights)
    return math.fsum(weights) ** 2 / (len(weights) * squares) if squares else 0.0


def gap(learner: Floats, sampler: Floats) -> tuple[float, float, float]:
    apart = sorted(abs(one - other) for one, other in zip(learner, sampler, strict=True))
    enough = [value for number, value in enumerate(apart, 1) if 100 * number >= 99 * len(apart)]
    return math.fsum(apart) / len(apart), enough[0], apart[-1]


# Preferences


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bradley_terry(chosen: float, rejected: float, p: float, margin: float, centre: float) -> float:
    d = chosen - rejected - margin
    return -(p * math.log(sigmoid(d)) + (1 - p) * math.log(sigmoid(-d))) + centre * (chosen + rejected) ** 2


def accuracy(probabilities: Floats, labels: Floats) -> float:
    points = []
    for probability, label in zip(probabilities, labels, strict=True):
        tie = probability == 0.5 or label == 0.5
        points.append(0.5 if tie else float((probability > 0.5) == (label > 0.5)))
    return math.fsum(points) / len(points)


def brier(probabilities: Floats, labels: Floats) -> float:
    squares = [(probability - label) ** 2 for probability, label in zip(probabilities, labels, strict=True)]
    return math.fsum(squares) / len(squares)


def expected_calibration_error(probabilities: Floats, labels: Floats, bins: int) -> float:
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for probability, label in zip(probabilities, labels, strict=True):
        confidence = max(probability, 1 - probability)
        agreement = 0.5 if probability == 0.5 else label if probability > 0.5 else 1 - label
        place = min(bins - 1, math.floor((confidence - 0.5) / 0.5 * bins))
        members[place].append((confidence, agreement))
    error = 0.0
    for pairs in filter(None, members):
        confidence = math.fsum(confidence for confidence, _ in pairs) / len(pairs)
        agreement = math.fsum(agreement for _, agreement in pairs) / len(pairs)
        error += len(pairs) / len(probabilities) * abs(confidence - agreement)
    return error


# Implicit Q-learning


def q_learning(
    rewards: Floats,
    values: Floats,
    logprobs: Floats,
    q1: Floats,
    q2: Floats,
    target_q: Floats,
    offsets: Ints,
    gamma: float,
    tau: float,
    beta: float,
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Of each token: y, the loss of both Q, of V, and of the policy."""
    y, of_q, of_v, of_policy = [], [], [], []
    for span in spans(offsets):
        for place in span:
            ends = place == span[-1]
            target = rewards[place] + gamma * (0 if ends else values[place + 1])
            gap = target_q[place] - values[place]
            y.append(target)
            of_q.append((q1[place] - target) ** 2 + (q2[place] - target) ** 2)
            of_v.append(abs(tau - (1 if gap < 0 else 0)) * gap**2)
            of_policy.append(math.exp(beta * gap) * -logprobs[place])
    return y, of_q, of_v, of_policy


def expectile(x: Floats, weights: Floats, tau: float) -> float:
    """Where tau E[(x - m)+] = (1 - tau) E[(m - x)+], by bisection."""
    low, high = min(x), max(x)
    for _ in range(200):
        middle = (low + high) / 2
        above = sum(weight * max(value - middle, 0) for value, weight in zip(x, weights, strict=True))
        below = sum(weight * max(middle - value, 0) for value, weight in zip(x, weights, strict=True))
        low, high = (middle, high) if tau * above > (1 - tau) * below else (low, middle)
    return (low + high) / 2


Transitions = Sequence[Sequence[tuple[int, int, float]]]
"""Trajectories of (state, action, reward)."""
Values = dict[int, float]
ActionValues = dict[tuple[int, int], float]


def expectile_values(data: Transitions, gamma: float, tau: float) -> tuple[Values, ActionValues]:
    """V of states and Q of actions, each V the tau-expectile of Q over the data's actions there."""

    def value(actions: Sequence[float]) -> float:
        return expectile(actions, [1] * len(actions), tau)

    return _iterated(data, gamma, value)


def behaviour_values(data: Transitions, gamma: float) -> tuple[Values, ActionValues]:
    return _iterated(data, gamma, lambda actions: sum(actions) / len(actions))


def optimal_values(data: Transitions, gamma: float) -> tuple[Values, ActionValues]:
    """Of the best policy that takes no action which the data never take."""
    return _iterated(data, gamma, max)


def _iterated(data: Transitions, gamma: float, value: Callable[[list[float]], float]) -> tuple[Values, ActionValues]:
    """By value iteration; the model is what the data show, in which an action leads to one state or ends."""
    steps = []
    for trajectory in data:
        for (state, action, reward), after in zip(trajectory, [*trajectory[1:], None], strict=True):
            steps.append((state, action, reward, None if after is None else after[0]))
    v = {state: 0.0 for state, *_ in steps}
    for _ in range(300):
        q = {(s, a): r + gamma * (v[then] if then is not None else 0) for s, a, r, then in steps}
        v = {state: value([q[s, a] for s, a, *_ in steps if s == state]) for state in v}
    return v, q
