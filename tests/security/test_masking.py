"""A password in a reward's address, the one place of a configuration where somebody may put one, is shown nowhere."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import command_lines

from rlhf_ray import cli
from rlhf_ray.config.load import load
from rlhf_ray.config.ppo import PPOConfig
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.runtime.submit import submit
from rlhf_ray.telemetry.tracker import Tracker

PASSWORD = "hunter22hunter22"
URL = f"https://somebody:{PASSWORD}@rewards.example/score"
TOKEN = "reward-token-0123456789"


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(f"name: n\noutput_dir: {tmp_path / 'runs'}\npolicy: p\ndata: {{path: d}}\nreward: {{model: r}}\n")
    return file


@pytest.fixture
def fails(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command with the override and a stage that repeats the address in its error."""

    def stage(config: PPOConfig, address: str | None) -> None:
        raise RewardError(f"reward.url {config.reward.url}: no scores, though we showed {TOKEN}")

    def run(*more: str) -> int:
        monkeypatch.setitem(sys.modules, "rlhf_ray.stages.ppo", SimpleNamespace(run=stage))  # type: ignore[misc]
        line = ["rlhf-ray", "ppo", str(run_yaml), "reward.model=null", f"reward.url={URL}", *more]
        monkeypatch.setattr(sys, "argv", line)
        monkeypatch.setenv("RLHF_RAY_REWARD_TOKEN", TOKEN)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return run


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["reward.deadline_s=0"], ["reward.urll=x"]], ids=str)
def test_what_the_command_prints_holds_no_secret(
    fails: Any, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(*more)
    said = "".join(capsys.readouterr())
    assert said and PASSWORD not in said and TOKEN not in said


def test_an_error_keeps_what_is_no_secret(fails: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails() == 1
    said = "error: reward.url https://<redacted>@rewards.example/score: no scores, though we showed <redacted>\n"
    assert capsys.readouterr().err == said


def test_a_secret_in_an_override_is_not_submitted(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_RAY_REWARD_TOKEN", TOKEN)
    for override in (f"reward.url={URL}", f"name={TOKEN}"):
        with pytest.raises(ConfigError, match=r"<redacted>.*: holds a secret, .* environment of the nodes") as refused:
            submit(run_yaml, "ppo", [override], "http://127.0.0.1:9", run_yaml.parent)
        assert PASSWORD not in str(refused.value) and TOKEN not in str(refused.value)


@pytest.mark.real
def test_neither_the_run_folder_nor_wandb_nor_a_command_line_shows_it(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_RAY_REWARD_TOKEN", TOKEN)
    config = load(PPOConfig, run_yaml, ["reward.model=null", f"reward.url={URL}", "telemetry.wandb=offline"])
    with pytest.raises(RewardError), Tracker(config, "ppo") as tracker:
        tracker.summary({"reward": URL, "token": TOKEN})
        lines = command_lines()
        raise RewardError(f"reward.url {URL}: HTTP 401: {TOKEN}")
    assert any("wandb" in line for line in lines)
    assert [line for line in lines if PASSWORD in line or TOKEN in line] == []
    files = [path for path in tracker.folder.path.rglob("*") if path.is_file()]
    assert {"config.yaml", "summary.json"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if any(secret.encode() in path.read_bytes() for secret in (PASSWORD, TOKEN))] == []
