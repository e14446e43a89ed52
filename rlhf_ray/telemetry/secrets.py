"""Secrets are masked where text leaves the process: run files, warnings, alerts, what W&B is told.

A secret is the value of an environment variable whose name says so, or the credentials inside a URL. Masking is the
second line of defence; the first is that no secret is a configuration key, and none is put on a command line.
"""

import os
import re
from typing import Any

MASK = "<redacted>"

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_|$)")
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST = 8
"""Shorter values are left alone: masking every `1` or `true` would shred the text."""


def redact(text: str) -> str:
    """`text` with every secret in it replaced by `MASK`."""
    for secret in _secrets():
        text = text.replace(secret, MASK)
    return _URL_CREDENTIALS.sub(MASK, text)


def redact_values(tree: Any) -> Any:
    """`redact` on every string value in nested dicts and lists; keys and other values as they are."""
    if isinstance(tree, dict):
        return {key: redact_values(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_values(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def _secrets() -> list[str]:
    """Longest first, so that a secret which contains another is masked whole."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)
