import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.errors import ConfigError, StopRequested
from rlhf_ray.telemetry import tracker as tracker_module
from rlhf_ray.telemetry import wandb_client
from rlhf_ray.telemetry.tracker import Tracker


class Recorder:
    """Stands in for WandbClient and remembers what it was told."""

    def __init__(self, *made_with: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values()))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(tracker_module, "WandbClient", lambda *made_with: recorder)
    return recorder


def test_what_is_logged_lands_in_the_folder(config_of: Any) -> None:
    with Tracker(config_of(), "sft") as tracker:
        tracker.log(0, {"sft/loss": np.float32(0.5), "sft/tokens": 12})  # type: ignore[dict-item]
        tracker.samples(0, [{"prompt": "p", "response": "r", "score": float("nan"), "kl": 0.1}])
        tracker.summary({"loss_last": 0.5})
    [row] = [json.loads(line) for line in tracker.folder.metrics.read_text().splitlines()]
    assert (row["sft/loss"], row["sft/tokens"]) == (0.5, 12)
    [sample] = [json.loads(line) for line in tracker.folder.samples.read_text().splitlines()]
    assert sample == {"update": 0, "prompt": "p", "response": "r", "score": None, "kl": 0.1}
    assert json.loads(tracker.folder.summary.read_text()) == {"loss_last": 0.5}
    assert not tracker.folder.wandb.exists()


def test_a_metric_that_is_not_catalogued_is_refused_and_not_written(config_of: Any) -> None:
    with Tracker(config_of(), "sft") as tracker, pytest.raises(ValueError, match="'loss' is not in"):
        tracker.log(0, {"loss": 1.0})
    assert tracker.folder.metrics.read_text() == ""


@pytest.mark.parametrize(
    ("error", "title", "level"),
    [
        (ValueError("odd key abcdefghijk"), "sft 'a-run' failed", "ERROR"),
        (StopRequested("saved"), "sft 'a-run' was stopped", "WARN"),
        (KeyboardInterrupt(), "sft 'a-run' was stopped", "WARN"),
    ],
)
def test_an_error_that_leaves_the_run_is_told_and_goes_on(
    config_of: Any, told: Recorder, error: BaseException, title: str, level: str
) -> None:
    with pytest.raises(type(error)), Tracker(config_of("offline"), "sft"):
        raise error
    alert, close = told.calls
    assert alert == ("alert", title, f"{type(error).__name__}: {error}", level)
    assert close == ("close", 1)


def test_a_run_that_ends_well_alerts_nobody(config_of: Any, told: Recorder) -> None:
    with Tracker(config_of("offline"), "sft"):
        pass
    assert told.calls == [("close", 0)]


def test_an_alert_reaches_the_person_also_without_wandb(config_of: Any, capsys: pytest.CaptureFixture) -> None:
    with Tracker(config_of(), "sft") as tracker:
        tracker.alert("KL is high", "40 nats")
    assert "KL is high: 40 nats" in capsys.readouterr().err


def test_an_error_closes_the_folder_for_the_next_run(config_of: Any) -> None:
    with pytest.raises(RuntimeError), Tracker(config_of(), "sft"):
        raise RuntimeError
    with Tracker(config_of(), "sft") as tracker:
        tracker.log(0, {"sft/loss": 1.0})
    with pytest.raises(ConfigError, match="already holds a run"):
        Tracker(config_of(), "sft")


def test_auto_is_offline_without_a_key() -> None:
    assert wandb_client.mode("auto") == "offline"


def test_auto_is_online_with_a_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_client.mode("auto") == "online"


def test_auto_is_online_with_a_key_for_the_server_in_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine wandb.example login user password kkkk\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_client.mode("auto") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert wandb_client.mode("auto") == "online"


def test_auto_follows_wandbs_own_mode_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for said, meant in {"disabled": "off", "offline": "offline", "online": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", said)
        assert wandb_client.mode("auto") == meant
    assert wandb_client.mode("off") == "off"
