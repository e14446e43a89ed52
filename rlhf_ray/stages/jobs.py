"""A pipeline's stages as jobs of a cluster, several at a time.

Two stages run together only if the cluster could hold every actor of both at once. Otherwise one would wait for places
that the other keeps for hours, and fail; two that hold half of what they need would both.
"""

from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.evaluation import EvaluateConfig
from rlhf_ray.config.layout import Group
from rlhf_ray.config.load import dump
from rlhf_ray.config.pipeline import Node
from rlhf_ray.config.plan import plan
from rlhf_ray.errors import ConfigError, ResourceError, TrainingError
from rlhf_ray.runtime.placement import shortage
from rlhf_ray.runtime.submit import machines, submit_command
from rlhf_ray.telemetry.progress import say
from rlhf_ray.telemetry.run_folder import write_atomically

Ends = SimpleQueue[tuple[str, Exception | None]]
"""(stage that ended, its error)"""


class Cluster:
    """The cluster whose dashboard is at `address` (http://...)."""

    def __init__(self, address: str, nodes: Sequence[Node]) -> None:
        self.address = address
        self.wanted = {node.name: wanted(node.resolved({}, f"stage '{node.name}'", name=node.name)) for node in nodes}

    def fits(self, names: Sequence[str]) -> bool:
        """Whether these stages may run at the same time on the cluster, as large as it is now."""
        try:
            there = machines(self.address)
        except ResourceError as error:
            say(f"{names[-1]} waits for the others: {error}")
            return False
        return shortage([group for name in names for group in self.wanted[name]], there) is None

    def start(self, node: Node, config: StageConfig, ends: Ends) -> None:
        """Returns at once; the job's end goes into `ends`."""
        file = Path(config.output_dir) / f"{config.name}.yaml"
        write_atomically(file, dump(config))
        # A daemon: to stop following must not wait for the jobs.
        Thread(target=self._follow, args=(node, config, file, ends), daemon=True).start()

    def _follow(self, node: Node, config: StageConfig, file: Path, ends: Ends) -> None:
        try:
            self._run(node, config, file)
        except Exception as error:  # noqa: BLE001  it is raised again by who would else wait for ever
            ends.put((node.name, error))
        else:
            ends.put((node.name, None))

    def _run(self, node: Node, config: StageConfig, file: Path) -> None:
        try:
            code = submit_command(["rlhf-ray", node.command, str(file)], self.address, Path.cwd(), f"{node.name}: ")
        except ResourceError as error:
            raise ResourceError(f"stage '{node.name}': {error}") from None
        if code:
            raise TrainingError(f"the job of stage '{node.name}' failed; its log stands above")
        if not (Path(config.output_dir) / config.name / "summary.json").exists():
            raise ConfigError(
                f"the job of stage '{node.name}' succeeded, but its results are not in {config.output_dir} here: "
                "output_dir must be a folder that this machine and all nodes share"
            )


def wanted(config: StageConfig) -> list[Group]:
    """What a stage holds at most; the models of an evaluation, which come one after the other, all count."""
    found = [Group(each.roles, (_resources(each.cpus, each.gpus),) * each.count) for each in plan(config).bundles]
    if isinstance(config, EvaluateConfig):
        found.append(Group(("reward",), (_resources(1, config.device == "gpu"),)))
    return found


def _resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
