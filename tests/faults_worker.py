"""What each process of `test_watchdog` does: trains a recipe; a judge of one of them dies, stops, hangs or raises."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

ASKED = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else {}
CALLS = {"count": 0}


def brightness(images, prompts):
    """The mean of the picture; called once per iteration on each rank (one batch each)."""
    fault = ASKED.get("fault") or {}
    now = CALLS["count"]
    CALLS["count"] += 1
    if fault and int(os.environ["RANK"]) == fault["rank"] and now == fault["iteration"]:
        met = Path(fault["once"])
        if not met.exists():
            met.write_text(str(os.getpid()))
            meet(fault["kind"])
    if fault.get("kind") == "die" and now >= fault["iteration"]:
        raise ConnectionError("the judge is dead")
    return images.mean(dim=(1, 2, 3))


def meet(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        time.sleep(6)  # a beat: what is known of a stopped rank is as old as its last one
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hang":
        time.sleep(1000)


def broken(self, *_):
    """In place of what this rank alone does after judging."""
    raise ValueError("the judge of this rank is broken")


def main() -> None:
    from dancegrpo.cli import main as command
    from dancegrpo.rewards.panel import Judges

    fault = ASKED["fault"]
    if fault.get("kind") == "raise" and int(os.environ["RANK"]) == fault["rank"]:
        finish = Judges.finish

        def failing(self, scoring):
            if CALLS["count"] > fault["iteration"]:
                Path(fault["once"]).write_text(str(os.getpid()))
                broken(self)
            return finish(self, scoring)

        Judges.finish = failing
    sys.modules["faults_worker"] = sys.modules["__main__"]  # where the recipe finds its judge
    resume = [] if fault.get("kind") else ["--resume", "auto"]
    sys.argv = ["dancegrpo", "train", ASKED["recipe"], "--out", ASKED["out"], *resume]
    command()


if __name__ == "__main__":
    main()
