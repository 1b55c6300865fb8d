"""Fixtures that tests of several files share."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from processes import LIMIT
from workspace import load_tokenizer, make_workspace, train

# The files that take longest begin first, so that no process ends with one of them while the others have nothing to do.
SLOW_FIRST = ("test_readme", "test_train", "test_launchers", "test_hostile_flags", "test_preemption")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_make_parametrize_id(val, argname: str) -> str | None:
    """Names a parameter of bytes by its argument: gzip writes the time into its bytes, and two workers must agree."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder with dump.txt, a BERT with tokenizer in bert-base-uncased, the binarized text and its counts.

    Made once: by the process that needs it first, while the others wait.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # below it, each process has a folder of its own
    folder, done = root / "workspace", root / "workspace.done"
    with FileLock(root / "workspace.lock", timeout=LIMIT):
        if not done.exists():
            folder.mkdir()
            make_workspace(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def student(workspace, tmp_path_factory) -> Path:
    """The dump_path of a short distillation. (Session: of this process; what tests add to it must not matter.)"""
    folder = tmp_path_factory.mktemp("student") / "student"
    train(workspace, folder, "--batch_size", 64, "--gradient_accumulation_steps", 8)
    return folder


@pytest.fixture
def sequences():
    """Random ids, which `path` holds in one binarized file, and `two` in two."""
    from corpora import make_sequences

    return make_sequences(100)


@pytest.fixture
def path(tmp_path, sequences):
    from corpora import write

    return write(tmp_path / "text.pickle", sequences)


@pytest.fixture
def two(tmp_path, sequences):
    """The same corpus in two files, of which one is another tool's."""
    from corpora import write

    from corpus.files import open_corpus

    write(tmp_path / "part-1.pickle", sequences[:37])
    (tmp_path / "part-2.pickle").write_bytes(pickle.dumps([s.astype(np.uint16) for s in sequences[37:]]))
    return open_corpus([tmp_path / "part-*.pickle"])


@pytest.fixture
def tokenizer(workspace):
    return load_tokenizer(workspace / "bert-base-uncased")


@pytest.fixture
def teacher(workspace):
    from models.loading import load_language_model

    return load_language_model(str(workspace / "bert-base-uncased"), "teacher", head_required=True).eval()
