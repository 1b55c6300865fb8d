"""Processes that tests start. Each has a limit of time, and its process group ends when the test leaves it.

To import torch and transformers takes seconds, so the project's scripts are forked from one server process that has
imported them already (`multiprocessing`'s forkserver). Apart from that they run as from a shell: as `__main__`, with
an environment, a working folder and a process group of their own.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT = 200  # seconds, for slow machines; below the limit of a test, so that the group is ended before the test is
ROOT = Path(__file__).resolve().parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "transformers.models.bert.modeling_bert", "transformers"])


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


class Script:
    """A running script. `result()` waits for its end."""

    def __init__(self, process, output: Path, limit: float) -> None:
        self.process, self.output, self.limit = process, output, limit

    @property
    def is_running(self) -> bool:
        return self.process.exitcode is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # should it have died before it made its group

    def result(self) -> Result:
        """Raises: TimeoutError after the limit, with what the script has written."""
        self.process.join(self.limit)
        stdout, stderr = ((self.output / name).read_text() for name in ("stdout", "stderr"))
        if self.is_running:
            self.kill()
            raise TimeoutError(f"not ended within {self.limit} s: {self.process.name}\n{stdout}\n{stderr}")
        return Result(self.process.exitcode, stdout, stderr)


@contextlib.contextmanager
def running(script: Path, *arguments, cwd: Path = ROOT, limit: float = LIMIT, **environment: str) -> Iterator[Script]:
    """Starts `python script arguments`; its process group ends with the `with` block."""
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        for stream in ("stdout", "stderr"):
            (output / stream).touch()
        # PATH with this Python's folder first, as in an activated environment
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **environment}
        process = FORKSERVER.Process(
            target=_run, args=(str(script), arguments, str(cwd), environment, output), name=f"{script} {arguments}"
        )
        process.start()
        started = Script(process, output, limit)
        try:
            yield started
        finally:
            started.kill()
            process.join(10)


def run_script(script: Path, *arguments, **options) -> Result:
    with running(script, *arguments, **options) as started:
        return started.result()


def run_together(n: int, script: Path, *arguments, **options) -> list[Result]:
    """`n` processes with the environment that `torchrun --nproc_per_node n` would give them."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(running(script, *arguments, **options, **environment))
            for environment in environments(n)
        ]
        return [process.result() for process in started]


def environments(n: int) -> list[dict[str, str]]:
    """What `torchrun --nproc_per_node n` would add to the environment of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]


def _run(script: str, arguments: list[str], cwd: str, environment: dict[str, str], output: Path) -> None:
    os.setsid()
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / stream, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    sys.path[:0] = [
        *filter(None, environment.get("PYTHONPATH", "").split(":")),
        os.path.dirname(os.path.abspath(script)),
    ]
    runpy.run_path(script, run_name="__main__")


def run_command(command: list | str, limit: float = LIMIT, **options) -> Result:
    """Any command: a list of words, or a line for the shell. Raises: TimeoutError after the limit."""
    if not isinstance(command, str):
        command = [str(word) for word in command]
    process = subprocess.Popen(
        command, shell=isinstance(command, str), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"not ended within {limit} s: {command}\n{error.stdout}\n{error.stderr}") from None
    finally:
        _end_group(process)
    return Result(process.returncode, stdout, stderr)


def _end_group(process: subprocess.Popen) -> None:
    """Ends the process, its group, and its descendants: torchrun gives each of its processes a group of its own."""
    import psutil

    descendants = []
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    process.wait(10)
