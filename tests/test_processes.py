"""The tests' own tools: whatever a test starts ends with it."""

import os
import time
from pathlib import Path

import pytest
from processes import run_command, run_script, run_together, running


def assert_gone(pid_file: Path) -> None:
    pid = int(pid_file.read_text())
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.01)
    pytest.fail(f"{pid} still runs")


def test_a_command_that_hangs_ends_with_its_group(tmp_path):
    with pytest.raises(TimeoutError, match="not ended within"):
        run_command(f"sleep 100 & echo $! > {tmp_path}/pid; sleep 100", limit=0.5)
    assert_gone(tmp_path / "pid")


def test_a_script_that_hangs_ends_with_its_group(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text("import subprocess, time; print(subprocess.Popen(['sleep', '100']).pid, file=open('pid', 'w'))\n"
                      "print('it was here', flush=True); time.sleep(100)")  # fmt: skip
    with pytest.raises(TimeoutError, match=r"hangs\.py.*\n.*it was here"):
        run_script(script, cwd=tmp_path, limit=2)
    assert_gone(tmp_path / "pid")


def test_leaving_the_block_ends_the_script(tmp_path):
    script = tmp_path / "sleeps.py"
    script.write_text("import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(100)")
    with running(script, cwd=tmp_path) as sleeping:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert sleeping.is_running
            time.sleep(0.01)
    assert_gone(tmp_path / "pid")


def test_a_script_runs_as_from_a_shell(tmp_path):
    (tmp_path / "beside.py").write_text("name = __name__")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, beside\n"
        "print(__name__, beside.name, sys.argv[1:], os.getcwd(), os.environ['GREETING'])\n"
        "print('failed', file=sys.stderr)\n"
        "raise SystemExit(3)"
    )
    result = run_script(script, "a", 1, cwd=tmp_path, GREETING="hello")
    assert result.returncode == 3
    assert result.stdout.split("\n")[0] == f"__main__ beside ['a', '1'] {os.path.realpath(tmp_path)} hello"
    assert result.stderr == "failed\n"
    assert [r.returncode for r in run_together(2, script, GREETING="")] == [3, 3]
