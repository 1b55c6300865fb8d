"""How a sentence encoder makes one vector of a text, as the files of sentence-transformers beside it have it:
`modules.json` lists the steps, which are the model itself, the pooling of its tokens, and often a normalization.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.functional import normalize
from transformers.utils import cached_file

from files.json_reader import read_json
from utils import InputError, logger, reason_of

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"  # such as what to write before a query
KNOWN = ("Transformer", "Pooling", "Normalize")  # steps without weights of their own
MODE = "pooling_mode"
# Until version 5 each mode had a key of its own, which all versions read, and other software looks for.
KEYS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens",
        "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
        "weightedmean": "pooling_mode_weightedmean_tokens", "lasttoken": "pooling_mode_lasttoken"}  # fmt: skip
DENSE, DENSE_FOLDER, WEIGHTS = "Dense", "2_Dense", "model.safetensors"
DENSE_FILE = f"{DENSE_FOLDER}/{WEIGHTS}"
QUIETLY = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
EXPECTED = ("cls", "mean")  # those whose keys Text Embeddings Inference does not do without


@dataclass(frozen=True)
class Pooling:
    """Makes one vector of a text's hidden states.

    Attributes:
        mode: "mean" of its tokens, or the first of them, "cls".
        normalized: whether vectors have the length 1.
        dense: (width of the vectors, dim) what the pooled states are multiplied by, if by anything.
    """

    mode: str = "mean"
    normalized: bool = False
    dense: torch.Tensor | None = field(default=None, compare=False)

    def __call__(self, hidden: torch.Tensor, attended: torch.Tensor | None) -> torch.Tensor:
        """(bs, seq_length, dim) hidden states, (bs, seq_length) whether they are no padding (None: all are none) ->
        (bs, width)."""
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif attended is None:
            pooled = hidden.mean(1)
        else:
            weights = attended[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        if self.dense is not None:
            pooled = pooled @ self.dense.to(hidden).T
        return normalize(pooled, dim=-1) if self.normalized else pooled


def pooling_of(name: str) -> Pooling | None:
    """That of a model; None if it has none, or one of another kind.

    Args:
        name: hub name or folder.

    Raises: InputError if its files are damaged.
    """
    mode, normalized, dense = [], False, None
    for module, kind in _modules(name):
        settings = {}
        if kind in ("Pooling", DENSE):
            settings = _read(name, str(Path(module["path"]) / "config.json"), dict) or {}
        if kind == "Pooling":
            settings = _with_keys(settings)
            mode = [each for each, key in KEYS.items() if settings.get(key)]
        elif kind == DENSE:
            dense = _read_dense(name, module["path"])
        normalized |= kind == "Normalize"
        known = kind in KNOWN or (kind == DENSE and _is_plain(settings))
        if not known or (kind == "Pooling" and mode not in (["cls"], ["mean"])):
            how = f"by {' and '.join(mode) or 'no known mode'}" if kind == "Pooling" else f"with a {kind}"
            logger.warning("%s makes its vectors %s, which is not supported here", name, how)
            return None
    return Pooling(mode[0], normalized, dense) if mode else None


def _is_plain(settings: dict) -> bool:
    """Whether a Dense is a matrix and nothing else."""
    return settings.get("bias") is False and str(settings.get("activation_function", "")).endswith("Identity")


def _read_dense(name: str, folder: str) -> torch.Tensor:
    file = cached_file(name, f"{folder}/{WEIGHTS}", **QUIETLY)
    try:
        return load_file(file)["linear.weight"]
    except Exception as error:  # a damaged file can raise almost anything
        raise InputError(f"{name}: {folder}/{WEIGHTS} can't be read ({reason_of(error)}).") from None


def dense_file(weight: torch.Tensor) -> bytes:
    """The contents of DENSE_FILE, for the Dense that `sentence_transformers_files` was asked for.

    Args:
        weight: (widened_to, dim).
    """
    return save({"linear.weight": weight.detach().cpu().contiguous()})


def prompts_of(name: str) -> dict[str, str]:
    """What a model expects before a text: under "query" and "document", if it does."""
    known = (_read(name, SETTINGS, dict) or {}).get("prompts")
    prompts = {kind: text for kind, text in known.items() if isinstance(text, str)} if isinstance(known, dict) else {}
    return {"document": prompts.get("passage", "")} | prompts


def sentence_transformers_files(
    teacher: str, dim: int, length: int, widened_to: int | None = None
) -> dict[str, object]:
    """The teacher's files for a student of this width and length: path in the folder -> contents.

    Empty if it has none, or if it has steps with weights of their own.

    Args:
        teacher: a hub name or folder.
        dim: of the student's hidden states.
        length: tokens that the student takes at most.
        widened_to: the width of vectors that a Dense makes (see `dense_file`); None: there is none.
    """
    steps = _modules(teacher)
    if unknown := sorted({kind for _, kind in steps} - set(KNOWN)):
        logger.warning("%s has steps of sentence-transformers that are not taken over: %s", teacher, ", ".join(unknown))
        return {}
    modules: list[dict] = []
    files: dict[str, object] = {}
    for module, kind in steps:
        path = module["path"]
        if kind == "Transformer":
            if settings := _read(teacher, str(Path(path) / "sentence_bert_config.json"), dict):
                longest = settings.get("max_seq_length")
                cut = {"max_seq_length": min(longest, length)} if isinstance(longest, int) else {}
                files["sentence_bert_config.json"] = settings | cut
            path = ""  # the student's files lie in the folder itself
        elif kind == "Pooling":
            settings = _read(teacher, str(Path(path) / "config.json"), dict) or {}
            widths = {key: dim for key in settings if key in ("word_embedding_dimension", "embedding_dimension")}
            files[str(Path(path) / "config.json")] = _with_keys(settings) | widths
        modules.append(_module(len(modules), kind, path))
        if kind == "Pooling" and widened_to:
            modules.append(_module(len(modules), DENSE, DENSE_FOLDER))
            identity = f"{nn.Identity.__module__}.Identity"
            shape = {"in_features": dim, "out_features": widened_to, "bias": False, "activation_function": identity}
            files[f"{DENSE_FOLDER}/config.json"] = shape
    if modules and (settings := _read(teacher, SETTINGS, dict)):
        files[SETTINGS] = settings
    return {MODULES: modules, **files} if modules else {}


def _module(number: int, kind: str, path: str) -> dict:
    """A step, under the names of old, which all versions know, and other software looks for."""
    return {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}


def _modules(name: str) -> list[tuple[dict, str]]:
    """The steps that a model's files list, and the kind of each. Raises: InputError for a path out of its folder."""
    modules = _read(name, MODULES, [{"type": str, "path": str}]) or []
    for path in (module["path"] for module in modules):
        if path and (path == ".." or Path(path).name != path):
            raise InputError(f"{name}: its {MODULES} has the path {path!r}, which is not the name of a folder in it.")
    return [(module, module["type"].rpartition(".")[2]) for module in modules]


def _with_keys(settings: dict) -> dict:
    """The settings of a pooling, with a key for each mode."""
    named = settings.get(MODE, [mode for mode, key in KEYS.items() if settings.get(key)] or "mean")
    modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or not all(isinstance(mode, str) and mode in KEYS for mode in modes):
        return settings
    rest = {key: value for key, value in settings.items() if key != MODE}
    return rest | {KEYS[mode]: mode in modes for mode in dict.fromkeys((*EXPECTED, *modes))}


def _read(name: str, file: str, shape: object):
    """The contents of a JSON file beside a model; None if there is none."""
    path = cached_file(name, file, **QUIETLY)
    return read_json(path, shape) if path else None
