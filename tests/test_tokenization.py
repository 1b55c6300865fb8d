"""What the toolkit asks of a tokenizer."""

import pytest
from small_models import SMALL

from corpus.tokenization import load_tokenizer, tokenizer_short_name, vocabulary_difference, word_beginnings
from utils import InputError


@pytest.mark.parametrize("family", SMALL)
def test_a_model_without_a_vocabulary_has_no_tokenizer(family, tmp_path):
    """For some families `transformers` would make one up, of special tokens alone."""
    SMALL[family].save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path))


def test_short_name_is_the_last_path_component():
    for name in ("bert-base-uncased", "org/bert-base-uncased", "/models/bert-base-uncased/"):
        assert tokenizer_short_name(name) == "bert-base-uncased"


@pytest.mark.parametrize("tokens, begin", [
    (["[UNK]", "the", "##s", "-", "a"], [True, True, False, True, True]),
    (["Ġthe", "s", "Ġa", ".", "Ġ", "'s", "9"], [True, False, True, True, True, True, False]),
    (["▁the", "s", "▁a", ",", "<s>"], [True, False, True, True, True]),
])  # fmt: skip
def test_where_words_begin_is_told_by_the_vocabulary(tokens, begin):
    assert word_beginnings(Vocabulary(tokens)).tolist() == begin


def test_a_vocabulary_that_does_not_tell_is_refused():
    with pytest.raises(InputError, match="does not mark words"):
        word_beginnings(Vocabulary(["a", "b", "c"]))


def test_where_two_vocabularies_differ_is_told():
    one, other = Vocabulary(["a", "b", "c"]), Vocabulary(["a", "x", "c", "d"])
    assert vocabulary_difference(one, one) is None
    assert vocabulary_difference(one, other) == "2 entries differ, the first is 1: 'b' and 'x'"
    assert vocabulary_difference(one, Vocabulary(["a", "b"])) == "1 entries differ, the first is 2: 'c' and nothing"


class Vocabulary:
    """As much of a tokenizer as tells its tokens."""

    name_or_path = "some"

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def get_vocab(self):
        return {token: id_ for id_, token in enumerate(self.tokens)}

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]
