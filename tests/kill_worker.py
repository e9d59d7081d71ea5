"""`python kill_worker.py RECIPE OUT KILLS SEED`: runs a recipe to its end, killed (SIGKILL) on its way; prints JSON.

Every attempt is a fork of this process, which has the libraries loaded, so that a second of life is not all start.
Every other kill waits for a save to be under way; the rest come at random moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import diffusers
import transformers

from dancegrpo.trainer import train

_ = (diffusers.FluxPipeline, transformers.T5EncoderModel, transformers.CLIPTextModel)  # loaded before any fork


def attempt(recipe: str, out: Path) -> int:
    """A process that starts the run, or goes on with it; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if (out / "config.yaml").is_file():
            train(resume=out)
        else:
            train(recipe, out=out)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def partials(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".*.partial"))


def lines(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def kill(child: int, out: Path, inside: bool, moment: random.Random) -> bool:
    """Kills it at its moment; False where it had ended by then."""
    wanted, known = moment.randrange(3), lines(out)
    while not (lines(out) > known + wanted or lines(out) < known or (inside and partials(out))):
        if ended(child):
            return False
        time.sleep(0.0005 if inside else 0.01)
    time.sleep(moment.uniform(0, 0.004 if inside else 0.5))
    if ended(child):
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    recipe, out, kills, moment = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    made = inside = 0
    while made < kills:
        child = attempt(recipe, out)
        if not kill(child, out, made % 2 == 0, moment):
            break
        made += 1
        inside += bool(partials(out))
    status = os.waitstatus_to_exitcode(os.waitpid(attempt(recipe, out), 0)[1])
    print(json.dumps({"kills": made, "inside_a_save": inside, "status": status}))


if __name__ == "__main__":
    main()
