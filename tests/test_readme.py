"""Every command of the README exists and takes the arguments that are shown."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from rlhf_ray.config.stages import STAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = ROOT / ".venv/bin"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_the_command_is_there(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "source":
        assert (BIN / "activate").is_file() or not BIN.exists()
    elif program.startswith("./launch/"):
        assert subprocess.run(["bash", "-n", program], cwd=ROOT, check=False).returncode == 0
        assert (ROOT / program).stat().st_mode & 0o111
    elif program == "ray":
        assert arguments[:2] in (["job", "submit"], ["job", "stop"])
        if "--" in arguments:
            _check_rlhf_ray(arguments[arguments.index("--") + 2 :])
    else:
        assert program == "rlhf-ray"
        _check_rlhf_ray(arguments)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_the_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def _check_rlhf_ray(arguments: list[str]) -> None:
    """The command is known; a stage's configuration and overrides are accepted, as a dry run shows."""
    if arguments[0] == "submit":
        place = arguments[1]
        arguments = [Path(place).parent.name, place]
    if arguments[0] in (*STAGES, "pipeline"):
        arguments = [*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])]
    else:
        arguments = [arguments[0], "--help"]
    done = subprocess.run(
        [BIN / "rlhf-ray", *arguments], cwd=ROOT, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
