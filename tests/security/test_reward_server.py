"""A reward server over TLS: who it is is checked, and nobody else learns the token."""

import datetime
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rlhf_ray.actors.reward import TOKEN, ServerScores
from rlhf_ray.config.rewards import RewardSection
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.stages.reward_check import check_reward
from rlhf_ray.telemetry.secrets import in_clear

SECRET = "reward-token-0123456789"


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Who does not trust the certificate hangs up, as is tested."""


class Server:
    """https on loopback; scores 1 for each answer to whoever shows the token."""

    def __init__(self, certificate: Path) -> None:
        self.seen: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                shown = self.headers["authorization"]
                outer.seen.append(shown)
                good = shown == f"Bearer {SECRET}"
                self.send_response(200 if good else 401)
                self.end_headers()
                told = {"scores": [1.0] * len(asked["responses"])} if good else {"we got": shown}
                self.wfile.write(json.dumps(told).encode())

            def log_message(self, *_: object) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def write_certificate(path: Path, host: str) -> Path:
    """Self-signed, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(pem) + private)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Server]:
    server = Server(write_certificate(folder / "server.pem", "127.0.0.1"))
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def server(running: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "server.pem"))
    monkeypatch.setenv(TOKEN, SECRET)
    running.seen.clear()
    return running


def scores(server: Server) -> object:
    return ServerScores(server.url, 5.0)(["p", "q"], ["a", "b"])


def test_who_shows_the_token_gets_scores(server: Server) -> None:
    assert scores(server) == [1.0, 1.0]
    assert server.seen == [f"Bearer {SECRET}"]


def test_a_wrong_token_is_refused_at_once_and_shown_to_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "another-token-0123456789")
    with pytest.raises(RewardError, match=rf"variable {TOKEN}, is refused: HTTP 401: .*<redacted>") as refused:
        scores(server)
    assert "another-token" not in str(refused.value)  # though the server repeats what it got
    assert len(server.seen) == 1


def test_a_token_that_is_not_set_is_said_to_be_missing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN)
    with pytest.raises(RewardError, match=rf"variable {TOKEN}, is not set: HTTP 401"):
        scores(server)
    assert server.seen == [None]


def test_a_certificate_of_an_unknown_authority_is_refused_before_anything_is_sent(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_certificate(folder / "other.pem", "127.0.0.1")
    for trusted in (None, str(other)):  # certifi's, and another one's
        monkeypatch.setenv("SSL_CERT_FILE", trusted) if trusted else monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(RewardError, match=r"CERTIFICATE_VERIFY_FAILED.* set SSL_CERT_FILE to its certificate"):
            scores(server)
    assert server.seen == []


def test_a_certificate_of_another_host_is_refused(folder: Path, server: Server) -> None:
    with pytest.raises(RewardError, match=r"CERTIFICATE_VERIFY_FAILED.*localhost"):
        ServerScores(server.url.replace("127.0.0.1", "localhost"), 5.0)(["p"], ["a"])
    assert server.seen == []


def test_certificates_that_cannot_be_read_are_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    with pytest.raises(RewardError, match=r"certificates of SSL_CERT_FILE '/nowhere/ca\.pem' cannot be read"):
        scores(server)


@pytest.mark.parametrize(
    ("url", "clear"),
    [
        ("http://rewards.example/score", True),
        ("http://10.0.0.7:8000", True),
        ("http://127.0.0.1.example:80", True),
        ("http://localhost@evil.example", True),
        ("http://2130706433.example", True),
        ("https://rewards.example", False),
        ("http://127.0.0.1:8000", False),
        ("http://127.9.9.9", False),
        ("http://[::1]:8000", False),
        ("http://localhost", False),
        ("http://user:pw@localhost/", False),
    ],
)
def test_only_plain_http_to_another_machine_is_in_clear(url: str, clear: bool) -> None:
    assert in_clear(url) is clear


def test_a_token_is_not_sent_in_clear(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardSection(url="http://user:hunter22@rewards.example/score")
    monkeypatch.setenv(TOKEN, SECRET)
    with pytest.raises(ConfigError, match=rf"plain http would show the secret .* {TOKEN} .* use https") as refused:
        check_reward(reward, None, policy, False)  # type: ignore[arg-type]
    assert SECRET not in str(refused.value) and "hunter22" not in str(refused.value)


def test_plain_http_without_a_token_is_warned_of(
    policy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    for url in ("http://rewards.example/score", "http://localhost:8000", "https://rewards.example"):
        check_reward(RewardSection(url=url), None, policy, False)  # type: ignore[arg-type]
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: reward.url http://rewards.example/score: over plain http others can")


def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, f"{SECRET}\r\nX-Other: 1")
    with pytest.raises(ConfigError, match="odd characters") as refused:
        ServerScores("https://rewards.example", 1.0)
    assert SECRET not in str(refused.value)
