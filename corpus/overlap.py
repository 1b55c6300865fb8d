"""Which sequences of a corpus share long runs of words with evaluation sets.

A model that has read an exam's questions proves little by passing it. As for GPT-3 (Brown et al., 2020, appendix
C), a sequence counts as overlapping if one of its n-grams of words, without case and punctuation, occurs in an
evaluation text.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from corpus.files import TokenCorpus
from corpus.text_reader import TextReader, open_text, spans_of
from corpus.word_ngrams import WordNgrams
from files.atomic import atomic_write
from files.json_reader import parse_json, read_json
from files.paths import check_input_file
from utils import InputError, n_cores, progress_bar

NGRAM = 8  # words; the shortest that GPT-3 used: many texts of GLUE have fewer than 13
PART_TOKENS = 1 << 17  # tokens looked at together: their numbers fit into a core's cache
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


def ngrams_of(paths: list[str], tokenizer, n: int) -> tuple[WordNgrams, np.ndarray]:
    """The n-grams of these files' texts, and (n_files + 1,) where each file's texts begin among all of them.

    Raises: InputError if a file is none, or no text has n words.
    """
    texts_of = [read_texts(path) for path in paths]
    ngrams = WordNgrams([text for texts in texts_of for text in texts], tokenizer, n)
    if not ngrams.n_long:
        raise InputError(f"--against: no text in {' '.join(paths)} has {n} words; give a smaller --ngram.")
    return ngrams, np.cumsum([0, *map(len, texts_of)])


def find_overlaps(corpus: TokenCorpus, tokenizer, paths: list[str], n: int = NGRAM) -> Overlap:
    """Reads the whole corpus once, and compares it with the texts of these files."""
    ngrams, first_text = ngrams_of(paths, tokenizer, n)
    found_sequences, found_hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    with (
        progress_bar(total=corpus.n_tokens, unit=" tokens", unit_scale=True) as progress,
        ThreadPoolExecutor(n_cores()) as threads,  # numpy lets them run side by side
    ):
        for first, offsets, ids in corpus.blocks():
            bounds = _parts(offsets - offsets[0])
            ids_of_parts = np.split(ids, offsets[bounds[1:-1]] - offsets[0])
            lengths_of_parts = np.split(np.diff(offsets), bounds[1:-1])
            found = threads.map(ngrams.find, ids_of_parts, lengths_of_parts)
            for begin, (owners, hashes) in zip(bounds, found, strict=False):
                found_sequences.append(owners + (first + begin))
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
    distinct_hashes = np.unique(hashes)
    examples = [(int(i), ngrams.ngram_in(corpus[i], distinct_hashes)) for i in shown]
    return Overlap(distinct, rows, examples)


def _parts(offsets: np.ndarray) -> np.ndarray:
    """Where to cut a block's sequences into parts of some 100 thousand tokens, with both ends."""
    ends = np.searchsorted(offsets, np.arange(0, offsets[-1], PART_TOKENS))
    return np.unique(np.append(ends, len(offsets) - 1))


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
