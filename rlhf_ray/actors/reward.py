"""Where scores come from: reward models, Python functions, servers, by weights of their own. A score is never made up.

Whatever goes wrong (an exception, a wrong number of values, a value that is not finite, a server that does not answer
in time) is a RewardError that says what was asked and what came back.
"""

import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlhf_ray.config.rewards import Combination, RewardPart, RewardSection, Uncertainty, Worst
from rlhf_ray.errors import RewardError
from rlhf_ray.records import Trajectories
from rlhf_ray.telemetry.secrets import bearer, redact

if TYPE_CHECKING:
    import httpx

    from rlhf_ray.models.device import Device

TOKEN = "RLHF_RAY_REWARD_TOKEN"
"""Environment variable of what a reward server asks for as a bearer token; no configuration key, no file has it."""

ScoreText = Callable[[list[str], list[str]], Sequence[float]]


class Reward(Protocol):
    """A source of scores."""

    def scores(self, trajectories: Trajectories) -> np.ndarray:
        """[B] float32, all finite."""
        ...


class Rewards:
    """The role: all sources, one after the other."""

    def __init__(
        self, reward: RewardSection, tokens_per_pass: int, device: "Device", tokenizer: str, trust_remote_code: bool
    ) -> None:
        models = (tokens_per_pass, device, trust_remote_code)
        texts = (tokenizer, trust_remote_code)
        self.sources = [_source(source, models, texts) for source in reward.sources.values()]
        self.weights = [source.weight for source in reward.sources.values()]
        self.with_parts = bool(reward.parts)

    def scores(self, trajectories: Trajectories) -> np.ndarray:
        """[B, 1 + D] float32: the score, then the columns that `RewardSection.details` names."""
        parts, disagreements = [], []
        for source in self.sources:
            if isinstance(source, RewardEnsemble):
                scores, apart = source.scores(trajectories)
                disagreements.append(apart)
            else:
                scores = source.scores(trajectories)
            parts.append(scores)
        whole = np.stack(parts, 1).astype(np.float64) @ self.weights
        return np.stack([whole, *(parts if self.with_parts else []), *disagreements], 1).astype(np.float32)


def _source(source: RewardPart, models: tuple[Any, ...], texts: tuple[Any, ...]) -> "Reward | RewardEnsemble":
    if source.model is not None:
        return RewardModel(source.model, *models)
    if source.ensemble is not None and source.disagrees:
        return RewardEnsemble(source.ensemble.models, source.ensemble.combine, *models)
    if source.ensemble is not None:
        return AveragedRewardModel(source.ensemble.models, *models)
    if source.function is not None:
        return RewardFunction(source.function, source.deadline_s, *texts)
    assert source.url is not None
    return RewardServer(source.url, source.deadline_s, *texts)


class RewardModel:
    """A sequence classifier read at the last real token, normalised by the mean and deviation kept with it."""

    def __init__(self, path: str, tokens_per_pass: int, device: "Device", trust_remote_code: bool) -> None:
        from rlhf_ray.models import load
        from rlhf_ray.models.device import torch_devices

        model = load.classifier(path, device, trust_remote_code, torch_devices(device))
        self.path = path
        self._read(model, *load.score_normalisation(model.config), tokens_per_pass, device)

    def _read(self, model: Any, mean: float, sd: float, tokens_per_pass: int, device: "Device") -> None:
        from rlhf_ray.models import heads
        from rlhf_ray.models.device import torch_device

        self.mean, self.sd, self.tokens_per_pass = mean, sd, tokens_per_pass
        self.device = torch_device(device)
        self.model = heads.Scores(model).eval()
        self.model.requires_grad_(False)

    def scores(self, trajectories: Trajectories) -> np.ndarray:
        import torch

        from rlhf_ray.actors.scoring import packs_of

        result = np.empty(len(trajectories), dtype=np.float32)
        with torch.inference_mode():
            for rows, packed in packs_of(trajectories, self.tokens_per_pass, self.device):
                result[rows] = self.model(packed).cpu().numpy()
        return checked((result - self.mean) / self.sd, len(trajectories), f"reward.model {self.path}")


class AveragedRewardModel(RewardModel):
    """Members that became one model."""

    def __init__(self, paths: Sequence[str], tokens_per_pass: int, device: "Device", trust_remote_code: bool) -> None:
        from rlhf_ray.models.averaging import averaged_classifier

        self.path = f"averaged of {', '.join(paths)}"
        model, offset = averaged_classifier(paths, device, trust_remote_code)
        self._read(model, offset, 1.0, tokens_per_pass, device)


class RewardEnsemble:
    """Members that each score every answer."""

    def __init__(
        self,
        paths: Sequence[str],
        combine: Combination,
        tokens_per_pass: int,
        device: "Device",
        trust_remote_code: bool,
    ) -> None:
        self.members = [RewardModel(path, tokens_per_pass, device, trust_remote_code) for path in paths]
        self.combine = combine

    def scores(self, trajectories: Trajectories) -> tuple[np.ndarray, np.ndarray]:
        """[B] scores, and [B] standard deviation over members. float32."""
        import torch

        from rlhf_ray.algorithms import ensembles

        scores = torch.from_numpy(np.stack([member.scores(trajectories) for member in self.members]))
        match self.combine:
            case Worst():
                combined = ensembles.worst(scores)
            case Uncertainty(coefficient=coefficient):
                combined = ensembles.uncertainty(scores, coefficient)
            case _:
                combined = ensembles.mean(scores)
        return combined.numpy(), ensembles.disagreement(scores).numpy()


class TextReward:
    """A reward that reads text: ids are decoded here and nowhere else on the way."""

    def __init__(self, score: ScoreText, name: str, tokenizer: str, trust_remote_code: bool) -> None:
        from rlhf_ray.models import load

        self.score = score
        self.name = name
        self.tokenizer = load.tokenizer(tokenizer, "policy", trust_remote_code)

    def scores(self, trajectories: Trajectories) -> np.ndarray:
        rows = range(len(trajectories))
        prompts = [trajectories.prompt(row) for row in rows]
        responses = [trajectories.responses[row] for row in rows]
        texts = [self.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, responses)]
        return checked(self.score(*texts), len(trajectories), self.name)


class RewardFunction(TextReward):
    """The role for `reward.function`."""

    def __init__(self, path: str, deadline_s: float, tokenizer: str, trust_remote_code: bool) -> None:
        name = f"reward.function {path}"
        super().__init__(_guarded(imported(path), name, deadline_s), name, tokenizer, trust_remote_code)


class RewardServer(TextReward):
    """The role for `reward.url`."""

    def __init__(self, url: str, deadline_s: float, tokenizer: str, trust_remote_code: bool) -> None:
        super().__init__(ServerScores(url, deadline_s), redact(f"reward.url {url}"), tokenizer, trust_remote_code)


def imported(path: str) -> ScoreText:
    """The function that `package.module:name` names. Raises RewardError when there is none."""
    module, colon, name = path.partition(":")
    if not colon:
        raise RewardError(f"reward.function '{path}': expected package.module:name")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise RewardError(
            f"reward.function '{path}': cannot import '{module}': {error}. Modules are looked for in the current "
            "directory and among installed packages"
        ) from None
    except Exception as error:
        raise RewardError(f"reward.function '{path}': '{module}' raised {type(error).__name__}: {error}") from error
    function = getattr(found, name, None)
    if function is None:
        raise RewardError(f"reward.function '{path}': module '{module}' has no '{name}'")
    if not callable(function):
        raise RewardError(f"reward.function '{path}': '{name}' is not callable")
    return function


class ServerScores:
    """POSTs {"prompts", "responses"} and expects {"scores"}. Retries what may pass (no connection, 429, 5xx) with
    growing pauses until the deadline; anything else is an error at once.

    Over https a server has to show a certificate of an authority that `SSL_CERT_FILE` (without: certifi) knows.
    ConfigError for a token that would travel in clear."""

    FIRST_PAUSE_S = 0.1
    LONGEST_PAUSE_S = 10.0

    def __init__(self, url: str, deadline_s: float) -> None:
        self.url = url
        self.deadline_s = deadline_s
        self.headers = bearer(TOKEN, url, redact(f"reward.url {url}"))

    def __call__(self, prompts: list[str], responses: list[str]) -> Sequence[float]:
        end = time.monotonic() + self.deadline_s
        pause, tries = self.FIRST_PAUSE_S, 0
        while True:
            tries += 1
            answer, fault = self._ask(prompts, responses, max(end - time.monotonic(), 0.01))
            if answer is not None:
                return answer
            if time.monotonic() + pause >= end:
                raise self._error(f"no scores in {self.deadline_s:g} s and {tries} tries; the last: {fault}")
            time.sleep(pause)
            pause = min(2 * pause, self.LONGEST_PAUSE_S)

    def _ask(self, prompts: list[str], responses: list[str], left_s: float) -> tuple[Sequence[float] | None, str]:
        """Scores, or what went wrong that may pass."""
        import httpx

        try:
            reply = httpx.post(
                self.url, json={"prompts": prompts, "responses": responses}, headers=self.headers, timeout=left_s
            )
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise self._error(
                    f"{error}. For an authority of your own, set SSL_CERT_FILE to its certificate"
                ) from None
            return None, f"{type(error).__name__}: {error}"
        except OSError as error:
            path = os.environ.get("SSL_CERT_FILE")
            raise self._error(f"certificates of SSL_CERT_FILE '{path}' cannot be read: {error}") from None
        if reply.status_code in (401, 403):
            found = "is refused" if self.headers else "is not set"
            raise self._error(f"the token, environment variable {TOKEN}, {found}: {_said(reply)}")
        if reply.status_code == 429 or reply.status_code >= 500:
            return None, f"HTTP {reply.status_code}"
        if reply.status_code != 200:
            raise self._error(_said(reply))
        try:
            return reply.json()["scores"], ""
        except (ValueError, KeyError, TypeError):
            raise self._error(f'expected {{"scores": [...]}}, got: {reply.text[:200]}') from None

    def _error(self, what: str) -> RewardError:
        return RewardError(redact(f"reward.url {self.url}: {what}"))


def _said(reply: "httpx.Response") -> str:
    return f"HTTP {reply.status_code}: {reply.text[:200]}"


def checked(scores: object, expected: int, name: str) -> np.ndarray:
    """[expected] float32. Raises RewardError for a wrong number of values or a value that is not finite."""
    try:
        values = [float(score) for score in scores]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise RewardError(f"{name}: expected a list of {expected} numbers, got {str(scores)[:200]}") from None
    if len(values) != expected:
        raise RewardError(f"{name}: expected {expected} scores, one for each answer, got {len(values)}")
    for place, value in enumerate(values):
        if not math.isfinite(value):
            raise RewardError(f"{name}: score {place} of {expected} is {value}; scores must be finite")
    return np.asarray(values, dtype=np.float32)


def _guarded(function: ScoreText, name: str, deadline_s: float) -> ScoreText:
    pool = ThreadPoolExecutor(1, thread_name_prefix="reward-function")

    def call(prompts: list[str], responses: list[str]) -> Sequence[float]:
        try:
            return pool.submit(function, prompts, responses).result(timeout=deadline_s)
        except FutureTimeout:
            raise RewardError(f"{name}: no scores within {deadline_s:g} s for {len(prompts)} answers") from None
        except Exception as error:
            raise RewardError(f"{name} raised {type(error).__name__}: {error}") from error

    return call
