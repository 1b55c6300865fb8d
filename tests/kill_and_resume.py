"""Kills small runs of the scripts that continue, and compares what comes out in the end with a run that was not killed.

    python tests/kill_and_resume.py --kills 20
    python tests/kill_and_resume.py --kills 200 --seed 3 --output results/kills.jsonl    # adds to the file
    python tests/kill_and_resume.py --kills 0 --output results/kills.jsonl               # prints the table of the file

A trial begins in an empty folder. Its command is killed at a drawn instant or at a system call that changes the disk,
or one such call fails for want of room; then it is called again, which may be killed too, and at last it ends. The
calls are those of a whole run, as strace (`apt install strace`) sees them; without strace, only instants are drawn.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glue_files import write_task
from processes import Result, Script, environments, running
from workspace import ROOT, flags_of, make_workspace, rows_of, weights_of

CALLS = (
    "openat", "write", "pwrite64", "writev", "sendfile", "copy_file_range", "ftruncate", "fsync", "fdatasync", "chmod",
    "fchmod", "fchmodat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat",
)  # fmt: skip
ON_HANDLES = {"write", "pwrite64", "writev", "ftruncate", "fsync", "fdatasync", "fchmod"}
NEED_ROOM = {"openat", "write", "pwrite64", "writev", "sendfile", "copy_file_range", "fsync", "rename", "mkdir"}
GRACE = 30  # seconds
LINE = re.compile(r"(\d+) +(\w+)\((.*)")
WAITING = """
import runpy, sys, time

while "TracerPid:\\t0\\n" in open("/proc/self/status").read():
    time.sleep(0.002)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # for strace, so that it sees every call of the script in sys.argv
BINARIZE_IN_SMALL_PARTS = """
import binarized_data, corpus.text_reader

corpus.text_reader.BLOCK = 2000
binarized_data.CHECKPOINT_SECONDS = 0
raise SystemExit(binarized_data.main())
"""


@dataclass
class Case:
    """A command that continues when it is called again.

    Attributes:
        flags: of the script, given the folder that it writes to.
        result: what is compared in the end, found in that folder.
        processes: how many train together.
    """

    name: str
    script: Path
    flags: Callable[[Path], list]
    result: Callable[[Path], object]
    processes: int = 1


@dataclass(frozen=True)
class Call:
    """A system call: the k-th of its name in a thread, and the file or folder that it changes (numbers left out)."""

    name: str
    k: int
    place: str


# ------------------------------------------------------------------------------------------------------------ the cases


def cases(folder: Path) -> list[Case]:
    """Those of this script; what they read is written to `folder`."""
    make_workspace(folder)
    for task in ("CoLA", "RTE"):
        write_task(folder / "glue", task)
    (folder / "binarize.py").write_text(BINARIZE_IN_SMALL_PARTS)
    small = {"batch_size": 32, "gradient_accumulation_steps": 1, "checkpoint_interval": 4, "eval_interval": 5,
             "valid_share": 0.1, "n_epoch": 1}  # fmt: skip

    def train(out: Path) -> list:
        return [*flags_of(folder, dump_path=out / "run", **small), "--resume"]

    def trained(out: Path) -> object:
        best = (out / "run" / "best" / "model.safetensors").read_bytes()
        return [(k, v.tolist()) for k, v in weights_of(out / "run").items()], rows_of(out / "run"), best

    teacher = folder / "bert-base-uncased"
    text = ["--file_path", folder / "dump.txt", "--bert_tokenizer", teacher]
    glue = ["--models", teacher, "--data_dir", folder / "glue", "--tasks", "CoLA", "RTE", "--seeds", 1, "--n_epoch", 1,
            "--n_gpu", 0, "--fp32"]  # fmt: skip
    return [
        Case("train", ROOT / "train.py", train, trained),
        Case("train, two processes", ROOT / "train.py", train, trained, processes=2),
        Case(
            "binarized_data",
            folder / "binarize.py",
            lambda out: [*text, "--dump_file", out / "text", "--resume"],
            lambda out: (out / "text.bert-base-uncased.pickle").read_bytes(),
        ),
        Case(
            "make_dump",
            ROOT / "scripts" / "make_dump.py",
            lambda out: ["--source", folder / "dump.txt", "--dump_file", out / "dump.txt", "--num_workers", 0],
            lambda out: (out / "dump.txt").read_bytes(),
        ),
        Case(
            "run_glue",
            ROOT / "scripts" / "run_glue.py",
            lambda out: [*glue, "--output", out / "glue.jsonl", "--save_models", out / "kept"],
            lambda out: (
                [json.loads(line)["metrics"] for line in (out / "glue.jsonl").read_text().splitlines()],
                [file.read_bytes() for file in sorted(out.glob("kept/*/model.safetensors"))],
            ),
        ),
    ]


# ---------------------------------------------------------------------------------------------------------- one command


@contextlib.contextmanager
def started(case: Case, out: Path, waiting: Path | None = None) -> Iterator[list[Script]]:
    """Its processes; with `waiting`, the first one waits for strace."""
    out.mkdir(exist_ok=True)
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    with contextlib.ExitStack() as stack:
        processes = []
        for i, environment in enumerate(environments(case.processes) if case.processes > 1 else [{}]):
            script = [waiting, case.script] if waiting and i == 0 else [case.script]
            processes.append(stack.enter_context(running(*script, *case.flags(out), **environment, **path)))
        yield processes


def results_of(processes: list[Script]) -> list[Result]:
    """Waits for their end. If one fails, the others are told to stop and then killed, as torchrun does it."""
    while all(process.is_running for process in processes):
        time.sleep(0.01)
    time.sleep(0.1)
    if any(not process.is_running and process.process.exitcode for process in processes):
        for process in filter(lambda process: process.is_running, processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.process.pid, signal.SIGTERM)
        for process in processes:
            process.process.join(GRACE)
            process.kill()
    return [process.result() for process in processes]


def run(case: Case, out: Path) -> list[Result]:
    with started(case, out) as processes:
        return results_of(processes)


def kill_after(case: Case, out: Path, seconds: float, rank: int) -> list[Result]:
    with started(case, out) as processes:
        time.sleep(seconds)
        processes[rank].kill()
        return results_of(processes)


def trace(case: Case, out: Path, waiting: Path, *injection: str) -> tuple[list[Result], list[str]]:
    """Runs it with strace on its first process; also gives strace's lines."""
    with tempfile.NamedTemporaryFile("r") as log, started(case, out, waiting) as processes:
        pid = str(processes[0].process.pid)
        options = ["-f", "-qq", "-y", "-s", "0", "-e", f"trace={','.join(CALLS)}", *injection]
        tracer = subprocess.Popen(["strace", *options, "-o", log.name, "-p", pid], start_new_session=True)
        try:
            results = results_of(processes)
        finally:
            tracer.kill()
            tracer.wait()
        return results, log.read().splitlines()


def calls_in(lines: list[str], out: Path) -> list[Call]:
    """The calls of strace's lines that change something in the folder."""
    calls, counts = [], Counter()
    for thread, name, arguments in (match.groups() for line in lines if (match := LINE.match(line))):
        counts[thread, name] += 1
        paths = re.findall(r'"((?:[^"\\]|\\.)+)"', arguments)
        handle = re.match(r"(?:AT_FDCWD|\d+)<([^>]*)>", arguments)
        if name in ON_HANDLES or not paths:
            path = handle[1] if handle else "/"
        else:
            path = os.path.join(handle[1] if handle else "/", paths[-1])
        inside = path.startswith(f"{out}/")
        if inside and (name != "openat" or "O_CREAT" in arguments):
            calls.append(Call(name, counts[thread, name], re.sub(r"\d+", "N", path.removeprefix(f"{out}/"))))
    return calls


def draw_call(draw: random.Random, calls: list[Call]) -> Call:
    """Each kind of place as likely as any other, however often it is written."""
    name, place = draw.choice(sorted({(call.name, call.place) for call in calls}))
    return draw.choice([call for call in calls if (call.name, call.place) == (name, place)])


# --------------------------------------------------------------------------------------------------------------- trials


def try_once(case: Case, out: Path, draw: random.Random, calls: list[Call], seconds: float, whole: object) -> dict:
    """One trial: its kills as [how, call, where that call is in a whole run, status], and what came of it."""
    kills, faults = [], []
    waiting = out.parent / "waiting.py"
    for _ in range(draw.randint(1, 3)):
        how = draw.choice(["instant", "call", "call", "call", "no room"] if calls else ["instant"])
        if how == "instant":
            results = kill_after(case, out, draw.uniform(0, seconds), draw.randrange(case.processes))
            hit, where = any(result.returncode == -signal.SIGKILL for result in results), ("", "")
        else:
            point = draw_call(draw, [call for call in calls if how == "call" or call.name in NEED_ROOM])
            effect = "signal=KILL" if how == "call" else "error=ENOSPC"
            results, lines = trace(case, out, waiting, "-e", f"inject={point.name}:{effect}:when={point.k}")
            # What is not a file of the folder, such as a pipe, never lacks room.
            injected = calls_in([line for line in lines if "(INJECTED)" in line], out)
            hit = bool(injected) or any("killed by SIGKILL" in line for line in lines)
            where = (point.name, point.place)
        if hit:
            kills.append([how, *where, results[0].returncode])
            faults += [result.stderr[-2000:] for result in results if "Traceback" in result.stderr]
        if not any(result.returncode for result in results):
            break
    results = run(case, out)
    faults += [result.stderr[-2000:] for result in results if result.returncode != 0]
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".tmp", ".partial"))
    try:
        same = case.result(out) == whole
    except OSError as error:
        same = False
        faults.append(str(error))
    return {"case": case.name, "kills": kills, "same": same, "left": left, **({"faults": faults} if faults else {})}


def table(rows: list[dict]) -> str:
    """Of the trials in a file: how often each case was killed where, and what came of it."""
    from utils import markdown_table

    kinds = ("instant", "call", "no room")
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        trials = [row for row in rows if row["case"] == name]
        kills = [kill for row in trials for kill in row["kills"]]
        places = {(call, place) for how, call, place, _ in kills if how != "instant"}
        right = sum(row["same"] and not row["left"] and "faults" not in row for row in trials)
        counts = [sum(how == kind for how, *_ in kills) for kind in kinds]
        lines.append([name, *map(str, (*counts, len(places), len(trials), right))])
    total = [str(sum(int(line[i]) for line in lines)) for i in range(1, 7)]
    header = ["command", "killed at an instant", "at a call", "no room", "calls and places", "trials", "bit for bit"]
    return markdown_table(header, [*lines, ["all", *total]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--output", type=Path, help="file to add the trials to, one JSON object a line")
    args = parser.parse_args()
    rows = []
    if args.kills:
        with tempfile.TemporaryDirectory() as name:
            for row in trials(Path(name).resolve(), args.kills, args.seed):
                rows.append(row)
                print(f"{sum(len(row['kills']) for row in rows)} kills, {json.dumps(row)}", flush=True)
                if args.output:
                    with open(args.output, "a") as file:
                        file.write(json.dumps(row) + "\n")
    if args.output:
        rows = [json.loads(line) for line in args.output.read_text().splitlines()]
    print(table(rows))
    return 0 if all(row["same"] and not row["left"] and "faults" not in row for row in rows) else 1


def trials(folder: Path, n_kills: int, seed: int) -> Iterator[dict]:
    draw = random.Random(seed)
    (folder / "waiting.py").write_text(WAITING)
    out, known, tracing = folder / "out", {}, can_trace()
    all_cases = cases(folder)
    run(all_cases[2], out)  # starts the server of processes
    shutil.rmtree(out)
    while n_kills > 0:
        case = draw.choice(all_cases)
        if case.name not in known:
            known[case.name] = whole_run(case, out, tracing)
        row = try_once(case, out, draw, *known[case.name])
        n_kills -= len(row["kills"])
        yield row
        shutil.rmtree(out)


def whole_run(case: Case, out: Path, tracing: bool) -> tuple[list[Call], float, object]:
    """Its calls, how many seconds it takes, and its result."""
    start = time.monotonic()
    results = run(case, out)
    assert {result.returncode for result in results} == {0}, results
    seconds, whole = time.monotonic() - start, case.result(out)
    shutil.rmtree(out)
    calls = []
    if tracing:
        calls = calls_in(trace(case, out, out.parent / "waiting.py")[1], out)
        assert case.result(out) == whole
        shutil.rmtree(out)
    places = {(call.name, call.place) for call in calls}
    print(f"{case.name}: {seconds:.1f} s, {len(calls)} calls that change the disk, at {len(places)} places", flush=True)
    return calls, seconds, whole


def can_trace() -> bool:
    """Whether strace is there, and allowed to follow another process."""
    if shutil.which("strace"):
        command = ["strace", "-f", "-o", os.devnull, sys.executable, "-c", ""]
        if subprocess.run(command, timeout=60, capture_output=True).returncode == 0:
            return True
    print("no strace, or it may not trace: only drawn instants are tried", file=sys.stderr)
    return False


if __name__ == "__main__":
    raise SystemExit(main())
