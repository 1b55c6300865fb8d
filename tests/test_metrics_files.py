"""A full disk costs the metrics nothing, and the run no more than its checkpoints meanwhile."""

import pytest
import torch
from workspace import rows_of, train, weights_of

import distiller
from training import metrics_files
from training.checkpoint import steps_of


@pytest.mark.parametrize("mode", ["stop", "continue"])
def test_a_full_disk_stops_the_run_or_its_checkpoints(workspace, tmp_path, capsys, monkeypatch, mode):
    """The disk is full while steps 4 to 9 are done."""
    small_steps = ["--gradient_accumulation_steps", 2]
    train(workspace, tmp_path / "whole", *small_steps)
    now, is_made_room = [0], False
    step, save = distiller.Distiller.step, torch.save

    def note_step(self, micro_batches, counts):
        finished = step(self, micro_batches, counts)
        now[:] = [self.n_done]
        return finished

    def is_full():
        return 4 <= now[0] < 10 and not is_made_room

    def save_if_there_is_room(value, file):
        if is_full():
            raise OSError(28, "No space left on device")
        save(value, file)

    class Disk:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:7] if is_full() else data)  # a disk takes what still fits

        def __getattr__(self, name):
            return getattr(self.file, name)

    init = metrics_files.PatientFile.__init__

    def init_on_the_disk(self, path):
        init(self, path)
        self._file = Disk(self._file)

    monkeypatch.setattr(metrics_files.PatientFile, "__init__", init_on_the_disk)
    monkeypatch.setattr(distiller.Distiller, "step", note_step)
    monkeypatch.setattr(torch, "save", save_if_there_is_room)
    folder = tmp_path / "run"
    flags = [*small_steps, "--checkpoint_interval", 2, "--on_full_disk", mode]
    capsys.readouterr()
    train(workspace, folder, *flags, expect=1 if mode == "stop" else 0)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "the checkpoint of step 4 could not be written" in error
    if mode == "stop":
        assert steps_of(folder / "checkpoints") == [2]
        is_made_room = True
        train(workspace, folder, *flags, "--resume")
    else:
        assert error.count("--on_full_disk continue: trying again") == 3
    assert rows_of(folder) == rows_of(tmp_path / "whole")
    saved, whole = weights_of(folder), weights_of(tmp_path / "whole")
    assert all(torch.equal(saved[name], whole[name]) for name in whole)
    if mode == "continue":
        sizes = [next((run / "log" / "train").iterdir()).stat().st_size for run in (folder, tmp_path / "whole")]
        assert sizes[0] == pytest.approx(sizes[1], abs=100)  # times and names differ
