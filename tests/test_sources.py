"""Several texts of which an epoch draws some more often than others."""

import numpy as np
import pytest
from workspace import rows_of, run, train

from corpus.sources import weights_of
from utils import InputError


def test_an_exponent_makes_small_sources_larger():
    tokens = np.array([1_000_000, 10_000])
    names = ["en", "sw"]
    assert np.allclose(weights_of(names, tokens, None, 1.0), 1)
    even = weights_of(names, tokens, None, 0.0) * tokens
    assert np.allclose(even, 505_000)
    drawn = weights_of(names, tokens, None, 0.7) * tokens
    assert np.isclose(drawn.sum(), tokens.sum())
    assert np.isclose(drawn[0] / drawn[1], 100**0.7)


def test_a_source_of_which_nothing_is_left_is_named():
    with pytest.raises(InputError, match="--data_file sw: no sequence"):
        weights_of(["en", "sw"], np.array([5, 0]), [1, 1], None)


@pytest.fixture
def texts(workspace, tmp_path):
    import binarized_data

    lines = (workspace / "dump.txt").read_text().splitlines()
    for name, part in (("a", lines[:100]), ("b", lines[100:300])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
        run(binarized_data, "--file_path", tmp_path / f"{name}.txt", "--tokenizer_name",
            workspace / "bert-base-uncased", "--dump_file", tmp_path / name)  # fmt: skip
    return [tmp_path / f"{name}.bert-base-uncased.pickle" for name in ("a", "b")]


def tokens_of(workspace, folder, *flags):
    train(workspace, folder, *flags, "--valid_share", 0, "--n_epoch", 2, "--dropout", 0)
    return rows_of(folder)[-1]["tokens"]


def test_an_epoch_draws_what_the_weights_say(workspace, tmp_path, texts, capsys):
    a, b = (tokens_of(workspace, tmp_path / path.name[0], "--data_file", path) for path in texts)
    both = tokens_of(workspace, tmp_path / "both", "--data_file", *texts, "--data_weights", 3, 0.5)
    assert both == pytest.approx(3 * a + 0.5 * b, rel=0.03)
    assert "which an epoch draws 0.5 times" in capsys.readouterr().err
    flags = (workspace, tmp_path / "both", "--data_file", *texts, "--valid_share", 0, "--n_epoch", 2, "--dropout", 0)
    train(*flags, "--resume", "--data_weights", 3, 1, expect=2)
    assert "data_weights" in capsys.readouterr().err
    as_globs = [str(path).replace(".bert", ".*ert") for path in texts]
    same = tokens_of(workspace, tmp_path / "same", "--data_file", *as_globs, "--data_weights", 3, 0.5)
    assert same == both


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data_weights", 1], "gives 1 numbers, but --data_file 2 arguments"),
        (["--data_weights", 1, 2, "--source_exponent", 0.7], "give one of them"),
        (["--data_weights", 0, 2], "--data_weights"),
    ],
)
def test_mistakes(workspace, tmp_path, texts, capsys, flags, message):
    train(workspace, tmp_path / "run", "--data_file", *texts, *flags, expect=2)
    assert message in capsys.readouterr().err


def test_with_an_exponent_an_epoch_stays_as_long_as_the_text(workspace, tmp_path, texts):
    drawn = tokens_of(workspace, tmp_path / "drawn", "--data_file", *texts, "--source_exponent", 0.5)
    assert drawn == pytest.approx(tokens_of(workspace, tmp_path / "all", "--data_file", *texts), rel=0.03)
