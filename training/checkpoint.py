"""The states that a run can continue from, each in its own folder with a checksum, and whether a command may continue
it.

    checkpoints/step_1200/state.pth         everything that changes during a run (see `Distiller.state_dict`)
    checkpoints/step_1200/checksum.json     of that file, and its size

A checkpoint appears under its name whole or not at all. If it is damaged later, its checksum shows it, and the one
before it is used.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PretrainedConfig

from dataset import crc_of_file
from files.atomic import atomic_folder, old_folder
from files.json_reader import read_json
from models.families import DROPOUT
from training.flags import ARCHITECTURE
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


# ------------------------------------------------------------------------------------------- whether a run may continue
#
# It must be the run that was started; otherwise the result is meaningless. What a run reads is identified by content,
# not by name: a teacher whose weights were changed in place is a different one, and one that was moved is the same.

# Flags that may differ, because they don't change the result, or because the content of what they name is compared.
HARMLESS = {
    "command", "force", "resume", "dump_path", "log_interval", "checkpoint_interval", "keep_checkpoints", "num_workers",
    "on_full_disk", "max_bad_steps", "eval_interval", "teacher_type",
    "local_rank", "n_gpu", "fp16_opt_level", "peak_tflops", "dry_run", "data_file", "valid_data_file", "token_counts",
    "teacher_name", "tokenizer_name", "leave_out", "language", "license", "datasets",
}  # fmt: skip
# These say the student's shape, and matter only if it is another one.
OF_SHAPE = {*ARCHITECTURE, *DROPOUT, "student_type", "student_config"}
CONTENTS = {  # as named in parameters.json -> as named in messages
    "data": "the text of --data_file",
    "left_out": "the list of --leave_out",
    "valid_data": "the text of --valid_data_file",
    "masking": "the counts of --token_counts",
    "shape": "the student's shape",
    "teacher": "the weights of --teacher_name",
    "tokenizer": "the vocabulary of --tokenizer_name",
    "processes": "the number of processes",
}


# Of a configuration: where it was loaded from, which version wrote it, and how the table of positions begins.
NOT_OF_SHAPE = (
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "sinusoidal_pos_embds",
)  # fmt: skip


def fingerprint(tensors: Iterable[torch.Tensor]) -> int:
    """A checksum of their values."""
    crc = 0
    for tensor in filter(torch.Tensor.numel, tensors):  # an empty one has no bytes to view
        crc = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


def fingerprint_of_shape(config: PretrainedConfig) -> int:
    """A checksum of what makes a model's shape."""
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_OF_SHAPE}
    return zlib.crc32(json.dumps(values, sort_keys=True, default=str).encode())


def check_resume(old: dict, new: dict, uses_dropout: bool) -> None:
    """Compares the parameters of the run that was started with those of the command that continues it.

    Another number of processes is fine where these take the same batches a step. Dropout is drawn by each process for
    each of its micro-batches, so with it the draw differs: as random as before, but not bit-identical.

    Raises: InputError that names what differs, and what to give instead.
    """
    changed = {key for key in new if key in old and key not in HARMLESS and new[key] != old[key]}
    if "shape" not in changed:
        changed -= OF_SHAPE
    elif changed & OF_SHAPE:
        changed.remove("shape")  # the flags say it better
    if "processes" in changed:
        _check_processes(old, new)
        changed -= {"processes", "gradient_accumulation_steps"}
        if uses_dropout:
            logger.info("on %d processes instead of %d, dropout is drawn anew", new["processes"], old["processes"])
    if not uses_dropout:
        changed -= {"tokens_per_micro_batch", "padding_free"}
    if changed:
        changes = ", ".join(
            f"{CONTENTS.get(key, f'--{key}')} ({old[key]} then, {new[key]} now)" for key in sorted(changed)
        )
        raise InputError(
            f"--resume: this would change the result of the run in {new['dump_path']}: {changes}; start over with "
            f"--force."
        )


def _check_processes(old: dict, new: dict) -> None:
    batches = old["processes"] * old["gradient_accumulation_steps"]
    if new["processes"] * new["gradient_accumulation_steps"] == batches:
        return
    n, rest = divmod(batches, new["processes"])
    way_out = f"give --gradient_accumulation_steps {n}" if n and not rest else "choose a number that divides this"
    raise InputError(
        f"--resume: a step of the run in {new['dump_path']} takes {batches} batches; on {new['processes']} processes, "
        f"{way_out}."
    )
