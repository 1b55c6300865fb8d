"""What a run leaves in `dump_path`: the model, its card, the metrics, and the state to continue from.

    config.json model.safetensors + the tokenizer's files     what `from_pretrained` reads
    checkpoint.pth, model_epoch_N.pth                          the student's state dict: newest, and after each epoch
    checkpoints/step_N                                         all that `train.py --resume` continues from
    best                                                       the model of the best held-out loss, as above
    metrics.jsonl, log/train                                   one JSON object a record; the same for TensorBoard
    parameters.json, git_log.json                              flags and code of the run
    README.md                                                  the model card

Every file appears whole or not at all.
"""

import json
import os
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel

from files.atomic import (
    atomic_folder,
    atomic_write,
    lock,
    naming_write_errors,
    old_folder,
    remove,
    replacing_files,
    unfinished,
    write_json,
)
from files.json_reader import read_json
from files.paths import check_output_folder
from models.loading import save_weights
from models.sentence_encoder import DENSE_FILE, DENSE_FOLDER, dense_file
from training import model_card
from training.checkpoint import load_newest, save_checkpoint, steps_of
from training.metrics_files import METRICS, MetricsFiles, read_metrics
from utils import InputError, RunError, logger, reason_of

CHECKPOINTS, BEST = "checkpoints", "best"
PARAMETERS = "parameters.json"  # a folder that holds it is a run's output
FIRST_CHECKPOINT = "first_checkpoint"  # in it: the step of the first checkpoint, from then on
TEXT, TEXTS = (str, None), ([str], None)
FLAGS = {  # in PARAMETERS, of those that others ask for
    "command": str, "data_file": [str], "valid_data_file": TEXTS, "valid_share": float, "teacher_name": TEXT,
    "token_counts": TEXT, "processes": int, "gradient_accumulation_steps": int,
}  # fmt: skip
UNFINISHED = ".*.tmp"
OUTPUT_FILES = (  # --force removes these and nothing else, and writes PARAMETERS anew
    METRICS, CHECKPOINTS, BEST, "git_log.json", "checkpoint.pth", "model_epoch_*.pth",
    "log/train/events.out.*", "README.md", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer*.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "*_Pooling",
    DENSE_FOLDER, UNFINISHED,
)  # fmt: skip


class RunFolder:
    """Writes the files of one run; used by the master process only.

    Args:
        path: `--dump_path`.
        parameters: every flag's value, for parameters.json and the card.
        tokenizer: what the model's users will need.
        beside_model: more of that, path -> contents of a JSON file.
        keep_checkpoints: how many of the newest.
    """

    def __init__(
        self,
        path: str | Path,
        parameters: dict,
        tokenizer,
        keep_checkpoints: int,
        beside_model: dict[str, object] | None = None,
    ) -> None:
        self.path, self.parameters, self.tokenizer = Path(path), parameters, tokenizer
        self.keep_checkpoints, self.beside_model = keep_checkpoints, beside_model or {}
        self._lock: int | None = None

    def start(self, resumed_at: int | None = None) -> None:
        """Makes the folder ready for a run. Nothing is written, and nothing of an older run removed, before this.

        Args:
            resumed_at: the step after which a resumed run continues; None for a new one, which removes an old one's
                files.

        Raises: InputError if another process writes to this folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_folder()
        if resumed_at is None:
            _clear(self.path, OUTPUT_FILES)  # not PARAMETERS: stopped here, the folder is still known as a run's
        else:
            self.parameters[FIRST_CHECKPOINT] = resumed_at
            best = self.path / BEST
            if not best.exists() and old_folder(best).exists():  # killed between two renames
                os.rename(old_folder(best), best)
            _clear(self.path, (UNFINISHED, f"{CHECKPOINTS}/{UNFINISHED}"))  # what a killed process left
            _rewind_metrics(self.path / METRICS, resumed_at)
        write_json(self.path / PARAMETERS, self.parameters)
        write_json(self.path / "git_log.json", git_log(Path(__file__).parent))
        with naming_write_errors(self.path):
            self._save_beside_model(self.path)
        self.metrics = MetricsFiles(self.path.absolute(), resumed_at)

    def _lock_folder(self) -> None:
        """Locks it while this process lives. The lock is on the folder itself, so no lock file is left behind."""
        self._lock = os.open(self.path, os.O_RDONLY)
        lock(self._lock, self.path)

    def log_metrics(self, kind: str, step: int, tokens: int, metrics: dict[str, float | None]) -> None:
        """See `MetricsFiles.append`."""
        self.metrics.append(kind, step, tokens, metrics)

    def save(self, model: PreTrainedModel, state: dict, epoch: int | None) -> None:
        """The model in every form, then the checkpoint: a checkpoint is never next to an older model.

        Raises: RunError if it can't be written; the files that stood there before are then whole.
        """
        names = ["checkpoint.pth"] + ([] if epoch is None else [f"model_epoch_{epoch}.pth"])
        try:
            for name in names:
                self._save_tensors(name, state["student"])
            with replacing_files(self.path) as temporary:
                save_weights(model, temporary)
            self._save_dense(self.path, state["widening"])
            card = model_card.make_card(
                self.path.resolve().name, model, self.parameters, read_metrics(self.path / METRICS)
            )
            with atomic_write(self.path / "README.md", "w") as file:
                file.write(str(card))
            self.metrics.sync()
            save_checkpoint(self.path / CHECKPOINTS, state, self.keep_checkpoints)
            if FIRST_CHECKPOINT not in self.parameters:
                self.parameters[FIRST_CHECKPOINT] = state["step"]
                write_json(self.path / PARAMETERS, self.parameters)
        except OSError as error:
            raise RunError(
                f"the checkpoint of step {state['step']} could not be written to {self.path} ({reason_of(error)}); the "
                f"one before it is kept: make room, and continue with --resume."
            ) from None

    def save_best(self, model: PreTrainedModel, widening: dict) -> None:
        """The model with the best held-out loss so far, for `from_pretrained`, and what widens its hidden states.

        Raises: RunError as `save`.
        """
        best = self.path / BEST
        try:
            with atomic_folder(best) as temporary:
                save_weights(model, temporary)
                self._save_beside_model(temporary)
                self._save_dense(temporary, widening)
        except OSError as error:
            raise RunError(f"{best} could not be written ({reason_of(error)}); make room, and use --resume.") from None

    def _save_beside_model(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        for name, contents in self.beside_model.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_json(folder / name, contents)

    def _save_dense(self, folder: Path, widening: dict) -> None:
        if f"{DENSE_FOLDER}/config.json" in self.beside_model:
            with atomic_write(folder / DENSE_FILE) as file:
                file.write(dense_file(widening["linear.weight"]))

    def _save_tensors(self, name: str, value: dict) -> None:
        with atomic_write(self.path / name) as file:
            torch.save(value, file)

    def close(self) -> None:
        self.metrics.close()
        os.close(self._lock)


# ------------------------------------------------------------------------------------------ before a run: what is there


def check_dump_path(path: str | Path, force: bool, resume: bool, inputs: list[str]) -> None:
    """Raises InputError unless the run may write here. Removes nothing.

    Args:
        inputs: files and folders that this run reads; none may lie in a folder that will be overwritten.
    """
    path = Path(path)
    check_output_folder(path, "--dump_path")
    held = {file.name for file in path.iterdir()} if path.exists() else set()
    if held <= {unfinished(path / PARAMETERS).name} or (resume and steps_of(path / CHECKPOINTS)):
        return  # nothing, or what is left of a run that was killed at once
    if not force and not resume:
        raise InputError(
            f"--dump_path {path} already exists: add --force to overwrite the run in it, --resume to continue it, "
            f"or give another folder."
        )
    if not (path / PARAMETERS).is_file():
        raise InputError(
            f"--dump_path {path} is not the output of a run (no {PARAMETERS}), so nothing is written there."
        )
    for given in inputs:
        if Path(given).exists() and Path(given).resolve().is_relative_to(path.resolve()):
            raise InputError(f"--dump_path {path} holds {given}, which this run reads; give another folder.")


def _clear(folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        remove(*folder.glob(pattern))


def load_parameters(path: str | Path) -> dict:
    """The flags of the run in this folder."""
    return read_json(Path(path) / PARAMETERS, FLAGS, "give the dump_path of a run, or start it over with --force")


def load_state(path: str | Path) -> dict | None:
    """The state to continue from, or None if the run has saved none yet.

    Raises: InputError if all are damaged, or were removed.
    """
    state = load_newest(Path(path) / CHECKPOINTS)
    if state is None and (Path(path) / PARAMETERS).is_file() and FIRST_CHECKPOINT in load_parameters(path):
        raise InputError(
            f"--resume: the run in {path} had checkpoints, but there are none left, so it can't continue; start over "
            f"with --force, which also removes its model, or give another --dump_path."
        )
    return state


def _rewind_metrics(file: Path, step: int) -> None:
    """Drops the records after `step`, which a resumed run writes again, and a last line that a kill cut short."""
    records = read_metrics(file) if file.exists() else []
    with atomic_write(file, "w") as out:
        out.writelines(json.dumps(record) + "\n" for record in records if record["step"] <= step)


def git_log(folder: str | Path) -> dict[str, str | bool | None]:
    """Which code this is: commit, branch and whether the files differ from it; what is unknown is None."""
    state: dict[str, str | bool | None] = {"repo_sha": None, "repo_branch": None, "repo_dirty": None}
    try:
        import git

        repository = git.Repo(folder, search_parent_directories=True)
        state["repo_dirty"] = repository.is_dirty()
        state["repo_sha"] = repository.head.commit.hexsha
        state["repo_branch"] = None if repository.head.is_detached else repository.active_branch.name
    except ImportError as error:  # gitpython looks for the git program as soon as it is imported
        warnings.warn(f"git is not installed, so git_log.json stays empty ({error.__class__.__name__})", stacklevel=2)
    except (git.GitError, ValueError) as error:  # a copy without .git; a repository without commits
        logger.info("no git commit to note in git_log.json: %s", error or "not a git repository")
    return state
