import pytest

from rlhf_ray.telemetry.tree import Progress, show


def test_each_stage_stands_under_the_last_one_that_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        Progress("sft", (), "kept"),
        Progress("judge", ("sft",), "done", 12.4, {"pairs": 30, "flip_rate": 0.25}),
        Progress("reward", ("sft", "judge"), "running"),
        Progress("ppo", ("reward", "sft")),
    ]
    show("line", stages)
    lines = capsys.readouterr().err.splitlines()
    assert [line.index(name) for line, name in zip(lines[1:], ("=", "✓", "▸", "·"), strict=True)] == [4, 8, 12, 16]
    assert "judge  done  12 s  pairs 30  flip_rate 0.25" in lines[2]
    assert "ppo  waiting" in lines[4]
