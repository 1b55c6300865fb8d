"""What the processes of a run share."""

import numpy as np
from conftest import ROOT
from processes import run_together

from training.distributed import World


def test_without_other_processes_nothing_is_written():
    made = {"a": np.arange(3)}
    assert World(device=None).make_once(lambda: made) is made


def test_processes_of_a_machine_share_what_is_made_once(tmp_path, workspace):
    """Only the first process of a machine makes the index; its files are gone afterwards."""
    code = f"""
import numpy as np
from training.distributed import init_world
world = init_world(0)
calls = []
def make():
    calls.append(1)
    return {{"a": np.arange(1000), "empty": np.zeros(0, np.int32)}}
arrays = world.make_once(make)
assert arrays["a"].sum() == 499500 and len(arrays["empty"]) == 0
open({str(tmp_path)!r} + f"/made-{{world.rank}}", "w").write(str(len(calls)))
world.close()"""
    (tmp_path / "share.py").write_text(code)
    (tmp_path / "tmp").mkdir()
    results = run_together(2, tmp_path / "share.py", PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path / "tmp"))
    assert [result.returncode for result in results] == [0, 0], results
    assert [(tmp_path / f"made-{rank}").read_text() for rank in (0, 1)] == ["1", "0"]
    assert not list((tmp_path / "tmp").glob("distil-*"))
