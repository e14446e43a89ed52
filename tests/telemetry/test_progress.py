import io
import re

import pytest

from rlhf_ray.telemetry.progress import Bar, Lines, progress, say


class Hand:
    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_log_gets_one_line_an_update_with_values_and_time_left() -> None:
    hand, out = Hand(), io.StringIO()
    lines = Lines(4, "ppo", now=hand, out=out)
    hand.time = 30
    lines.advance(score=1.23456, engine="up")
    hand.time = 80
    lines.advance()
    first, second = out.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  ppo 1/4  score 1\.235  engine up  eta 1:30", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  ppo 2/4  eta 1:20", second)


def test_updates_done_before_do_not_count_towards_the_speed() -> None:
    hand, out = Hand(), io.StringIO()
    lines = Lines(100, "ppo", done=90, now=hand, out=out)
    hand.time = 400
    lines.advance()
    assert out.getvalue().endswith("ppo 91/100  eta 1:00:00\n")


def test_without_a_terminal_there_are_lines_on_stderr(capsys: pytest.CaptureFixture) -> None:
    with progress(2, "sft") as bar:
        bar.advance(loss=0.5)
    captured = capsys.readouterr()
    assert isinstance(bar, Lines)
    assert "sft 1/2  loss 0.5  eta" in captured.err
    assert captured.out == ""


def test_in_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(2, "sft") as bar:
        assert isinstance(bar, Bar)
        bar.advance(loss=0.25)
    bar.close()
    assert "1/2" in terminal.getvalue()
    assert "loss 0.25" in terminal.getvalue()


def test_what_is_said_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefghijk")
    say("refused abcdefghijk")
    assert capsys.readouterr().err == "refused <redacted>\n"
