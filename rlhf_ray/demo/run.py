"""The whole of RLHF on a small made-up world: base model, SFT, reward model, PPO, and what came of it by gold.

Every stage is the one that a cluster runs, with the YAML of `configs/demo`; only the base model and the
evaluation are the demo's own. Nothing is hard-coded: the numbers are what training gives.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.load import load
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.config.supervised import RewardConfig, SFTConfig
from rlhf_ray.demo.memory import PeakMemory
from rlhf_ray.demo.world import World
from rlhf_ray.telemetry.progress import say
from rlhf_ray.telemetry.run_folder import write_atomically

if TYPE_CHECKING:
    from rlhf_ray.demo.report import Evaluated

CONFIGS = Path(__file__).resolve().parents[2] / "configs/demo"
HELD_OUT_PAIRS = 400
C = TypeVar("C", bound=StageConfig)


def run(seed: int = 0, output_dir: Path = Path("runs")) -> dict[str, Any]:
    """Runs everything into `<output_dir>/demo`; an earlier demo there is moved aside. Returns the summary."""
    from rlhf_ray.runtime import session

    folder = _fresh(output_dir.absolute() / "demo")
    seconds: dict[str, float] = {}
    start = time.monotonic()
    with PeakMemory() as memory, session.connect():
        world = World(seed)
        base, sft, reward = prepare(folder, world, seed, seconds)
        with _timed(seconds, "ppo"):
            ppo = optimise("ppo", folder, seed, sft["model"], reward["model"])
        with _timed(seconds, "evaluate"):
            evaluated = evaluate(folder / "ppo", world, seed, sft["model"], reward["model"])
    seconds["total"] = time.monotonic() - start
    summary = {
        "seed": seed,
        "base_model": {name: base[name] for name in ("loss_first", "loss_last", "parameters")},
        "sft": {"loss_first": sft["loss_first"], "loss_last": sft["loss_last"]},
        "reward_model": evaluated.accuracy,
        "ppo": {
            **evaluated.before_and_after(),
            **{name: ppo[name] for name in ("kl", "logprob_gap_max", "updates", "tokens", "tokens_per_s")},
        },
        "seconds": seconds,
        "peak_rss_bytes": memory.peak_bytes,
    }
    from rlhf_ray.demo.report import show, summary_text

    write_atomically(folder / "summary.json", summary_text(summary))
    show(summary, evaluated, folder)
    return summary


def prepare(folder: Path, world: World, seed: int, seconds: dict[str, float]) -> tuple[dict[str, Any], ...]:
    """What policy optimisation starts from, below `folder`: summaries of base model, SFT and reward model."""
    with _timed(seconds, "base_model"):
        world.write(folder / "world")
        base = _train_base(folder / "base", world, seed)
    with _timed(seconds, "sft"):
        sft = _sft(folder, seed)
    with _timed(seconds, "reward"):
        reward = _reward(folder, seed, sft["model"])
    return base, sft, reward


def optimise(algorithm: str, folder: Path, seed: int, policy: str, reward: str) -> dict[str, Any]:
    """One run of `configs/demo/<algorithm>.yaml` into `<folder>/<algorithm>`; its summary."""
    from rlhf_ray.stages import ppo

    models: dict[str, Any] = {"policy": policy, "reward.model": reward}
    return ppo.run(_config(PPOConfig, algorithm, folder, seed, data=folder / "world/prompts_train.jsonl", **models))


def evaluate(run: Path, world: World, seed: int, sft: str, reward: str) -> "Evaluated":
    """Gold and proxy of the run's start and checkpoints, on prompts that nobody trained on."""
    from rlhf_ray.demo.report import evaluate as measure

    prompts = [row["prompt"] for row in world.prompts(384, "held_out")]
    return measure(run, sft, reward, prompts, _held_out_pairs(world), seed)


def _train_base(folder: Path, world: World, seed: int) -> dict[str, float]:
    from rlhf_ray.demo.base_model import USUAL, train_base
    from rlhf_ray.telemetry.progress import progress

    with progress(USUAL.steps, "base model") as bar:
        return train_base(folder, world, seed, log=lambda step, loss: bar.advance(loss=loss))


def _sft(folder: Path, seed: int) -> dict[str, Any]:
    from rlhf_ray.stages import sft

    return sft.run(_config(SFTConfig, "sft", folder, seed, model=folder / "base", data=folder / "world/sft.jsonl"))


def _reward(folder: Path, seed: int, model: str) -> dict[str, Any]:
    from rlhf_ray.stages import reward

    data = folder / "world/preferences.jsonl"
    return reward.run(_config(RewardConfig, "reward", folder, seed, model=model, data=data))


def _held_out_pairs(world: World) -> list[dict[str, Any]]:
    from rlhf_ray.demo.people import preference_rows

    return preference_rows(world, HELD_OUT_PAIRS, "held_out")


def _config(kind: type[C], stage: str, folder: Path, seed: int, data: Path, **values: Any) -> C:
    """The stage's demo configuration with this run's places in it."""
    places = {"output_dir": folder, "seed": seed, "data.path": data, **values}
    return load(kind, CONFIGS / f"{stage}.yaml", [f"{key}={value}" for key, value in places.items()])


def _fresh(folder: Path) -> Path:
    """An empty folder; what was there before gets the first free number."""
    if folder.exists():
        number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}-{n}").exists())
        aside = folder.with_name(f"{folder.name}-{number}")
        folder.rename(aside)
        say(f"the earlier demo is now in {aside}")
    folder.mkdir(parents=True)
    return folder


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
