"""Whatever stands in a file from elsewhere, it is read, or refused in one sentence: every value of a right file is
replaced by others, one at a time, and left out, and whole files by what is none."""

import copy
import json
import shutil

import make_dump
import pytest
from small_models import SMALL
from workspace import load_tokenizer

from corpus import overlap
from corpus.files import open_corpus
from corpus.tokenization import describe_tokenizer
from corpus.tokenization import load_tokenizer as checked_tokenizer
from corpus.vocabulary_trimming import KEPT_FILE, Kept
from dataset import PROGRESS, partial_folder, write_token_file
from evaluation import scores, squad
from models.loading import load_config
from models.sentence_encoder import pooling_of, sentence_transformers_files
from training.metrics_files import read_metrics
from training.run_folder import PARAMETERS, load_parameters
from utils import InputError

VALUES = [None, True, 0, -1, 1.5, float("inf"), float("nan"), "x", "", "512", "\ud800", [], {}, [[1]], ["a"], {"a": 1},
          10**30, 2**62]  # fmt: skip
NO_JSON = [b"", b"\xff\xfe{\x00}\x00", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000,
           b'{"a": ' + b"1" * 5000 + b"}", b'"\xe9t\xe9"',
           b"null", b"3", b"[]", b"{}", b'"text"', b"\x00" * 100, b"\xef\xbb\xbf{}", b"[NaN]"]  # fmt: skip
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
           {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
ROW = {"model": "a", "task": "CoLA", "seed": 1, "weights": 5, "n_epoch": 3, "metrics": {"matthews": 5.0, "score": 5.0}}


@pytest.fixture(scope="module")
def right(workspace, student, tmp_path_factory):
    """For each kind of file: where it lies, what is right in it, and who reads it."""
    folder = tmp_path_factory.mktemp("foreign")
    teacher = workspace / "bert-base-uncased"
    corpus = open_corpus([workspace / "text.bert-base-uncased.pickle"])
    made_by = describe_tokenizer(load_tokenizer(teacher))
    shutil.copytree(teacher, folder / "tokenizer")
    (folder / "modules" / "1_Pooling").mkdir(parents=True)
    (folder / "modules" / "modules.json").write_text(json.dumps(MODULES))
    (folder / "lines").mkdir()

    def resume(path):
        with write_token_file(folder / "text.pickle", made_by, resume=True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), write_token_file(folder / "text.pickle", made_by) as writer:
        writer.checkpoint({"identity": {"files": []}, "position": [0, 5], "bytes": 5})
        raise KeyboardInterrupt
    progress = partial_folder(folder / "text.pickle") / PROGRESS
    question = {"id": "1", "question": "who?", "answers": [{"text": "cat", "answer_start": 4}]}
    articles = {"data": [{"title": "t", "paragraphs": [{"context": "the cat", "qas": [question]}]}]}
    listed = {"corpus": corpus.identity, "ngram": 8, "files": {}, "sequences": [3, 5]}

    def dump(path):
        flags = ["--source", path, "--dump_file", folder / "dump.txt", "--min_length", "1", "--num_workers", "0"]
        make_dump.main.__wrapped__(make_dump.make_parser().parse_args([str(flag) for flag in flags]))

    return {
        "squad": (folder / "dev.json", articles, lambda path: squad.read_questions(str(path), "--predict_file")),
        "scores": (folder / "glue.jsonl", ROW, lambda path: scores.table(scores.read(path), ["a"])),
        "metrics": (folder / "metrics.jsonl", {"kind": "train", "step": 1, "tokens": 9, "loss": 0.5}, read_metrics),
        "parameters": (folder / PARAMETERS, json.loads((student / PARAMETERS).read_text()),
                       lambda path: load_parameters(path.parent)),
        "kept ids": (folder / KEPT_FILE, {"of": [9, "x"], "kept_ids": [0, 2]}, lambda path: Kept.load(path.parent)),
        "progress": (progress, json.loads(progress.read_text()), resume),
        "overlap": (folder / "overlap.json", listed, lambda path: overlap.load_overlap(str(path), corpus)),
        "against": (folder / "set.json", articles, lambda path: overlap.read_texts(str(path))),
        "against lines": (folder / "set.jsonl", ROW, lambda path: overlap.read_texts(str(path))),
        "configuration": (folder / "student.json", json.loads(SMALL["distilbert"].to_json_string()),
                          lambda path: load_config(str(path))),
        "configuration of a teacher": (folder / "tokenizer" / "config.json",
                                       json.loads((teacher / "config.json").read_text()),
                                       lambda path: load_config(str(path.parent))),
        "tokenizer": (folder / "tokenizer" / "tokenizer.json", json.loads((teacher / "tokenizer.json").read_text()),
                      lambda path: checked_tokenizer(str(path.parent))),
        "tokenizer_config": (folder / "tokenizer" / "tokenizer_config.json",
                             json.loads((teacher / "tokenizer_config.json").read_text()),
                             lambda path: checked_tokenizer(str(path.parent))("the cat", truncation=True)),
        "modules": (folder / "modules" / "modules.json", MODULES,
                    lambda path: sentence_transformers_files(str(path.parent), 32, 64)),
        "pooling": (folder / "modules" / "1_Pooling" / "config.json",
                    {"word_embedding_dimension": 32, "pooling_mode": ["mean"]},
                    lambda path: (sentence_transformers_files(str(path.parents[1]), 32, 64),
                                  pooling_of(str(path.parents[1])))),
        "documents": (folder / "lines" / "a.jsonl", {"text": "The cat sees the garden. It is big.", "id": 3}, dump),
    }  # fmt: skip


def changed(value, replacements):
    """The value with each part of it replaced by each of these, and without each part."""
    yield from replacements
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else range(min(2, len(value)))
        for key in keys:
            without = copy.copy(value)
            del without[key]
            yield without
            for part in changed(value[key], replacements):
                other = copy.copy(value)
                other[key] = part
                yield other


KINDS = ("squad", "scores", "metrics", "parameters", "kept ids", "progress", "overlap", "against", "against lines",
         "configuration", "configuration of a teacher", "tokenizer", "tokenizer_config", "modules", "pooling",
         "documents")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_a_file_is_read_or_refused(kind, right):
    path, content, read = right[kind]
    end = b"\n" if path.suffix == ".jsonl" else b""
    whole = json.dumps(content).encode() + end
    if kind == "tokenizer":
        content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:8])  # one is as good as another
    variants = [*(json.dumps(other).encode() for other in changed(content, VALUES)), *NO_JSON]
    accepted = refused = 0
    for variant in variants:
        path.write_bytes(variant + end)
        try:
            read(path)
            accepted += 1
        except InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, variant[:300]
            assert len(str(error).replace(str(path), "").replace(str(path.parent), "")) <= 300, error
        except KeyboardInterrupt:  # how the writing of a text is interrupted above
            accepted += 1
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {str(error)[:200]} from {variant[:500]}") from error
    path.write_bytes(whole)
    print(f"{kind}: {accepted} accepted, {refused} refused")
    assert refused >= 7
