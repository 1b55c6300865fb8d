"""What the toolkit asks of a tokenizer: a description, which binarized files carry, and ids for lines of text."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from utils import InputError, quiet_transformers, why_not_loaded

SPECIAL_TOKENS = ("unk", "sep", "pad", "cls", "mask", "bos", "eos")


def load_tokenizer(name: str):
    """The tokenizer of a hub name or folder. Raises: InputError if there is none."""
    from transformers import AutoTokenizer  # seconds to import

    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        ids = set(tokenizer.get_vocab().values())
    except Exception as error:  # a damaged file can raise nearly anything
        problem = why_not_loaded(name, error)
    else:
        if len(ids) == len(tokenizer.get_added_vocab()):  # those that `transformers` makes up where there is nothing
            problem = "there is no vocabulary: no tokenizer.json, vocab.txt or the like"
        elif len(ids) != max(ids) + 1:
            problem = f"its {len(ids):,} tokens have ids up to {max(ids):,}, so some are missing or given twice"
        elif not (isinstance(length := tokenizer.model_max_length, int) and length >= 1):
            problem = f"model_max_length in tokenizer_config.json is {length!r}, which is not a number of tokens"
        else:
            return tokenizer
    raise InputError(f"no tokenizer in {name} ({problem}); name one with --tokenizer_name.")


def describe_tokenizer(tokenizer) -> dict:
    """What a file records about the tokenizer that made it: name, size, special ids, a hash of the vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return {
        "tokenizer": tokenizer_short_name(tokenizer.name_or_path),
        "vocab_size": len(tokenizer),
        "vocab_hash": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16],
        "special_ids": {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL_TOKENS},
    }


def vocabulary_difference(tokenizer, other) -> str | None:
    """Where two tokenizers' vocabularies differ, in words; None if they don't."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return None
    by_id = [{id_: token for token, id_ in vocabulary.items()} for vocabulary in (ours, theirs)]
    differing = sorted(id_ for id_ in by_id[0].keys() | by_id[1].keys() if by_id[0].get(id_) != by_id[1].get(id_))
    names = [repr(tokens[differing[0]]) if differing[0] in tokens else "nothing" for tokens in by_id]
    return f"{len(differing):,} entries differ, the first is {differing[0]}: {names[0]} and {names[1]}"


def tokenizer_short_name(name: str) -> str:
    """The last component of a hub name or path: `org/bert` and `/models/bert/` both give `bert`."""
    return Path(name).name


def boundary_ids(special_ids: dict) -> tuple[int, int]:
    """The ids that begin and end every sequence: [CLS] and [SEP], or for GPT-2 <|endoftext|> twice."""
    begin = special_ids["cls"] if special_ids["cls"] is not None else special_ids["bos"]
    end = special_ids["sep"] if special_ids["sep"] is not None else special_ids["eos"]
    if begin is None or end is None:
        raise InputError("this tokenizer has neither [CLS]/[SEP] nor bos/eos tokens to put around a sequence.")
    return begin, end


def unknown_id(special_ids: dict) -> int | None:
    """The id of [UNK]. GPT-2 has no unknown token, and names its end-of-text token in that place."""
    unknown = special_ids["unk"]
    return None if unknown in (special_ids["eos"], special_ids["bos"]) else unknown


def padding_id(tokenizer) -> int:
    """GPT-2 has no padding token, so its end token will do: nothing looks at padding."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def has_boundaries(ids: np.ndarray, offsets: np.ndarray, special_ids: dict) -> np.ndarray:
    """(n_sequences,) bool, whether each sequence of a block begins and ends with its boundary tokens."""
    begin, end = boundary_ids(special_ids)
    starts, stops = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    right = stops - starts >= 2
    right[right] = (ids[starts[right]] == begin) & (ids[stops[right] - 1] == end)
    return right


def word_beginnings(tokenizer) -> np.ndarray:
    """(voc_size,) bool, which tokens begin a word, or are a punctuation mark.

    Vocabularies mark pieces differently: WordPiece marks those that continue a word ("##s"), byte-level BPE
    ("Ġword") and SentencePiece ("▁word") mark those that follow a space.

    Raises: InputError if it marks neither.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if any(token.startswith("##") and len(token) > 2 for token in tokens):
        return np.array([not token.startswith("##") for token in tokens])
    for blank in ("Ġ", "▁"):
        if sum(token.startswith(blank) for token in tokens) > 1:
            return np.array([token.startswith(blank) or not token[:1].isalnum() for token in tokens])
    raise InputError(
        f"--whole_word_mask: the vocabulary of {tokenizer.name_or_path} does not mark words; leave the flag out."
    )


class LineEncoder:
    """Lines of text -> flat ids with boundary tokens, on all cores. Special tokens in the text are text like any other:
    a line that says "[SEP]" does not end there."""

    def __init__(self, tokenizer) -> None:
        if not tokenizer.is_fast:
            raise InputError(f"the tokenizer {tokenizer.name_or_path} has no fast version (tokenizer.json).")
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.plain_backend = _without_normalizer(self.backend)
        self.begin, self.end = boundary_ids(describe_tokenizer(tokenizer)["special_ids"])

    def __call__(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (sum of lengths,) int32 ids and (n lines,) int64 lengths."""
        ids = self._ids(lines)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids)) + 2
        stops = np.cumsum(lengths)
        flat = np.empty(lengths.sum(), np.int32)
        is_text = np.ones(flat.size, bool)
        is_text[stops - 1] = is_text[stops - lengths] = False
        flat[stops - lengths], flat[stops - 1] = self.begin, self.end
        flat[is_text] = np.fromiter(itertools.chain.from_iterable(ids), np.int32, is_text.sum())
        return flat, lengths

    def _ids(self, lines: list[str]) -> list[list[int]]:
        is_plain = [self.plain_backend is not None and line.isascii() and line.isprintable() for line in lines]
        plain = [line for line, flag in zip(lines, is_plain, strict=True) if flag]
        others = [line for line, flag in zip(lines, is_plain, strict=True) if not flag]
        if plain and self.backend.normalizer.lowercase:
            plain = [line.lower() for line in plain]
        encoded_plain = iter(self.plain_backend.encode_batch_fast(plain, add_special_tokens=False) if plain else ())
        encoded_others = iter(self.backend.encode_batch_fast(others, add_special_tokens=False))
        return [next(encoded_plain if flag else encoded_others).ids for flag in is_plain]


def _without_normalizer(backend):
    """A copy for printable ASCII, which BERT's normalizer only lowercases: it has no accents, Chinese or control
    characters. That takes a fifth off the time of English text. None for other normalizers, and where added tokens,
    which are looked for in normalized text, would be missed.
    """
    from tokenizers import Tokenizer
    from tokenizers.normalizers import BertNormalizer

    added = backend.get_added_tokens_decoder().values()
    if not isinstance(backend.normalizer, BertNormalizer) or not all(token.special for token in added):
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.normalizer = None
    copy.encode_special_tokens = True
    return copy
