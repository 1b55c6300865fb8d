"""Text becomes shards in a pipeline of datatrove, on this machine or under Slurm, however often it is killed:
`bash scripts/test.sh --clients`."""

import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import token_counts
from processes import LIMIT, run_command, running
from workspace import ROOT, load_tokenizer, make_text, run, train

from corpus.files import open_corpus

PREPARE = ROOT / "scripts" / "cluster" / "prepare.py"
SBATCH = """#!/bin/bash
# Stands in for Slurm: runs the jobs of the array that it is given one after the other. Dependencies are done by then.
script=$(cat "${@: -1}")
[[ $script == *launch_pickled_pipeline* ]] || { echo "Submitted batch job 2"; exit; }
last=$(grep -oP '(?<=#SBATCH --array=0-)\\d+' <<<"$script")
export SLURM_NODELIST=here SLURM_JOB_ID=1 RUN_OFFSET=0
for SLURM_ARRAY_TASK_ID in $(seq 0 "$last"); do
    export SLURM_ARRAY_TASK_ID
    bash -c "$script" >&2 || exit 1
done
echo "Submitted batch job 1"
"""
SRUN = '#!/bin/bash\nexec "${@:4}"\n'  # srun -l -n 1 command
SCONTROL = "#!/bin/bash\necho here\n"


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    """4 files of 30 documents, some of which occur twice."""
    folder = tmp_path_factory.mktemp("crawl")
    documents = ["\n".join(make_text(12, seed).splitlines()) for seed in range(120)]
    for k in range(4):
        texts = documents[30 * k : 30 * k + 30] + documents[:4]
        scores = [i / len(texts) for i in range(len(texts))]
        columns = {"text": texts, "language": ["en" if i % 3 else "de" for i in range(len(texts))], "score": scores}
        pq.write_table(pa.table(columns), folder / f"{k}.parquet")
    return folder


@pytest.fixture
def flags(workspace, crawl, tmp_path):
    lines = [line for file in sorted(crawl.glob("*")) for line in pq.read_table(file)["text"][5].as_py().splitlines()]
    (tmp_path / "dev.txt").write_text(lines[0])
    return ["--source", crawl, "--tokenizer_name", workspace / "bert-base-uncased", "--target_length", 40,
            "--where", "language == en", "score >= 0.1", "--against", tmp_path / "dev.txt"]  # fmt: skip


def prepare(*flags, expect=0, **environment):
    result = run_command([sys.executable, PREPARE, *flags], limit=4 * LIMIT, env={**os.environ, **environment})
    assert result.returncode == expect, result.stderr[-3000:]
    return result.stderr


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("text.*")) if path.is_file()}


def test_shards_hold_what_was_asked_for_and_can_be_trained_on(workspace, tmp_path, flags, crawl):
    prepare(*flags, "--dump_file", tmp_path / "text", "--workers", 2)
    tokenizer, pattern = load_tokenizer(workspace / "bert-base-uncased"), tmp_path / "text.*.pickle"
    found = " ".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in open_corpus([str(pattern)]))
    for file in sorted(crawl.glob("*")):
        table = pq.read_table(file).to_pylist()
        for row in table:
            first = row["text"].splitlines()[0].lower().rstrip(".")
            wanted = row["language"] == "en" and row["score"] >= 0.1
            if not wanted and sum(first in other["text"].lower() for other in table) == 1:
                assert first not in found
    assert (tmp_path / "dev.txt").read_text().lower().rstrip(".") not in found
    run(token_counts, "--data_file", pattern, "--token_counts_dump", tmp_path / "counts.pickle")
    counted = np.bincount(np.concatenate([*open_corpus([str(pattern)])]), minlength=len(tokenizer))
    assert pickle.loads((tmp_path / "counts.pickle").read_bytes()) == counted.tolist()
    train(workspace, tmp_path / "run", "--data_file", pattern, "--token_counts", tmp_path / "counts.pickle")
    prepare(*flags, "--dump_file", tmp_path / "text", "--target_length", 50, expect=2)


def test_the_command_of_the_docs(workspace, tmp_path, crawl):
    (command,) = re.findall(
        r"^    (python scripts/cluster/.*)$", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE
    )
    (tmp_path / "crawl").mkdir()
    for file in crawl.glob("*"):
        table = pq.read_table(file)
        names = ["language_score" if name == "score" else name for name in table.column_names]
        pq.write_table(table.rename_columns(names), tmp_path / "crawl" / file.name)
    (tmp_path / "glue" / "CoLA").mkdir(parents=True)
    (tmp_path / "glue" / "CoLA" / "dev.tsv").write_text("1\tthe cat sees the garden near the long road today\n")
    (tmp_path / "bert-base-uncased").symlink_to(workspace / "bert-base-uncased")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = run_command(command, limit=4 * LIMIT, cwd=tmp_path, env={**os.environ, "PATH": path})
    assert result.returncode == 0, result.stderr
    assert len(open_corpus([str(tmp_path / "data" / "crawl.*.pickle")]).files) == 4


def test_killed_at_three_places_it_ends_in_the_same_shards(tmp_path, flags):
    flags = [*flags, "--drop_duplicates", "--workers", 2]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    prepare(*flags, "--dump_file", tmp_path / "whole" / "text")
    target = tmp_path / "killed" / "text"
    for stage, n in (("signatures", 1), ("buckets", 3), ("shards", 1)):
        with running(PREPARE, *flags, "--dump_file", target) as preparation:
            deadline = time.monotonic() + 2 * LIMIT
            while len([*tmp_path.glob(f"killed/*/{stage}/completions/*")]) < n:
                assert time.monotonic() < deadline and preparation.is_running
                time.sleep(0.01)
            os.killpg(preparation.process.pid, signal.SIGKILL)
    prepare(*flags, "--dump_file", target)
    assert shards(target.parent) == shards(tmp_path / "whole")
    assert len(shards(target.parent)) == 8


def test_slurm_makes_the_same_shards(tmp_path, flags):
    commands = tmp_path / "commands"
    for folder in ("here", "there", "commands"):
        (tmp_path / folder).mkdir()
    for name, content in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(content)
        (commands / name).chmod(0o755)
    prepare(*flags, "--dump_file", tmp_path / "here" / "text")
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    prepare(*flags, "--dump_file", tmp_path / "there" / "text", "--slurm", "--partition", "nodes", PATH=path)
    assert shards(tmp_path / "there") == shards(tmp_path / "here")
    (script,) = tmp_path.glob("there/*/shards/launch_script.slurm")
    assert "#SBATCH --partition=nodes" in script.read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--glob", "*.txt"], "has no file that matches --glob"),
        (["--source", "nowhere"], "has no file that matches"),
        (["--where", "language is en"], "is not a condition such as"),
        (["--where", "quality > 1"], "there is no column quality; there are language"),
        (["--where", "language > 1"], "language holds 'de', of which > 1 makes no sense"),
        (["--text_column", "content"], "is it in --text_column content?"),
        (["--tokenizer_name", "nowhere"], "no tokenizer in nowhere"),
    ],
)
def test_mistakes(tmp_path, flags, changes, message):
    last = prepare(*flags, "--dump_file", tmp_path / "text", *changes, expect=2).splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_damaged_file_is_named_and_the_rest_is_kept(tmp_path, flags, crawl):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in crawl.glob("*"):
        (broken / file.name).write_bytes(file.read_bytes()[: -500 if file.name == "2.parquet" else None])
    flags = [*flags, "--source", broken, "--dump_file", tmp_path / "text", "--workers", 1]
    last = prepare(*flags, expect=1).splitlines()[-1]
    assert last.startswith("error: a task failed (") and "the same command continues" in last
    (broken / "2.parquet").write_bytes((crawl / "2.parquet").read_bytes())
    prepare(*flags)
    assert len(shards(tmp_path)) == 8
