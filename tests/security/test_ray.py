"""Whoever speaks to a Ray runs code as its owner: the one that stages start asks for a token that nobody else has."""

import os
import stat
from pathlib import Path

import pytest
from processes import command_lines

from rlhf_ray.errors import ResourceError
from rlhf_ray.runtime import session


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a person who has given no token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_that_nobody_else_can_read_at_any_moment_and_it_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "chmod", lambda *_: None)  # closed afterwards is too late
    before = os.umask(0)
    try:
        session._keep_token()
    finally:
        os.umask(before)
    file = home / ".ray/auth_token"
    token = file.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert (rights(file), rights(file.parent)) == (0o600, 0o700)
    session._keep_token()
    assert file.read_text() == token
    assert list(file.parent.iterdir()) == [file]


def test_a_token_that_ray_left_for_all_to_read_is_closed_and_kept(home: Path) -> None:
    file = home / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text("c" * 64)
    file.chmod(0o644)
    session._keep_token()
    assert (file.read_text(), rights(file)) == ("c" * 64, 0o600)


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "d" * 64), ("RAY_AUTH_TOKEN_PATH", "/mine"), ("RAY_AUTH_MODE", "disabled")]
)
def test_what_the_person_says_about_tokens_stands(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    session._keep_token()
    assert not (home / ".ray").exists()


def test_a_home_that_takes_no_file_is_named_with_what_to_do(home: Path) -> None:
    (home / ".ray").write_text("in the way")
    with pytest.raises(ResourceError, match=r"\.ray.*: Ray's token cannot be kept there: .* RAY_AUTH_TOKEN_PATH"):
        session._keep_token()


@pytest.mark.real
def test_a_local_ray_takes_commands_only_from_who_has_the_token(ray_session: None) -> None:
    import grpc

    address = os.environ["RAY_ADDRESS"]
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()

    def answer(*shown: tuple[str, str]) -> str:
        with grpc.insecure_channel(address) as channel:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
            try:
                ask(b"", metadata=shown, timeout=20)
            except grpc.RpcError as error:
                return error.code().name
            return "OK"

    assert answer() == "UNAUTHENTICATED"
    assert answer(("authorization", f"Bearer {'b' * 64}")) == "UNAUTHENTICATED"
    assert answer(("authorization", f"Bearer {token}")) == "OK"


@pytest.mark.real
def test_no_command_line_of_rays_processes_shows_the_token(ray_session: None) -> None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    lines = command_lines()
    assert any("gcs_server" in line for line in lines)
    assert [line for line in lines if token in line] == []
