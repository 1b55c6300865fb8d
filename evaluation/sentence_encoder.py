"""The files that make sentence-transformers treat a student like its teacher: how hidden states become one vector per
text. `modules.json` lists the steps: the model itself, how its tokens are pooled, and often that the
vector is normalized.
"""

from pathlib import Path

from transformers.utils import cached_file

from files.json_reader import read_json
from utils import InputError, logger

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"  # such as what to write before a query
KNOWN = ("Transformer", "Pooling", "Normalize")  # steps without weights of their own


def sentence_transformers_files(teacher: str, dim: int) -> dict[str, object]:
    """The teacher's files for a student of this width: path in the folder -> contents.

    Empty if it has none, or if it has steps with weights of their own.

    Args:
        teacher: a hub name or folder.
        dim: of the student's hidden states.
    """
    modules = _read(teacher, MODULES, [{"type": str, "path": str}])
    if not modules:
        return {}
    for path in (module["path"] for module in modules):
        if path and (path == ".." or Path(path).name != path):
            raise InputError(
                f"{teacher}: its {MODULES} has the path {path!r}, which is not the name of a folder in it."
            )
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if unknown := sorted(set(kinds) - set(KNOWN)):
        logger.warning("%s has steps of sentence-transformers that are not taken over: %s", teacher, ", ".join(unknown))
        return {}
    files: dict[str, object] = {}
    for module, kind in zip(modules, kinds, strict=True):
        if kind == "Transformer":
            if settings := _read(teacher, str(Path(module["path"]) / "sentence_bert_config.json"), dict):
                files["sentence_bert_config.json"] = settings
            module["path"] = ""  # the student's files lie in the folder itself
        elif kind == "Pooling":
            settings = _read(teacher, f"{module['path']}/config.json", dict) or {}
            widths = {key: dim for key in settings if key in ("word_embedding_dimension", "embedding_dimension")}
            files[f"{module['path']}/config.json"] = settings | widths
    if settings := _read(teacher, SETTINGS, dict):
        files[SETTINGS] = settings
    return {MODULES: modules, **files}


def _read(name: str, file: str, shape: object):
    """The contents of a JSON file beside a model; None if there is none."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(name, file, **quietly)
    return read_json(path, shape) if path else None
