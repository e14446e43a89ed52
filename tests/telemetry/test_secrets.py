from typing import Any

import pytest

from rlhf_ray.telemetry.secrets import MASK, redact, redact_values

SECRET = "s3cr3t-value-1234"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD", "APIKEY", "AWS_SECRET_ID"])
def test_values_of_variables_named_like_secrets_are_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redact(f"401 for key {SECRET}, twice {SECRET}") == f"401 for key {MASK}, twice {MASK}"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "HOME_DIR"])
def test_other_variables_are_not_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redact(f"value {SECRET}") == f"value {SECRET}"


def test_short_values_do_not_shred_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_TOKEN", "1")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    assert redact("update 11 of 100") == "update 11 of 100"


def test_a_secret_that_contains_another_is_masked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefgh-and-more")
    assert redact("abcdefgh-and-more") == MASK


def test_credentials_in_a_url_are_masked() -> None:
    assert redact("POST https://me:pw@host:80/score") == f"POST https://{MASK}@host:80/score"
    assert redact("mail me@host, see https://host/a@b") == "mail me@host, see https://host/a@b"


def test_only_values_of_a_tree_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "learning_rate")
    tree: dict[str, Any] = {"learning_rate": 1e-5, "notes": ["learning_rate", None, 3]}
    assert redact_values(tree) == {"learning_rate": 1e-5, "notes": [MASK, None, 3]}
