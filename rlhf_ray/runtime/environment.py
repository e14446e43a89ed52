"""Every environment variable that a process of ours starts with is set here and nowhere else."""

import os
from pathlib import Path


def quiet_driver() -> None:
    """Before Ray is imported in a process: no usage statistics, no advice that is not ours."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")


def cache_folder() -> Path:
    """What engines keep between starts (model inspection, which takes ten seconds without)."""
    root = (
        os.environ.get("RLHF_RAY_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf-ray"
    )
    return Path(root)


SPINS = 100_000
"""How long OpenMP's threads wait for more work before they sleep. Never to spin triples the time of a small model's
step, whose parallel regions are microseconds apart; the library's default keeps cores from other roles for longer."""


def torch_environment(threads: int) -> dict[str, str]:
    """For an actor that computes with torch on CPU."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": str(SPINS),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def ray_train_environment() -> dict[str, str]:
    """For the driver of Ray Train. Its controller looks at the workers every two seconds and starts helpers for
    preemption notices and metrics by default: most of the time of a short run."""
    return {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }


STOP_WITHIN_S = 120
"""How long `ray job stop` lets a job save what it has; Ray's own 3 s would kill it in the middle."""


def job_environment() -> dict[str, dict[str, str]]:
    """Ray's runtime environment of a submitted job's driver.

    No secrets: Ray shows it to whoever sees the dashboard, and logs it. Keys such as WANDB_API_KEY belong in the
    environment of the nodes.
    """
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WITHIN_S),  # read by the job's supervisor, which starts with these too
    }
    return {"env_vars": variables}


def in_uploaded_directory() -> bool:
    """Whether this process stands in Ray's copy of a job's directory, which Ray deletes when it wants the space."""
    return "working_dir_files" in Path.cwd().parts
