"""Words and runs of words are recognized in tokens, whatever pieces a tokenizer cuts them into."""

import re

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from corpus.tokenization import LineEncoder
from corpus.word_ngrams import WordHashes, WordNgrams

TEXTS = [
    "The unlikely cat, unlike OTHERS, sees state-of-the-art things (twice)... and it's fine!",
    "the Unlikely CAT unlike others sees state of the art things. Naïve Ångström café; 東京 is e-mail 2 km²",
    "«Ça va», 3.14 percent/hour",
]


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    special = ["[UNK]", "[CLS]", "[SEP]"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "metaspace":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="[UNK]")
    else:
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special)
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "WordPiece, cased"])
def test_words_are_those_of_the_text_whatever_their_pieces(kind):
    tokenizer = make_tokenizer(kind)
    text = [line.replace("東京", "") for line in TEXTS]  # BERT takes each of these for a word of its own
    hashes, owners = WordHashes(tokenizer)(*LineEncoder(tokenizer)(text))
    words = [(word, i) for i, line in enumerate(text) for word in re.findall(r"\w+", line.lower())]
    assert owners.tolist() == [i for _, i in words]
    hash_of = {}
    for (word, _), value in zip(words, hashes.tolist(), strict=True):
        assert hash_of.setdefault(word, value) == value
    assert len(set(hash_of.values())) == len(hash_of)


def test_characters_in_pieces_are_words_of_their_own_that_differ():
    tokenizer = make_tokenizer("byte-level")
    hashes, _ = WordHashes(tokenizer)(*LineEncoder(tokenizer)(["ж", "я", "ж"]))
    assert hashes[0] == hashes[2] != hashes[1]


def test_ngrams_do_not_run_from_one_text_into_the_next():
    tokenizer = make_tokenizer("WordPiece, cased")
    texts = ["the cat sees state of the art", "unlike others it sees things"]
    ngrams = WordNgrams(texts, tokenizer, 4)
    lines = ["of the art unlike others it", "unlike cat sees STATE of the", "unlike others it", "sees"]
    owners, hashes = ngrams.find(*LineEncoder(tokenizer)(lines))
    assert owners.tolist() == [1, 1]
    assert ngrams.n_long == 2
    assert ngrams.ngram_in(tokenizer(lines[1]).input_ids, hashes) == "sees state of the"


def test_texts_without_words_are_no_trouble():
    tokenizer = make_tokenizer("WordPiece, cased")
    ngrams = WordNgrams(["..."], tokenizer, 4)
    assert ngrams.n_long == 0
    assert ngrams.find(*LineEncoder(tokenizer)(["the cat sees state of the art", "(", "."]))[0].tolist() == []
