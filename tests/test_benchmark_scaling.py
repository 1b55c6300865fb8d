"""One process and several take the same steps, and the table has their times and waits side by side."""

import json

import benchmark_scaling
from benchmark_scaling import table_of
from processes import run_script, run_together
from workspace import ROOT

SCRIPT = ROOT / "scripts" / "benchmark_scaling.py"
FLAGS = ("--tiny", "--n_gpu", 0, "--n_steps", 2)


def line_of(results):
    assert [result.returncode for result in results] == [0] * len(results)
    (line,) = (line for result in results for line in result.stdout.splitlines() if line.startswith("{"))
    return json.loads(line)


def test_two_processes_take_the_steps_of_one():
    worker = {benchmark_scaling.WORKER: "1"}
    one = line_of([run_script(SCRIPT, *FLAGS, RANK="0", WORLD_SIZE="1", **worker)])
    two = line_of(run_together(2, SCRIPT, *FLAGS, **worker))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"] > 0
    assert one["waits"] == [0, 0, 0] and all(wait > 0 for wait in two["waits"])
    assert sum(two["waits"]) < two["seconds"]


def test_the_table():
    where = "CPU, float32"
    one = {"processes": 1, "seconds": 2.0, "tokens": 1000.0, "waits": [0.0, 0.0, 0.0], "where": where}
    four = {"processes": 4, "seconds": 1.0, "tokens": 1000.0, "waits": [0.25, 0.1, 0.0], "where": where}
    lines = table_of([one, four]).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        "4", "1.000", "1,000", "50%", "250.0 (25.0%)", "100.0 (10.0%)", "0.0 (0.0%)"
    ]  # fmt: skip


def test_under_a_launcher_there_is_one_line_for_all_processes():
    results = run_together(2, SCRIPT, *FLAGS)
    lines = [line for result in results for line in result.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines if "-" not in line] == ["processes", "2"]


def test_a_number_that_can_not_share_the_batches_is_refused():
    results = run_together(3, SCRIPT, *FLAGS)
    assert {result.returncode for result in results} == {2}
    assert sum("3 processes can't share 2 batches evenly" in result.stderr for result in results) == 1
