"""How a sentence encoder makes one vector of a text, as the files of sentence-transformers beside it have it:
`modules.json` lists the steps, which are the model itself, the pooling of its tokens, and often a normalization.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers.utils import cached_file

from files.json_reader import read_json
from utils import InputError, logger

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"  # such as what to write before a query
KNOWN = ("Transformer", "Pooling", "Normalize")  # steps without weights of their own
MODE = "pooling_mode"
# Until version 5 each mode had a key of its own, which all versions read, and other software looks for.
KEYS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens",
        "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
        "weightedmean": "pooling_mode_weightedmean_tokens", "lasttoken": "pooling_mode_lasttoken"}  # fmt: skip
EXPECTED = ("cls", "mean")  # those whose keys Text Embeddings Inference does not do without


@dataclass(frozen=True)
class Pooling:
    """Makes one vector of a text's hidden states.

    Attributes:
        mode: "mean" of its tokens, or the first of them, "cls".
        normalized: whether vectors have the length 1.
    """

    mode: str = "mean"
    normalized: bool = False

    def __call__(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """(bs, seq_length, dim) hidden states, (bs, seq_length) whether they are no padding -> (bs, dim)."""
        if self.mode == "cls":
            pooled = hidden[:, 0]
        else:
            weights = attended[..., None].to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return normalize(pooled, dim=-1) if self.normalized else pooled


def pooling_of(name: str) -> Pooling | None:
    """That of a model; None if it has none, or one of another kind.

    Args:
        name: hub name or folder.
    """
    files = sentence_transformers_files(name, 0, 0)
    settings = [files.get(f"{module['path']}/config.json") for module in files.get(MODULES, [])]
    modes = [mode for each in filter(None, settings) for mode, key in KEYS.items() if each.get(key)]
    if not files:
        return None
    if modes not in (["cls"], ["mean"]):
        logger.warning("%s pools its hidden states by %s, which is not supported here", name, " and ".join(modes))
        return None
    return Pooling(modes[0], any(_kind(module) == "Normalize" for module in files[MODULES]))


def sentence_transformers_files(teacher: str, dim: int, length: int) -> dict[str, object]:
    """The teacher's files for a student of this width and length: path in the folder -> contents.

    Empty if it has none, or if it has steps with weights of their own.

    Args:
        teacher: a hub name or folder.
        dim: of the student's hidden states.
        length: tokens that the student takes at most.
    """
    modules = _read(teacher, MODULES, [{"type": str, "path": str}])
    if not modules:
        return {}
    for path in (module["path"] for module in modules):
        if path and (path == ".." or Path(path).name != path):
            raise InputError(
                f"{teacher}: its {MODULES} has the path {path!r}, which is not the name of a folder in it."
            )
    kinds = [_kind(module) for module in modules]
    if unknown := sorted(set(kinds) - set(KNOWN)):
        logger.warning("%s has steps of sentence-transformers that are not taken over: %s", teacher, ", ".join(unknown))
        return {}
    files: dict[str, object] = {}
    for module, kind in zip(modules, kinds, strict=True):
        module["type"] = f"sentence_transformers.models.{kind}"  # so of old, and still known
        if kind == "Transformer":
            if settings := _read(teacher, str(Path(module["path"]) / "sentence_bert_config.json"), dict):
                longest = settings.get("max_seq_length")
                cut = {"max_seq_length": min(longest, length)} if isinstance(longest, int) else {}
                files["sentence_bert_config.json"] = settings | cut
            module["path"] = ""  # the student's files lie in the folder itself
        elif kind == "Pooling":
            settings = _read(teacher, f"{module['path']}/config.json", dict) or {}
            widths = {key: dim for key in settings if key in ("word_embedding_dimension", "embedding_dimension")}
            files[f"{module['path']}/config.json"] = _with_keys(settings) | widths
    if settings := _read(teacher, SETTINGS, dict):
        files[SETTINGS] = settings
    return {MODULES: modules, **files}


def _kind(module: dict) -> str:
    return module["type"].rpartition(".")[2]


def _with_keys(settings: dict) -> dict:
    """The settings of a pooling, with a key for each mode."""
    named = settings.get(MODE, [mode for mode, key in KEYS.items() if settings.get(key)] or "mean")
    modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or not set(modes) <= KEYS.keys():
        return settings
    rest = {key: value for key, value in settings.items() if key != MODE}
    return rest | {KEYS[mode]: mode in modes for mode in dict.fromkeys((*EXPECTED, *modes))}


def _read(name: str, file: str, shape: object):
    """The contents of a JSON file beside a model; None if there is none."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name, file, **quietly)
    return read_json(path, shape) if path else None
