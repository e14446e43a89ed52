import subprocess

import pytest
from commands import Project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def ran(project: Project) -> subprocess.CompletedProcess[str]:
    """The plain run, to its end: `runs/run`."""
    return project.run("checkpoint.keep=2", "telemetry.wandb=offline", within_s=180)
