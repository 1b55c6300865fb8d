"""The metrics of a run: metrics.jsonl, and the same for TensorBoard.

If the disk is full for a while, no record is lost or torn, and training neither stops nor hangs.
"""

import errno
import json
import os
from pathlib import Path

from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory

from files.json_reader import read_json_lines

TRAINING_MASKS = "training_masks_"  # begins the names of held-out figures where words are masked as in training
METRICS = "metrics.jsonl"
RECORD = {"kind": str, "step": int, "tokens": int, ...: (float, None)}
SCHEME = "patient"


class PatientFile:
    """A file to append to. What can't be written yet is kept for the next time, and nothing is written by half."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._size = self._file.tell()
        self.waiting = b""

    def write(self, data: bytes) -> None:
        self.waiting += data

    def flush(self) -> None:
        try:
            written = self._file.write(self.waiting)
        except OSError:
            written = 0
        if written == len(self.waiting):
            self._size += written
            self.waiting = b""
        else:
            self._file.truncate(self._size)

    def sync(self) -> None:
        """Raises: OSError if something is waiting for room."""
        self.flush()
        if self.waiting:
            raise OSError(errno.ENOSPC, "no room left on the disk")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


class PatientFileFactory:
    """Lets tensorboardX write through a PatientFile. Its own writer dies of a full disk, in a thread that the training
    then waits for without end."""

    def open(self, path: str) -> PatientFile:
        return PatientFile(path.removeprefix(f"{SCHEME}://"))

    def directory_check(self, path: str) -> None:
        Path(path.removeprefix(f"{SCHEME}://")).mkdir(parents=True, exist_ok=True)


class MetricsFiles:
    """Both files of one run.

    Args:
        folder: `--dump_path`, as an absolute path.
        resumed_at: the step after which a resumed run continues; None for a new one.
    """

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        register_writer_factory(SCHEME, PatientFileFactory())
        log = f"{SCHEME}://{folder / 'log' / 'train'}"
        self._tensorboard = SummaryWriter(log, purge_step=resumed_at)
        self._records = PatientFile(folder / METRICS)

    def append(self, kind: str, step: int, tokens: int, metrics: dict[str, float | None]) -> None:
        """One record, and one point in each plot. `kind`: train or valid; a value of None: unknown."""
        record = {"kind": kind, "step": step, "tokens": tokens, **metrics}
        self._records.write(json.dumps(record).encode() + b"\n")
        self._records.flush()
        for name, value in metrics.items():
            if value is not None:
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Makes sure that all records are on the disk. Raises: OSError if there is no room for them."""
        self._tensorboard.flush()
        self._records.sync()

    def close(self) -> None:
        self._records.close()
        self._tensorboard.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl. Raises: InputError if it is missing or no such file."""
    return read_json_lines(path, RECORD, "give the dump_path of a run, or start it over with --force")
