"""Whether a run may continue: it must be the run that was started. Otherwise the result is meaningless.

What a run reads is told by its content, not by its name: a teacher whose weights were changed in place is another one,
and one that was moved is the same.
"""

import json
import zlib
from collections.abc import Iterable

import torch
from transformers import PretrainedConfig

from models.families import DROPOUT
from training.flags import ARCHITECTURE
from utils import InputError, logger

# Flags that may differ, because they don't change the result, or because the content of what they name is compared.
HARMLESS = {
    "command", "force", "resume", "dump_path", "log_interval", "checkpoint_interval", "keep_checkpoints", "num_workers",
    "on_full_disk", "max_bad_steps", "eval_interval", "teacher_type",
    "local_rank", "n_gpu", "fp16_opt_level", "peak_tflops", "dry_run", "data_file", "valid_data_file", "token_counts",
    "teacher_name", "tokenizer_name", "leave_out",
}  # fmt: skip
# These say the student's shape, and matter only if it is another one.
OF_SHAPE = {*ARCHITECTURE, *DROPOUT, "student_type", "student_config"}
CONTENTS = {  # as they stand in parameters.json -> what is said of them
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
            logger.info("on %d processes in place of %d, dropout is drawn anew", new["processes"], old["processes"])
    if not uses_dropout:
        changed.discard("tokens_per_micro_batch")
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
