"""What the toolkit asks of a tokenizer."""

from corpus.tokenization import tokenizer_short_name


def test_short_name_is_the_last_path_component():
    for name in ("bert-base-uncased", "org/bert-base-uncased", "/models/bert-base-uncased/"):
        assert tokenizer_short_name(name) == "bert-base-uncased"
