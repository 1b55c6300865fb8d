"""Which sequences of a corpus share long runs of words with evaluation sets.

A model that has read an exam's questions proves little by passing it. As for GPT-3 (Brown et al., 2020, appendix
C), a sequence counts as overlapping if one of its n-grams of words, without case and punctuation, occurs in an
evaluation text.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from corpus.files import TokenCorpus
from corpus.text_reader import TextReader, open_text, spans_of
from files.atomic import atomic_write
from files.json_reader import parse_json, read_json
from files.paths import check_input_file
from utils import InputError, progress_bar

NGRAM = 8  # words; the shortest that GPT-3 used: many texts of GLUE have fewer than 13
WORD = re.compile(r"\w+")
SHOWN = 3
OVERLAP = {"corpus": {"sequences": int, "tokens": int, "crc32": int}, "sequences": [int]}


# ------------------------------------------------------------------------------------------------- the evaluation texts


def read_texts(path: str) -> list[str]:
    """The texts of an evaluation set.

    Of JSON (`.json`, as SQuAD comes) every string in it, of JSON lines (`.jsonl`) every string of every line, of
    anything else (GLUE's TSV, plain text) every field between tabs of every line.

    Raises: InputError if it is not such a file.
    """
    check_input_file(path, "--against")
    if path.endswith(".json"):
        with open_text(path) as (text, _):
            return list(_strings(parse_json(text.read(), f"--against {path}")))
    lines = [line for block in TextReader(spans_of([path])).blocks() for line in block.lines]
    if path.endswith(".jsonl"):
        return [string for line in lines for string in _strings(parse_json(line, f"--against {path}"))]
    return [field for line in lines for field in line.split("\t")]


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


# ------------------------------------------------------------------------------------------------------------- n-grams


class WordNgrams:
    """The n-grams of words of some texts, as hashes.

    Both sides go through the tokenizer and back, so that what it does to text (case, accents) makes no difference.

    Args:
        texts: of the evaluation sets.
        tokenizer: a fast one; the corpus's.
        n: words.

    Attributes:
        hashes: (n_ngrams,) uint64, sorted; owners: (n_ngrams,) which text each is from.
        n_long: texts of at least n words, the only ones that can be found.
    """

    def __init__(self, texts: list[str], tokenizer, n: int) -> None:
        self.backend, self.n = tokenizer.backend_tokenizer, n
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        words = self._words([encoding.ids for encoding in encoded])
        # Words that no evaluation text holds are all number 0, which is in no n-gram that is looked for.
        self.number_of = {word: i for i, word in enumerate(sorted({word for text in words for word in text}), start=1)}
        self._random = np.random.default_rng(0).integers(1 << 64, size=len(self.number_of) + 1, dtype=np.uint64)
        hashes, owners = self._hashes(words)
        order = np.argsort(hashes)
        self.hashes, self.owners = hashes[order], owners[order]
        self.n_long = len(np.unique(owners))

    def find(self, sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n_found,) numbers of sequences with an n-gram of the texts, each as often as it has one, and
        (n_found,) the hashes of these n-grams."""
        hashes, owners = self._hashes(self._words(sequences))
        if not len(self.hashes):
            return owners[:0], hashes[:0]
        places = np.searchsorted(self.hashes, hashes)
        found = self.hashes[np.minimum(places, len(self.hashes) - 1)] == hashes
        return owners[found], hashes[found]

    def ngram_in(self, sequence: list[int], hashes: np.ndarray) -> str:
        """The words of the first n-gram of a sequence that is among these."""
        (words,) = self._words([sequence])
        ngrams = (words[start : start + self.n] for start in range(len(words) - self.n + 1))
        return next(" ".join(ngram) for ngram in ngrams if np.isin(self._hashes([ngram])[0], hashes).any())

    def _words(self, sequences: Iterable[list[int]]) -> list[list[str]]:
        texts = self.backend.decode_batch(sequences, skip_special_tokens=True)
        return [WORD.findall(text.lower()) for text in texts]

    def _hashes(self, words: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        """(n_ngrams,) uint64 of all n-grams of known words, and (n_ngrams,) the text that each is from.

        A polynomial in random numbers of the words, modulo 2^64. A 0 between the texts, as for an unknown word, keeps
        n-grams within one text.
        """
        get = self.number_of.get
        lengths = np.fromiter(map(len, words), np.int64, len(words)) + 1
        numbers = np.fromiter((i for text in words for i in (*(get(word, 0) for word in text), 0)), np.int64)
        n_ngrams = max(len(numbers) - self.n + 1, 0)
        hashes, known = np.zeros(n_ngrams, np.uint64), np.ones(n_ngrams, bool)
        for k in range(self.n):
            part = numbers[k : k + n_ngrams]
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + self._random[part]
            known &= part > 0
        return hashes[known], np.repeat(np.arange(len(words)), lengths)[:n_ngrams][known]


# ------------------------------------------------------------------------------------------------------------- overlaps


@dataclass
class Overlap:
    """What `find_overlaps` finds.

    Attributes:
        sequences: (n,) sorted numbers of the corpus's sequences that overlap with any of the files.
        files: for each evaluation file its `name`, `texts` (of n words or more), `found` (those of which an n-gram
            stands in the corpus), and `sequences` (how many of the corpus's overlap with it).
        examples: some n-grams, with the number of a sequence that holds each.
    """

    sequences: np.ndarray
    files: list[dict]
    examples: list[tuple[int, str]]


def find_overlaps(corpus: TokenCorpus, tokenizer, paths: list[str], n: int = NGRAM) -> Overlap:
    """Reads the whole corpus once, and compares it with the texts of these files."""
    texts_of = [read_texts(path) for path in paths]
    ngrams = WordNgrams([text for texts in texts_of for text in texts], tokenizer, n)
    first_text = np.cumsum([0, *map(len, texts_of)])
    if not ngrams.n_long:
        raise InputError(f"--against: no text in {' '.join(paths)} has {n} words; give a smaller --ngram.")
    found_sequences, found_hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    with progress_bar(total=corpus.n_tokens, unit=" tokens", unit_scale=True) as progress:
        for first, offsets, ids in corpus.blocks():
            sequences = [part.tolist() for part in np.split(ids, offsets[1:-1] - offsets[0])]
            owners, hashes = ngrams.find(sequences)
            found_sequences.append(owners + first)
            found_hashes.append(hashes)
            progress.update(len(ids))
    sequences, hashes = np.concatenate(found_sequences), np.concatenate(found_hashes)
    rows = []
    for path, begin, end in zip(paths, first_text[:-1], first_text[1:], strict=True):
        mine = (ngrams.owners >= begin) & (ngrams.owners < end)
        in_corpus = np.isin(ngrams.hashes, hashes) & mine
        rows.append(
            {
                "name": path,
                "texts": len(np.unique(ngrams.owners[mine])),
                "found": len(np.unique(ngrams.owners[in_corpus])),
                "sequences": len(np.unique(sequences[np.isin(hashes, ngrams.hashes[mine])])),
            }
        )
    distinct = np.unique(sequences)
    shown = distinct[np.linspace(0, len(distinct) - 1, min(SHOWN, len(distinct))).astype(int)]
    examples = [(int(i), ngrams.ngram_in(corpus[i].tolist(), hashes)) for i in shown]
    return Overlap(distinct, rows, examples)


# ---------------------------------------------------------------------------------------- the list that train.py reads


def write_overlap(path: str, overlap: Overlap, corpus: TokenCorpus, n: int) -> None:
    """Writes a JSON file for `train.py --leave_out`, valid for this corpus only."""
    content = {"corpus": corpus.identity, "ngram": n, "files": overlap.files, "sequences": overlap.sequences.tolist()}
    with atomic_write(path, "w") as file:
        json.dump(content, file)


def load_overlap(path: str, corpus: TokenCorpus) -> np.ndarray:
    """(n,) sorted numbers of the sequences to leave out. Raises: InputError if it is not a list of this corpus's."""
    content = read_json(path, OVERLAP, "scripts/corpus_doctor.py --overlap_file makes such a file", "--leave_out")
    identity, sequences = content["corpus"], np.unique(np.array(content["sequences"], np.int64))
    if identity != corpus.identity:
        raise InputError(
            f"--leave_out {path} was made for another text than {corpus} ({identity['sequences']:,} sequences, not "
            f"{len(corpus):,}): call scripts/corpus_doctor.py --against again on this text."
        )
    return sequences
