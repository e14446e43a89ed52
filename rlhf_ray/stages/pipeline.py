"""Several stages as one: each runs when what it refers to is there, and only if it has not run with the same inputs.

A stage's folder carries the digest of its configuration and of the content of every file and folder that it names.
Equal digest: the results there are the results. So a run that was stopped goes on where it was, a changed key re-runs
what depends on it and nothing else, and an ablation shares all that it has in common with its sibling.

On one machine stages follow each other; as jobs of a cluster those run together that do not depend on each other.
"""

import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import xxhash

from rlhf_ray.config.common import StageConfig
from rlhf_ray.config.pipeline import Node, PipelineConfig
from rlhf_ray.errors import ConfigError, RLHFError, StopRequested
from rlhf_ray.runtime import session
from rlhf_ray.runtime.digests import Digests
from rlhf_ray.runtime.graph import walk
from rlhf_ray.stages import runner_of
from rlhf_ray.stages.jobs import Cluster, Ends
from rlhf_ray.telemetry.progress import say
from rlhf_ray.telemetry.run_folder import write_atomically
from rlhf_ray.telemetry.tree import Progress, show

GOES_ON = ("critique", "judge")
"""Stages that take up what an earlier run of theirs left unfinished."""
SHOWN = 3
"""Numbers of a stage's summary that its line in the tree has."""
NOT_INPUTS = ("name", "output_dir", "telemetry", "deadline_s")
"""Keys that change nothing about results."""


def run(
    config: PipelineConfig, nodes: list[Node], address: str | None = None, again: Collection[str] = (), until: str = ""
) -> dict[str, Any]:
    """Stages in order up to `until`, those in `again` anew; returns what summary.json says.

    With a dashboard's address (http://...) each stage is a Ray job, and `output_dir` must be a folder that all nodes
    and this machine share; else all run in this process, on the Ray at `address` or one of their own. Once a stage has
    failed none begins; those that run are let end, and then its error is raised.
    """
    for name in [*again, *([until] if until else [])]:
        if name not in config.stages:
            raise ConfigError(f"pipeline '{config.name}' has no stage '{name}'; it has {', '.join(config.stages)}")
    if until:
        nodes = nodes[: [node.name for node in nodes].index(until) + 1]
    pipeline = Pipeline(config, nodes, address)
    if pipeline.cluster:
        return pipeline.run(again)
    with session.connect(address):
        return pipeline.run(again)


class Pipeline:
    def __init__(self, config: PipelineConfig, nodes: list[Node], address: str | None) -> None:
        self.config, self.address = config, address
        self.nodes = {node.name: node for node in nodes}
        self.cluster = Cluster(address, nodes) if address and address.startswith("http") else None
        config.folder.mkdir(parents=True, exist_ok=True)
        self.digests = Digests(config.folder / ".digests.json")
        self.progress = {node.name: Progress(node.name, node.after) for node in nodes}
        self.results: dict[str, dict[str, Any]] = {}
        self.folders: dict[str, Path] = {}
        self.began: dict[str, float] = {}
        self.ends: Ends = SimpleQueue()

    def run(self, again: Collection[str]) -> dict[str, Any]:
        after = {name: node.after for name, node in self.nodes.items()}
        fits = self.cluster.fits if self.cluster else lambda names: False
        try:
            errors = walk(after, lambda name: self._begin(name, name in again), self._ended, fits)
        except KeyboardInterrupt:
            running = ", ".join(name for name, each in self.progress.items() if each.state == "running")
            on = "; jobs run on, and how to stop each was said when it began" if self.cluster else ""
            raise StopRequested(f"interrupted in {running or 'no stage'}{on}") from None
        if errors:
            first, *others = errors
            for name in others:
                say(f"stage '{name}' failed as well: {errors[name]}")
            raise errors[first]
        summary = {
            name: {"state": self.progress[name].state, "seconds": self.progress[name].seconds, "folder": str(folder)}
            for name, folder in self.folders.items()
        }
        write_atomically(self.config.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _begin(self, name: str, again: bool) -> None:
        node = self.nodes[name]
        try:
            config = self._prepare(node, again)
            if config is not None:
                self.began[name] = time.monotonic()
                self.progress[name].state = "running"
                self._show()
                if self.cluster:
                    self.cluster.start(node, config, self.ends)
                    return
                runner_of(node.command)(config, self.address)
        except RLHFError as error:  # raised again by `run`, when the stages that run have ended
            self.ends.put((name, error))
        else:
            self.ends.put((name, None))

    def _ended(self) -> tuple[str, Exception | None]:
        name, error = self.ends.get()  # without a deadline: who follows a job asks at every silence if it is there
        progress = self.progress[name]
        if error is not None:
            progress.state = "failed"
        else:
            self.results[name] = json.loads((self.folders[name] / "summary.json").read_text())
            _link(self.config.folder / name, self.folders[name].name)
            progress.state = "done" if name in self.began else "kept"
            progress.seconds = time.monotonic() - self.began[name] if name in self.began else None
            progress.shown = _numbers(self.results[name])
            self.digests.keep()
        self._show()
        return name, error

    def _prepare(self, node: Node, again: bool) -> StageConfig | None:
        """What is to be run; None where an earlier run's results can be kept."""
        resolved = node.resolved(self.results, f"stage '{node.name}'", name=node.name)
        name = f"{node.name}-{digest(resolved, node.command, self.digests)[:12]}"
        folder = self.config.folder / name
        self.folders[node.name] = folder
        if again or (not (folder / "summary.json").exists() and node.command not in GOES_ON):
            _move_aside(folder)
        if (folder / "summary.json").exists():
            return None
        return resolved.model_copy(update={"name": name, "output_dir": str(self.config.folder)})

    def _show(self) -> None:
        show(f"{self.config.name}  ({self.config.folder})", list(self.progress.values()))


def digest(config: StageConfig, command: str, digests: Digests) -> str:
    """Of the command, its configuration, and the content of each file or folder that a value of it names."""
    tree = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_INPUTS}
    content = json.dumps([command, _with_content(tree, digests)], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(content.encode())


def _with_content(tree: Any, digests: Digests) -> Any:
    if isinstance(tree, Mapping):
        return {key: _with_content(value, digests) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_content(value, digests) for value in tree]
    # A word that happens to be a file's name as well costs a needless run; a file overlooked would keep stale results.
    if isinstance(tree, str) and os.path.exists(tree):  # noqa: PTH110  Path's raises for a text too long to be a name
        return {"content": digests.of(Path(tree))}
    return tree


def _move_aside(folder: Path) -> None:
    """Results that are not wanted any more, or half a run, get the first free number."""
    if not folder.exists():
        return
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{n}").exists())
    aside = folder.with_name(f"{folder.name}.{number}")
    folder.rename(aside)
    say(f"what was in {folder.name} is now in {aside}")


def _link(link: Path, target: str) -> None:
    """`link` points to `target`, its neighbour; what a person looks for by the stage's name."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The first of a summary's own numbers; of an evaluation, which has none, the first measures of its answers."""
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float) and key != "seconds"}
    for name, each in summary.get("answers", {}).items():
        numbers |= {f"{name}/{measure}": value["mean"] for measure, value in each["rewards"].items()}
    return dict(list(numbers.items())[:SHOWN])
