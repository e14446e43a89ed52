"""W&B in a process of its own: the driver writes JSON lines to its stdin and never waits for a network.

Inside the driver, W&B's client can block `finish` for minutes after its server has gone away, its service can crash
into the run's stderr, and it hooks the interpreter's exit. Out here the worst it can do is end: the run loses its W&B
page and nothing else. What this process says to the person goes to its stdout, the client's own noise to its stderr.
The API key is inherited through the environment; no message carries it.

    {"start": {...}}  {"log": {...}}  {"samples": {...}}  {"alert": {...}}  {"summary": {...}}  {"finish": 0}
"""

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, Literal

CUT_OFF = 3
"""Exit code: this process outlived the end of its input by `Start.cut_off_s`, and ended itself."""


@dataclass(frozen=True)
class Start:
    """The first message."""

    mode: Literal["online", "offline"]
    folder: str
    project: str
    name: str
    stage: str
    config: dict[str, Any]
    init_s: float
    """Longest wait for the server's first answer."""
    finish_s: float
    """Longest the client may go on sending after the run has ended; what is left it writes to disk."""

    @property
    def cut_off_s(self) -> float:
        """Longest life after the end of input: the client's own timeout waits for requests under way."""
        return 2 * self.finish_s

    def message(self) -> dict[str, Any]:
        return {"start": asdict(self)}


def main() -> None:
    inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
    start = Start(**json.loads(sys.stdin.readline())["start"])
    # Input is read at once whatever W&B does, so that the driver never meets a full pipe.
    threading.Thread(target=_read, args=(inbox, start.cut_off_s), daemon=True).start()
    try:
        run = _init(start)
        run.define_metric("*", step_metric="update")
        run.finish(exit_code=_follow(run, inbox))
    except TimeoutError:
        _say(
            f"not everything was sent within {start.finish_s:g} s; "
            f"send it with: wandb sync --include-online {start.folder}/wandb/*run-*"
        )
    except Exception as error:  # noqa: BLE001  whatever the client raises ends here, said and without harm
        _say(f"gave up ({_line(error)}); the run goes on, its metrics are in metrics.jsonl")
    sys.stdout.flush()
    os._exit(0)  # the client's exit hooks wait for the network without a deadline


def _read(inbox: SimpleQueue, cut_off_s: float) -> None:
    for line in sys.stdin:
        inbox.put(json.loads(line))
    deadline = threading.Timer(cut_off_s, os._exit, [CUT_OFF])
    deadline.daemon = True
    deadline.start()
    inbox.put({"finish": 1})  # read only when no other `finish` came: the driver died


def _init(start: Start) -> Any:
    try:
        run = _connect(start, start.mode)
    except Exception as error:  # whatever kind the client raises, it means "not online"
        if start.mode == "offline":
            raise
        _say(
            f"cannot go online ({_line(error)}); recording offline, "
            f"send it later with: wandb sync {start.folder}/wandb/offline-run-*"
        )
        return _connect(start, "offline")
    if start.mode == "online":
        _say(run.url)
    return run


def _connect(start: Start, mode: Literal["online", "offline"]) -> Any:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=True,
        x_disable_meta=True,
        disable_git=True,
        disable_code=True,
        init_timeout=start.init_s,
        login_timeout=start.init_s,
        finish_timeout=start.finish_s,
        finish_timeout_raises=True,
    )
    return wandb.init(
        mode=mode,
        dir=start.folder,
        project=start.project,
        name=start.name,
        job_type=start.stage,
        config=start.config,
        settings=settings,
    )


def _follow(run: Any, inbox: SimpleQueue) -> int:
    """Passes messages on until `finish`; returns the run's exit code."""
    import wandb

    while True:
        [(kind, content)] = inbox.get().items()
        if kind == "finish":
            return content
        if kind == "log":
            run.log(content)
        elif kind == "samples":
            table = wandb.Table(columns=content["columns"], data=content["rows"], allow_mixed_types=True)
            run.log({"update": content["update"], "samples": table})
        elif kind == "alert":
            run.alert(title=content["title"], text=content["text"], level=content["level"])
        elif kind == "summary":
            run.summary.update(content)


def _say(text: str) -> None:
    print(f"W&B: {text}", flush=True)


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


if __name__ == "__main__":
    main()
