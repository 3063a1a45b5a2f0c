"""A process that has imported everything and forks a child for each command line: a run costs no import.

`python -m tests.crash_server` reads one JSON object a line and answers {"pid"} and then {"status", "events"}. A child
can be told to kill itself (SIGKILL) just before its n-th touch of a file below a folder, as Python's audit hooks see
them: open, rename, remove, mkdir, symlink and so on, or before a certain touch, or to have no room for files beyond
some size.
Refuses to know what the commands do.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

_TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.chmod", "os.listdir",
            "os.scandir"}


def watch(folder: str, kill_at: int, report: Path) -> None:
    """Count touches below the folder, and die at the given one (0: never)."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _TOUCHES or not any(str(a).startswith(folder) for a in args[:2] if isinstance(a, (str, Path))):
            return
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not kill_at:
            handle = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.write(handle, str(count).encode())
            os.close(handle)

    sys.addaudithook(hook)


def die_before(touch: str, path: str) -> None:
    """Die just before an audit event (os.remove, shutil.rmtree) of one path."""
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == touch and str(args[0]) == path:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(order: dict[str, Any]) -> int:
    from selfparam.cli import main

    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order.get("fsize"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["fsize"], order["fsize"]))
    if "watch" in order:
        watch(order["watch"] + "/", order.get("kill_at", 0), Path(order["log"] + ".events"))
    if "die_before" in order:
        die_before(*order["die_before"])
    return main(order["arguments"])


def serve() -> None:
    import peft  # noqa: F401
    import torch

    import selfparam.cli.injecting  # noqa: F401
    from selfparam import steps

    torch.set_num_threads(1)
    steps.HELD_OUT_PASSAGES = 2
    say = os.fdopen(os.dup(1), "w")
    say.write("ready\n")
    say.flush()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 99
            try:
                code = child(order)
            finally:
                sys.stdout.flush()
                os._exit(code)
        say.write(json.dumps({"pid": pid}) + "\n")
        say.flush()
        _, status = os.waitpid(pid, 0)
        say.write(json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n")
        say.flush()


if __name__ == "__main__":
    serve()
