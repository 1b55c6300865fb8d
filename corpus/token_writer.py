"""Writes a binarized file (see `dataset` for its layout) as a stream that can be interrupted and continued."""

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataset import (
    CHUNK,
    FORMAT,
    MAGIC,
    TRAILER,
    crc_of_file,
    head,
    middle,
    partial_folder,
    tail,
    token_dtype,
)
from files.atomic import fsync_folder, lock, write_json
from files.json_reader import read_json
from utils import InputError, RunError, logger

PROGRESS = "progress.json"  # in the folder of an unfinished file
STATE = {
    "made_by": dict,
    "n_sequences": int,
    "n_tokens": int,
    "crc32": {"tokens": int, "offsets": int},
    "progress": dict,
}


@contextlib.contextmanager
def write_token_file(path: str | Path, made_by: dict, resume: bool = False) -> Iterator["TokenFileWriter"]:
    """A file that appears under its name when the `with` block ends without an error.

    Memory does not grow with it: tokens and offsets go straight to the folder `<path>.partial`. What was written up to
    a call of the writer's `checkpoint` outlives any end of the process. The finished bytes depend on the sequences and
    the tokenizer alone, not on how often the writing was interrupted.

    Args:
        path: the file to make.
        made_by: the description of the tokenizer (`describe_tokenizer`).
        resume: continue from the last checkpoint, if there is one; otherwise start over.

    Raises:
        InputError: the file can't be written there; another process is writing it; the unfinished file is damaged.
        RunError: no room is left on the disk.
    """
    writer = TokenFileWriter(Path(path), made_by, resume)
    try:
        yield writer
        writer.finish()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"no room is left on the disk for {path}; make room, then continue.") from None
    finally:
        writer.close()


class TokenFileWriter:
    """See `write_token_file`, which makes and ends it.

    Attributes:
        progress: what the last `checkpoint` was given, if the writing is resumed; otherwise None.
        n_sequences, n_tokens: written so far.
    """

    def __init__(self, path: Path, made_by: dict, resume: bool) -> None:
        self.path, self.made_by = path, made_by
        self.folder = partial_folder(path)
        self.dtype = token_dtype(made_by["vocab_size"])
        self.n_sequences = self.n_tokens = 0
        self.progress: dict | None = None
        self._crc = {"tokens": 0, "offsets": 0}
        if path.is_dir():
            raise InputError(f"{path} is a folder; give another name for the file to make.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file, self._offsets = (self._open(name) for name in ("tokens", "offsets"))
        except OSError as error:
            raise InputError(f"{path} can't be written ({error.strerror}); choose another place.") from None
        lock(self._file, path)
        if resume and self.has_checkpoint:
            self._continue()
            return
        if self.has_checkpoint:
            logger.info("starting over: discarding what an interrupted run left in %s", self.folder)
        self._begin()

    def _open(self, name: str) -> BinaryIO:
        return os.fdopen(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # empties nothing

    @property
    def has_checkpoint(self) -> bool:
        return (self.folder / PROGRESS).is_file()

    def _begin(self) -> None:
        (self.folder / PROGRESS).unlink(missing_ok=True)
        for file in (self._file, self._offsets):
            file.truncate(0)
        self._file.write(head(0))
        self._write_offsets(np.zeros(1, "<i8"))

    def _continue(self) -> None:
        state = read_json(self.folder / PROGRESS, STATE, "start over without --resume", "--resume:")
        self.n_sequences, self.n_tokens, self._crc = state["n_sequences"], state["n_tokens"], state["crc32"]
        self.progress = state["progress"]
        if state["made_by"] != self.made_by:
            raise InputError(f"--resume: {self.folder} was made with another tokenizer; leave out --resume.")
        begin = {"tokens": len(head(0)), "offsets": 0}
        end = {"tokens": begin["tokens"] + self.n_tokens * self.dtype.itemsize, "offsets": (self.n_sequences + 1) * 8}
        for name, file in (("tokens", self._file), ("offsets", self._offsets)):
            if file.seek(0, os.SEEK_END) < end[name] or crc_of_file(file, begin[name], end[name]) != self._crc[name]:
                raise InputError(f"--resume: {self.folder / name} is damaged; start over without --resume.")
            file.truncate(end[name])
            file.seek(end[name])

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Adds `len(lengths)` sequences whose ids follow one another in `ids`, (sum(lengths),) integers."""
        assert ids.size == lengths.sum()
        if ids.size and not (ids.min() >= 0 and ids.max() < self.made_by["vocab_size"]):
            raise InputError(
                f"{self.path}: token ids run from {ids.min()} to {ids.max()}, "
                f"but the vocabulary has {self.made_by['vocab_size']} entries."
            )
        data = np.ascontiguousarray(ids, self.dtype)
        self._file.write(data)
        self._crc["tokens"] = zlib.crc32(data, self._crc["tokens"])
        self._write_offsets(self.n_tokens + np.cumsum(lengths, dtype="<i8"))
        self.n_tokens += ids.size
        self.n_sequences += len(lengths)

    def _write_offsets(self, offsets: np.ndarray) -> None:
        self._offsets.write(offsets)
        self._crc["offsets"] = zlib.crc32(offsets, self._crc["offsets"])

    def checkpoint(self, progress: dict) -> None:
        """Makes sure that writing can continue from here; `progress` is for the caller to know where that is."""
        for file in (self._file, self._offsets):
            file.flush()
            os.fsync(file.fileno())
        state = {"made_by": self.made_by, "n_sequences": self.n_sequences, "n_tokens": self.n_tokens}
        write_json(self.folder / PROGRESS, {**state, "crc32": self._crc, "progress": progress})

    def finish(self) -> None:
        """Puts the parts together under the file's name: the tokens lie already behind a head of the right length."""
        if self.n_sequences == 0:
            raise InputError(f"{self.path} was not written: there is not one sequence to put into it.")
        file, tokens_bytes = self._file, self.n_tokens * self.dtype.itemsize
        offsets_bytes = (self.n_sequences + 1) * 8
        tokens_at = len(head(0))
        file.write(middle(tokens_at + tokens_bytes, self.dtype, offsets_bytes))
        offsets_at = file.tell()
        self._offsets.seek(0)
        shutil.copyfileobj(self._offsets, file, CHUNK)
        file.write(tail(self.n_sequences))
        footer = {
            "format": FORMAT,
            **self.made_by,
            "dtype": self.dtype.str,
            "n_sequences": self.n_sequences,
            "n_tokens": self.n_tokens,
            "tokens_at": tokens_at,
            "offsets_at": offsets_at,
            "crc32": self._crc,
        }
        data = json.dumps(footer).encode()
        file.write(data + TRAILER.pack(zlib.crc32(data), len(data), MAGIC))
        file.seek(0)
        file.write(head(tokens_bytes))  # the length is known only now
        file.flush()
        os.fsync(file.fileno())
        os.replace(self.folder / "tokens", self.path)
        fsync_folder(self.path.parent)

    def close(self) -> None:
        for file in (self._file, self._offsets):
            with contextlib.suppress(OSError):  # the last flush hits the full disk again, which has been reported
                file.close()
        if self.has_checkpoint and is_unfinished(self.path):
            logger.warning("unfinished: what is done lies in %s, and --resume continues from there", self.folder)
        else:
            shutil.rmtree(self.folder)


def is_unfinished(path: str | Path) -> bool:
    """Whether the writing of this file was begun and interrupted."""
    return (partial_folder(path) / "tokens").exists()
