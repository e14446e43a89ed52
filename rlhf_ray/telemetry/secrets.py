"""Secrets are masked where text leaves the process: run files, errors, warnings, alerts, what W&B is told.

A secret is the value of an environment variable whose name says so, or the credentials inside a URL. Masking is the
second line of defence; the first is that no secret is a configuration key, none is put on a command line, and none is
sent to another machine where those on the way could read it.
"""

import os
import re
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from rlhf_ray.errors import ConfigError

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


def bearer(variable: str, url: str, place: str) -> dict[str, str]:
    """The header that carries the secret of an environment variable to the server at `url`; none where it is not set.

    `place` names the server in messages. Raises ConfigError for a secret that no header can carry, and for plain http
    to another machine.
    """
    secret = os.environ.get(variable, "")
    if not secret:
        return {}
    if not (secret.isascii() and secret.isprintable() and " " not in secret):
        raise ConfigError(f"{place}: environment variable {variable} has white space or other odd characters")
    if in_clear(url):
        raise ConfigError(
            redact(
                f"{place}: plain http would show the secret of environment variable {variable} to everybody between "
                f"here and {url}; use https, a tunnel that ends on this machine (`ssh -L`), or unset {variable}"
            )
        )
    return {"Authorization": f"Bearer {secret}"}


def in_clear(url: str) -> bool:
    """Whether what is sent there leaves this machine unencrypted."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        here = ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    return parts.scheme == "http" and not here


def _secrets() -> list[str]:
    """Longest first, so that a secret which contains another is masked whole."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)
