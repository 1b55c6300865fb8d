"""Kills a small run many times, some of them inside a write, resumes it each time, and compares it with one that was
not killed: the weights bit for bit, and every row of metrics.jsonl.

    python tests/kill_and_resume.py --kills 20
"""

import argparse
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from processes import run_script, running
from workspace import ROOT, flags_of, make_workspace, rows_of, weights_of

KILLED_IN_A_WRITE = """
import os, signal

left = int(os.environ["KILL_AT"])

def dying(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in ("fsync", "rename", "replace"):
    setattr(os, name, dying(getattr(os, name)))
import train
raise SystemExit(train.main())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--n_epoch", type=int, default=12, help="of the run; it ends sooner than the kills if too few")
    args = parser.parse_args()

    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workspace, run, whole = folder / "workspace", folder / "run", folder / "whole"
        workspace.mkdir()
        make_workspace(workspace)
        script = folder / "killed.py"
        script.write_text(KILLED_IN_A_WRITE)
        flags = flags_of(workspace, batch_size=2, gradient_accumulation_steps=1, checkpoint_interval=20,
                         n_epoch=args.n_epoch)  # fmt: skip
        assert run_script(ROOT / "train.py", *flags, "--dump_path", whole, limit=300).returncode == 0
        flags += ["--dump_path", run, "--resume"]
        in_writes = at_random = 0
        while in_writes + at_random < args.kills:
            if draw.random() < 0.5:
                calls = draw.randint(5, 50)
                result = run_script(script, *flags, PYTHONPATH=str(ROOT), KILL_AT=str(calls))
                in_writes += result.returncode == -signal.SIGKILL
            else:
                with running(ROOT / "train.py", *flags) as training:
                    time.sleep(draw.uniform(0.7, 2))  # the first half of it is spent on loading
                    training.kill()
                    at_random += training.result().returncode == -signal.SIGKILL
            print(f"killed {in_writes} times in a write, {at_random} times at random", flush=True)
            if (run / f"model_epoch_{args.n_epoch - 1}.pth").exists():  # nothing is left to kill
                break
        assert run_script(ROOT / "train.py", *flags, limit=300).returncode == 0
        killed, other = weights_of(run), weights_of(whole)
        same = all(torch.equal(killed[key], other[key]) for key in other)
        print(f"weights bit-identical: {same}; metrics identical: {rows_of(run) == rows_of(whole)}")
        left = [path for path in run.rglob("*.tmp")]
        print(f"temporary files left: {len(left)}")
        return 0 if same and rows_of(run) == rows_of(whole) and not left else 1


if __name__ == "__main__":
    raise SystemExit(main())
