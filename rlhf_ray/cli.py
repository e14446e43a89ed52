"""`rlhf-ray`: one command a stage. A person's error is one message and an exit code; a traceback means a bug of ours.

Commands import what they run only when they run it: `--help`, `--dry-run` and a typo in the configuration must answer
without waiting for torch, Ray or vLLM.
"""

import json
import sys
from contextlib import redirect_stdout
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from rlhf_ray.config.roofline import GPUS, Shares
from rlhf_ray.errors import ConfigError, ResourceError, RLHFError, StopRequested
from rlhf_ray.runtime.environment import in_uploaded_directory
from rlhf_ray.telemetry.secrets import redact


class _Group(TyperGroup):
    """Typer would end on Ctrl-C without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise StopRequested("interrupted") from None


app = typer.Typer(
    cls=_Group,
    help="RLHF on Ray: vLLM rollout, frozen reference, reward model and DeepSpeed PPO learner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Stage(StrEnum):
    sft = "sft"
    reward = "reward"
    dpo = "dpo"
    ilql = "ilql"
    ppo = "ppo"
    critique = "critique"
    judge = "judge"
    evaluate = "evaluate"
    rllib = "rllib"
    world = "world"


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="dotted.key=value", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the configuration, print what it asks for, and stop.")]
Address = Annotated[
    str | None,
    typer.Option(help="A Ray cluster to run on, such as auto or HOST:6379. Without: RAY_ADDRESS, else here."),
]


@app.callback(invoke_without_command=True)
def _options(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(f"rlhf-ray {version('rlhf-ray')}")
        raise typer.Exit


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Fine-tune a language model on demonstrations."""
    _run(Stage.sft, config, overrides, dry_run, address)


@app.command()
def reward(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Train a reward model on preferences."""
    _run(Stage.reward, config, overrides, dry_run, address)


@app.command()
def dpo(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Train a policy on preferences directly, without a reward model."""
    _run(Stage.dpo, config, overrides, dry_run, address)


@app.command()
def ilql(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Learn values of next tokens from answers with rewards, offline, and a policy that they steer."""
    _run(Stage.ilql, config, overrides, dry_run, address)


@app.command()
def ppo(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Raise a policy's reward by PPO, kept near its reference."""
    _run(Stage.ppo, config, overrides, dry_run, address)


@app.command()
def critique(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Let a model criticise and revise its answers by a constitution; rows for sft."""
    _run(Stage.critique, config, overrides, dry_run, address)


@app.command()
def judge(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Let a model compare answers by a constitution; preferences for reward and dpo."""
    _run(Stage.judge, config, overrides, dry_run, address)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Examine a policy: given answers, its own, and duels with another."""
    _run(Stage.evaluate, config, overrides, dry_run, address)


@app.command()
def rllib(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Let RLlib's PPO or DQN learn to walk a graph, token by token, against the known optimum."""
    _run(Stage.rllib, config, overrides, dry_run, address)


@app.command()
def world(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False, address: Address = None) -> None:
    """Make the demo's world for feedback from a model: data, constitution, base model."""
    _run(Stage.world, config, overrides, dry_run, address)


@app.command()
def pipeline(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    address: Annotated[
        str | None,
        typer.Option(help="http://HOST:8265: each stage a job on that cluster. Else as for a stage."),
    ] = None,
    again: Annotated[list[str] | None, typer.Option(help="A stage to run anew though it is finished.")] = None,
    until: Annotated[str, typer.Option(help="The last stage to run.", show_default=False)] = "",
) -> None:
    """Run several stages, each on what others left; finished ones are skipped."""
    from rlhf_ray.config.pipeline import load_pipeline

    loaded, nodes = load_pipeline(config, overrides)
    if dry_run:
        for node in nodes:
            print(f"{node.name}: {node.command}" + (f", after {', '.join(node.after)}" if node.after else ""))
        return
    sys.path.append(str(Path.cwd()))
    from rlhf_ray.stages.pipeline import run

    with redirect_stdout(sys.stderr):
        summary = run(loaded, nodes, address, again or (), until)
    print(json.dumps(summary, indent=2))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}.")] = "h100",
    answer_tokens: Annotated[float | None, typer.Option(help="Mean. Without: half of rollout.max_new_tokens.")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(help="Mean. Without: half of data.max_tokens.")] = None,
    mfu: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of peak FLOP/s that is reached.")
    ] = Shares.compute,
    mbu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of memory bandwidth.")] = Shares.memory,
    link_share: Annotated[float, typer.Option(min=0.001, max=1, help="Share of links' bandwidth.")] = Shares.link,
) -> None:
    """Predict memory and seconds of a PPO run on a cluster, and compare placements; nothing is started."""
    from rlhf_ray.config import planning
    from rlhf_ray.config.prediction import Cluster, work_ahead

    cluster = Cluster(gpu, nodes, gpus_per_node, Shares(mfu, mbu, link_share))
    loaded = planning.load_ppo(config, overrides or [])
    work = work_ahead(loaded, prompt_tokens, answer_tokens)
    print(planning.render(loaded, cluster, work, planning.predict(loaded, cluster, work)))


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(metavar="runs/NAME/evidence/UPDATE", show_default=False)],
) -> None:
    """Look again, on one process, at a batch that broke an invariant of a run."""
    from rlhf_ray.stages.replay import replay as look

    print(look(folder))


@app.command()
def audit(folder: Annotated[Path, typer.Argument(metavar="runs/NAME", show_default=False)]) -> None:
    """Judge by a PPO run's history whether every sample is accounted for and none was too old."""
    from rlhf_ray.runtime import audit as auditing

    verdict = auditing.audit(auditing.read(folder))
    print(verdict)
    raise typer.Exit(0 if verdict.good else 1)


@app.command()
def trace(
    folder: Annotated[Path, typer.Argument(metavar="runs/NAME", show_default=False)],
    to: Annotated[Path | None, typer.Option(help="Without: trace.json in that folder.", show_default=False)] = None,
) -> None:
    """Write a PPO run's history as a Chrome trace, for ui.perfetto.dev: which actor did what, and when."""
    from rlhf_ray.runtime import audit as auditing
    from rlhf_ray.runtime.occupancy import trace as traced

    history = auditing.read(folder)
    place = to or (folder if folder.is_dir() else folder.parent) / "trace.json"
    try:
        place.write_text(json.dumps(traced(history)), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{place}: cannot be written: {error.strerror or error}") from None
    print(place)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0)] = 0,
    output_dir: Annotated[Path, typer.Option(help="Its files go into `demo` below it.")] = Path("runs"),
) -> None:
    """Everything on a small made-up world, on this machine, in minutes: base model, SFT, reward model, PPO."""
    from rlhf_ray.demo.run import run

    run(seed=seed, output_dir=output_dir)


@app.command()
def submit(
    config: ConfigFile,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://HOST:8265.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    stage: Annotated[
        Stage | None, typer.Option(help="Without: the configuration's folder or name, as in configs/ppo/run.yaml.")
    ] = None,
) -> None:
    """Send a run to a cluster, with the current directory, and follow its log."""
    stage = stage or _stage_of(config)
    resolved = _load(stage, config, overrides)  # a fault shows here, not after the upload
    _check_outlives_the_job(resolved, config)
    from rlhf_ray.runtime.submit import submit as submit_job

    raise typer.Exit(submit_job(config, stage.value, overrides or [], address, Path.cwd()))


@app.command()
def doctor() -> None:
    """Look over this machine: packages, memory, GPUs, keys, Ray; say what to do about what is wrong."""
    from rlhf_ray.runtime.doctor import examine, report

    checks = examine()
    print(report(checks))
    raise typer.Exit(1 if any(check.is_fault for check in checks) else 0)


def main() -> NoReturn:
    """Entry point of `rlhf-ray`."""
    try:
        app()
    except RLHFError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _run(stage: Stage, path: Path, overrides: list[str] | None, dry_run: bool, address: str | None) -> None:
    config = _load(stage, path, overrides)
    if in_uploaded_directory():
        _check_outlives_the_job(config, path)
    if dry_run:
        from rlhf_ray.config.plan import plan, render

        print(redact(render(plan(config))))
        return
    # A reward function may lie in the current directory, where Ray's workers look for modules as well.
    sys.path.append(str(Path.cwd()))
    from rlhf_ray.stages import runner_of

    with redirect_stdout(sys.stderr):  # a library's log keeps the stdout of its import; only the summary belongs there
        run = runner_of(stage)
    summary = run(config, address)
    print(redact(json.dumps(summary, indent=2, default=str)))


def _check_outlives_the_job(config: Any, path: Path) -> None:
    """Results in the job's copy of the uploaded directory would be deleted with it, hours of training among them."""
    if not Path(config.output_dir).is_absolute():
        raise ConfigError(
            f"{path}: output_dir '{config.output_dir}' is relative, so a job's results would lie in its copy of the "
            "uploaded directory, which Ray deletes; add output_dir=/a/folder/that/all/nodes/share"
        )


def _load(stage: Stage, path: Path, overrides: list[str] | None) -> Any:
    from rlhf_ray.config.load import load
    from rlhf_ray.config.stages import config_of

    return load(config_of(stage), path, overrides)


def _stage_of(config: Path) -> Stage:
    for name in (config.resolve().parent.name, config.stem):
        if name in Stage.__members__:
            return Stage(name)
    raise ConfigError(
        f"{config}: which stage is it? Neither its folder nor it is named {', '.join(Stage)}; give --stage"
    )


if __name__ == "__main__":
    main()
