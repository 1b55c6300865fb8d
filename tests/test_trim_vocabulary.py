"""A trimmed model is the whole one with fewer rows; a trimmed tokenizer says the same of a text whose tokens it has."""

import json
import random
import re

import binarized_data
import numpy as np
import pytest
import token_counts
import torch
import trim_vocabulary
from small_models import SMALL
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, AutoTokenizer
from workspace import load_tokenizer, make_text, rows_of, run, train

from corpus.vocabulary_trimming import KEPT_FILE, Kept, choose_tokens, trim
from models.loading import auto_class
from models.trimming import trim_model

SPECIAL = ["<pad>", "<unk>", "[CLS]", "[SEP]"]
PREFIX = {"continuing_subword_prefix": "##"}


def trained(kind: str) -> Tokenizer:
    """A tokenizer of some 200 entries, with [CLS] and [SEP] around each text."""
    if kind == "WordPiece":
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(**PREFIX)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.normalizer = normalizers.BertNormalizer()
    elif kind == "Unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "BPE with a prefix":
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="<unk>", **PREFIX)), trainers.BpeTrainer(**PREFIX)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(initial_alphabet=alphabet)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer.vocab_size, trainer.show_progress, trainer.special_tokens = 400, False, SPECIAL
    tokenizer.train_from_iterator(make_text(100).splitlines(), trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    if kind == "WordPiece":
        tokenizer.post_processor = processors.BertProcessing(*ends)
    else:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def cut(tokenizer: Tokenizer, text: list[str], **options) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer with what this text uses."""
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for line in text:
        np.add.at(counts, tokenizer.encode(line).ids, 1)
    before = json.loads(tokenizer.to_str())
    tokens = choose_tokens(before, tokenizer.get_vocab(), set(SPECIAL), counts, **options)
    after, ids = trim(before, tokenizer.get_vocab(), tokens)
    return Tokenizer.from_str(json.dumps(after)), ids


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE with a prefix", "BPE of bytes"])
def test_a_text_of_kept_tokens_is_tokenized_as_before(kind):
    whole = trained(kind)
    used, others = ["the cat sees the garden in the morning."], make_text(100, seed=1).splitlines()
    small, ids = cut(whole, used)
    assert small.get_vocab_size() == len(ids) < whole.get_vocab_size() - 20
    for line in used:
        encoding = small.encode(line)
        assert encoding.tokens == whole.encode(line).tokens
        assert ids[encoding.ids].tolist() == whole.encode(line).ids
    shorter = 0
    for line in others:
        before, after = (tokenizer.encode(line).tokens for tokenizer in (whole, small))
        assert "<unk>" not in after
        assert "".join(after).replace("##", "") == "".join(before).replace("##", "")
        shorter += len(after) > len(before)
        if set(before) <= small.get_vocab().keys():
            assert after == before
    assert shorter > 50


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE with a prefix", "BPE of bytes"])
def test_a_number_of_entries(kind):
    whole = trained(kind)
    text = make_text(100).splitlines()
    n_used = cut(whole, text)[0].get_vocab_size()
    small, ids = cut(whole, text, size=n_used - 10)
    assert n_used - 20 < len(ids) <= n_used - 10
    for line in random.Random(0).sample(text, 10):
        assert "<unk>" not in small.encode(line).tokens
    rare, _ = cut(whole, text, min_count=100)
    assert rare.get_vocab().keys() < whole.get_vocab().keys()


def test_characters_that_the_text_does_not_have():
    whole = trained("WordPiece")
    text = ["the cat sees the garden"]
    few, _ = cut(whole, text, all_characters=False)
    all_, _ = cut(whole, text)
    assert few.get_vocab_size() < all_.get_vocab_size()
    assert few.encode("the cat").tokens == all_.encode("the cat").tokens == whole.encode("the cat").tokens
    assert "<unk>" not in few.encode("the dense cats").tokens
    assert few.encode("mummy").tokens[1:-1] == ["<unk>"]
    assert "<unk>" not in all_.encode("mummy").tokens


@pytest.mark.parametrize("name", SMALL)
def test_logits_of_kept_entries_are_the_same(name):
    torch.manual_seed(0)
    model = auto_class(SMALL[name]).from_config(SMALL[name]).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    ids = np.array([*range(10), *range(20, 99, 3)])
    trimmed = trim_model(model, ids)
    input_ids = torch.randint(5, len(ids), (3, 9))
    with torch.no_grad():
        ours, theirs = trimmed(input_ids).logits, model(torch.from_numpy(ids)[input_ids]).logits
    torch.testing.assert_close(ours, theirs[..., ids])
    assert trimmed.config.vocab_size == len(ids) and not trimmed.training


def test_special_tokens_of_the_configuration_have_their_new_ids():
    model = auto_class(SMALL["modernbert"]).from_config(SMALL["modernbert"])
    config = trim_model(model, np.array([0, 3, 50, 98])).config
    assert (config.pad_token_id, config.eos_token_id, config.cls_token_id) == (0, 1, None)


@pytest.fixture(scope="module")
def trimmed(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trimmed") / "trimmed"
    run(trim_vocabulary, "--model_name", workspace / "bert-base-uncased", "--token_counts", workspace / "counts.pickle",
        "--data_file", workspace / "text.bert-base-uncased.pickle", "--min_count", 60, "--output_dir",
        folder)  # fmt: skip
    return folder


def test_the_model_and_its_tokenizer_load(workspace, trimmed, capsys):
    tokenizer, whole = AutoTokenizer.from_pretrained(trimmed), load_tokenizer(workspace / "bert-base-uncased")
    kept = Kept.load(trimmed)
    assert len(whole) - 5 > len(tokenizer) == len(kept.ids) > 20
    model = AutoModelForMaskedLM.from_pretrained(trimmed)
    teacher = AutoModelForMaskedLM.from_pretrained(workspace / "bert-base-uncased")
    assert model.config.vocab_size == len(tokenizer)
    assert torch.equal(model.cls.predictions.bias, teacher.cls.predictions.bias[kept.ids])
    text = "the cat sees the garden."
    assert whole.decode(kept.ids[tokenizer(text).input_ids]) == "[CLS] the cat sees the garden. [SEP]"


def test_the_whole_teacher_teaches_as_the_trimmed_one(workspace, trimmed, tmp_path, capsys):
    run(binarized_data, "--file_path", workspace / "dump.txt", "--tokenizer_name", trimmed, "--dump_file",
        tmp_path / "text")  # fmt: skip
    run(token_counts, "--data_file", tmp_path / "text.trimmed.pickle", "--token_counts_dump",
        tmp_path / "counts.pickle")  # fmt: skip
    rows = []
    for teacher in (workspace / "bert-base-uncased", trimmed):
        dump_path = tmp_path / f"by-{teacher.name}"
        train(workspace, dump_path, "--teacher_name", teacher, "--tokenizer_name", trimmed, "--data_file",
              tmp_path / "text.trimmed.pickle", "--token_counts", tmp_path / "counts.pickle")  # fmt: skip
        rows.append(rows_of(dump_path))
        assert ("vocabulary is cut" in capsys.readouterr().err) == (teacher != trimmed)
    assert rows[0] == rows[1] and len(rows[0]) > 3
    student = AutoModelForMaskedLM.from_pretrained(tmp_path / "by-trimmed")
    assert student.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "by-trimmed"))


def test_what_is_printed(workspace, tmp_path, capsys):
    flags = [
        "--model_name",
        workspace / "bert-base-uncased",
        "--data_file",
        workspace / "text.bert-base-uncased.pickle",
    ]
    run(trim_vocabulary, *flags, "--output_dir", tmp_path / "all")
    printed = capsys.readouterr().out
    assert "100.00% of the tokens are kept, and 100.0% of the sequences tokenize the same" in printed
    run(trim_vocabulary, *flags, "--output_dir", tmp_path / "few", "--vocab_size", 88)
    printed = capsys.readouterr().out
    assert re.search(r"vocabulary +\| +160 \| +88 \|", printed)
    share = re.search(r"([\d.]+)% of the tokens are kept, and ([\d.]+)% of the sequences", printed)
    assert 50 < float(share[1]) < 99 and 0 < float(share[2]) < 50


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vocab_size", "9"], "entries are needed"),
        (["--output_dir", "."], "give a new folder"),
        (["--model_name", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(workspace, tmp_path, capsys, flags, message):
    given = ["--model_name", workspace / "bert-base-uncased", "--token_counts", workspace / "counts.pickle"]
    run(trim_vocabulary, *given, "--output_dir", tmp_path / "trimmed", *flags, expect=2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_neither_counts_nor_text(workspace, tmp_path, capsys):
    given = ["--model_name", workspace / "bert-base-uncased", "--output_dir", tmp_path / "trimmed"]
    run(trim_vocabulary, *given, expect=2)
    assert "Give --token_counts or --data_file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{}", '{"of": [9, "x"], "kept_ids": [3, 1]}', '{"of": [2, "x"], "kept_ids": [5]}']
)
def test_a_damaged_list_of_kept_ids(workspace, trimmed, tmp_path, capsys, content):
    load_tokenizer(trimmed).save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / KEPT_FILE).write_text(content)
    train(workspace, tmp_path / "run", "--tokenizer_name", tmp_path / "damaged", expect=2)
    assert "make the folder again with scripts/trim_vocabulary.py" in capsys.readouterr().err
