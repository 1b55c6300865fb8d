"""The states that a run can continue from: the newest few, each in a folder of its own, with a checksum.

    checkpoints/step_1200/state.pth         everything that changes during a run (see `Distiller.state_dict`)
    checkpoints/step_1200/checksum.json     of that file, and its size

A checkpoint appears under its name whole or not at all. One that was damaged later is told by its checksum, and the one
before it is used.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from dataset import crc_of_file
from readers.json_reader import read_json
from training.folders import atomic_folder, old_folder
from utils import InputError, logger, reason_of

STATE, CHECKSUM = "state.pth", "checksum.json"
PREFIX = "step_"


def save_checkpoint(folder: Path, state: dict, keep: int) -> None:
    """Adds a checkpoint, then removes all but the newest.

    Args:
        folder: of the checkpoints.
        state: with its number under "step".
        keep: how many to keep.

    Raises: OSError; the checkpoints that were there are then untouched.
    """
    with atomic_folder(folder / f"{PREFIX}{state['step']}") as temporary:
        with open(temporary / STATE, "wb+") as file:
            torch.save(state, file)
            size = file.tell()
            file.flush()
            checksum = {"bytes": size, "crc32": crc_of_file(file, 0, size)}
        (temporary / CHECKSUM).write_text(json.dumps(checksum))
    for step in steps_of(folder)[:-keep]:
        _remove(folder / f"{PREFIX}{step}")


def _remove(checkpoint: Path) -> None:
    """At once under its name, so that half of a checkpoint is never found."""
    os.rename(checkpoint, old_folder(checkpoint))
    shutil.rmtree(old_folder(checkpoint))


def steps_of(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    names = [path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())


def load_newest(folder: Path) -> dict | None:
    """The newest intact state; None if there is no checkpoint. Those that are damaged are named in the log.

    Raises: InputError if all are damaged.
    """
    steps = steps_of(folder)
    for step in reversed(steps):
        checkpoint = folder / f"{PREFIX}{step}"
        try:
            return _load(checkpoint)
        except InputError as error:
            logger.warning("%s; the checkpoint before it is used", error)
    if steps:
        raise InputError(f"{folder} holds no intact checkpoint; start over with --force.")
    return None


def _load(checkpoint: Path) -> dict:
    file = checkpoint / STATE
    try:
        checksum = read_json(checkpoint / CHECKSUM, {"bytes": int, "crc32": int})
        size = file.stat().st_size
        with open(file, "rb") as opened:
            if [size, crc_of_file(opened, 0, size)] != [checksum["bytes"], checksum["crc32"]]:
                raise InputError(f"{file} is damaged: its checksum does not match")
        state = torch.load(file, map_location="cpu", weights_only=True)  # which refuses to run code
    except InputError:
        raise
    except Exception as error:  # unpickling garbage can raise nearly anything
        raise InputError(f"{file} is damaged ({reason_of(error)})") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int) or "student" not in state:
        raise InputError(f"{file} does not hold the state of a run")
    return state
