"""What several rooms' tests share: tiny models as folders, one Ray for the whole session."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hypothesis import settings

# Torch's first calls are slow, and so is a loaded machine: time says nothing about what properties are tested of.
settings.register_profile("timeless", deadline=None)
settings.load_profile("timeless")

# Ray keeps the first token that a process uses: the local Ray of one test and the head node of another have to agree.
TOKEN = Path(tempfile.mkdtemp(prefix="rlhf-ray-tests-")) / "token"
TOKEN.write_text("a" * 64)
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(TOKEN)}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray as the stages start it, with four cores by its own count so that two ranks fit on any machine."""
    from rlhf_ray.runtime import session

    with session.connect(cpus=4):
        yield


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny causal language model whose head is its own."""
    return tiny.write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def tied_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with the embedding as its head."""
    return tiny.write_policy(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub within reach and nothing in its cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
