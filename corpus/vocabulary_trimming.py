"""A tokenizer with fewer entries: those that a corpus uses, and those without which text would not tokenize.

Works on the JSON form of a fast tokenizer (tokenizer.json) with a vocabulary of WordPiece, BPE or Unigram. A text whose
tokens are all kept is tokenized as before: WordPiece and Unigram still find the same best pieces, and BPE does the same
merges, since those that make up a kept token are kept with it. Other words fall into smaller pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files.atomic import write_json
from files.json_reader import read_json
from utils import InputError

KEPT_FILE = "kept_ids.json"  # beside a trimmed tokenizer


@dataclass(frozen=True)
class Kept:
    """Which entries of a vocabulary were kept.

    Attributes:
        ids: (new size,) int64, the old id of each new one, increasing.
        old_size, old_hash: of the vocabulary that they are from (see `corpus.tokenization.describe_tokenizer`).
    """

    ids: np.ndarray
    old_size: int
    old_hash: str

    def save(self, folder: Path) -> None:
        write_json(folder / KEPT_FILE, {"of": [self.old_size, self.old_hash], "kept_ids": self.ids.tolist()})

    @classmethod
    def load(cls, folder: str | Path) -> "Kept | None":
        """What lies beside a trimmed tokenizer; None beside any other. Raises: InputError if it is damaged."""
        file = Path(folder) / KEPT_FILE
        if not file.is_file():
            return None
        way_out = "make the folder again with scripts/trim_vocabulary.py"
        content = read_json(file, {"kept_ids": [int], "of": [(int, str)]}, way_out)
        ids = np.array(content["kept_ids"], np.int64)
        old_size, old_hash = content["of"] if [*map(type, content["of"])] == [int, str] else (0, "")
        if not (len(ids) and ids[0] >= 0 and (np.diff(ids) > 0).all() and ids[-1] < old_size):
            raise InputError(f"{file} is damaged; {way_out}.")
        return cls(ids, old_size, old_hash)


def choose_tokens(
    tokenizer: dict,
    vocab: dict[str, int],
    special: set[str],
    counts: np.ndarray,
    min_count: int = 1,
    size: int | None = None,
    all_characters: bool = True,
) -> set[str]:
    """The tokens to keep: special and added ones, characters (or bytes), and the most frequent of the others with what
    their merges need.

    Args:
        tokenizer: the JSON form.
        vocab: token -> id, added tokens included.
        special: tokens that are kept in any case.
        counts: (vocabulary,) how often each id occurs.
        min_count: how often a token must occur.
        size: how many are kept at most; None: no limit.
        all_characters: keep each single character that has a token, and not only those that occur in kept tokens.

    Raises: InputError if `size` has no room for those that must be kept, or the kind of tokenizer is not known.
    """
    model = tokenizer["model"]
    needs = _needs(model, vocab)
    kept = special | {token["content"] for token in tokenizer["added_tokens"]}
    if all_characters or model["type"] == "BPE":
        kept |= {token for token in vocab if _is_character(token, model)}
    least = len(kept)
    if size is not None and size < least:
        raise InputError(
            f"--vocab_size {size}: at least {least:,} entries are needed, for special tokens and single characters"
            + ("; --drop_unseen_characters leaves out those that the text does not have." if all_characters else ".")
        )
    tokens = {id_: token for token, id_ in vocab.items()}
    for id_ in np.argsort(-counts, kind="stable"):
        if counts[id_] < min_count:
            break
        with_needs = needs(tokens[int(id_)]) - kept
        if size is not None and len(kept) + len(with_needs) > size:
            break
        kept |= with_needs
    return kept


def _is_character(token: str, model: dict) -> bool:
    """Whether it stands for one character, or for one byte, which longer tokens can be spelled with."""
    prefix = model.get("continuing_subword_prefix") or ""
    if len(token) == 1 or len(token.removeprefix(prefix)) == 1:
        return True
    return bool(model.get("byte_fallback")) and token.startswith("<0x") and len(token) == 6


def _needs(model: dict, vocab: dict[str, int]) -> Callable[[str], set[str]]:
    """A function from a token to itself and all that text with it needs."""
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]

        def needs(token: str) -> set[str]:
            spelled = {form for c in token.removeprefix(prefix) for form in (c, prefix + c)}
            return {token} | (spelled & vocab.keys())

        return needs
    if model["type"] == "Unigram":
        return lambda token: {token} | (set(token) & vocab.keys())
    if model["type"] != "BPE":
        raise InputError(f"a vocabulary of the kind {model['type']} can't be trimmed: WordPiece, BPE or Unigram can.")
    made_of: dict[str, tuple[str, str]] = {}
    for first, second in model["merges"]:
        made_of.setdefault(_merged(first, second, model), (first, second))

    def needs_of_merges(token: str) -> set[str]:
        found, open_ = set(), [token]
        while open_:
            token = open_.pop()
            found.add(token)
            open_ += made_of.get(token, ())
        return found

    return needs_of_merges


def _merged(first: str, second: str, model: dict) -> str:
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def trim(tokenizer: dict, vocab: dict[str, int], kept: set[str]) -> tuple[dict, np.ndarray]:
    """The JSON form of the tokenizer with only these tokens, numbered anew in the old order.

    Returns: that, and (new size,) int64, the old id of each new one.
    """
    ids = np.array(sorted(vocab[token] for token in kept), np.int64)
    new = {int(old): i for i, old in enumerate(ids)}
    model = dict(tokenizer["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if i in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[id_] for token, id_ in model["vocab"].items() if id_ in new}
    if model["type"] == "BPE":
        model["merges"] = [
            [first, second]
            for first, second in model["merges"]
            if {first, second, _merged(first, second, model)} <= kept
        ]
    added = [{**token, "id": new[token["id"]]} for token in tokenizer["added_tokens"]]
    post_processor = _renumbered(tokenizer["post_processor"], vocab, new)
    return {**tokenizer, "model": model, "added_tokens": added, "post_processor": post_processor}, ids


def _renumbered(node, vocab: dict[str, int], new: dict[int, int]):
    """A post-processor with its special tokens' new ids: pairs [token, id], and `ids` beside `tokens`."""
    if isinstance(node, dict) and {"ids", "tokens"} <= node.keys():
        return {**node, "ids": [new[id_] for id_ in node["ids"]]}
    if isinstance(node, dict):
        return {key: _renumbered(value, vocab, new) for key, value in node.items()}
    if isinstance(node, list) and len(node) == 2 and isinstance(node[1], int) and vocab.get(node[0]) == node[1]:
        return [node[0], new[node[1]]]
    if isinstance(node, list):
        return [_renumbered(value, vocab, new) for value in node]
    return node
