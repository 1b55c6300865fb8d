"""Runs of words in tokenized text, as hashes: found at some 10 million tokens a second on a core, where turning the
tokens into text again and cutting that into words takes twenty times as long."""

import re

import numpy as np

WORD = re.compile(r"\w+")
PART_OF_CHARACTER = "\ufffd"  # what a decoder shows for bytes that are not a whole character
PIECE_OF_WORD = re.compile(rf"[\w{PART_OF_CHARACTER}]+")
LONGEST_WORD = 1 << 12  # bytes; in longer ones, which are no words, the order of the rest does not count
# Odd numbers: the bases of the polynomials in bytes and in words, and what spreads the bits of a word's hash.
OF_BYTES, OF_WORDS, MIXER = np.random.default_rng(0).integers(1 << 64, size=3, dtype=np.uint64) | np.uint64(1)


class WordHashes:
    """Words of tokenized text as hashes, without turning the tokens into text again.

    A word is a run of letters, digits and underscores, in lower case. Its hash is a polynomial in its UTF-8 bytes,
    modulo 2^64, so it does not matter into which pieces the tokenizer cut it: "The" and "the", "Un" + "like" and
    "unlike" are the same. For this every token is taken apart once, into the runs that its text consists of; nearly all
    tokens are one run, or a mark that is none.

    Args:
        tokenizer: a fast one.
    """

    def __init__(self, tokenizer) -> None:
        backend = tokenizer.backend_tokenizer
        # Whether a token continues a word shows when it follows another one.
        before = backend.encode("a", add_special_tokens=False).ids[:1]
        n_before = len(backend.decode(before, skip_special_tokens=True))
        texts = backend.decode_batch([[*before, token] for token in range(len(tokenizer))], skip_special_tokens=True)
        self._powers = np.cumprod(np.repeat(OF_BYTES, LONGEST_WORD))
        joins, closes, values, lengths, n_runs = [], [], [], [], []
        for token, text in enumerate(texts):
            text = text[n_before:].lower()
            runs = list(PIECE_OF_WORD.finditer(text)) or [None]
            n_runs.append(len(runs))
            for run in runs:
                data = run[0].encode()[:LONGEST_WORD] if run else b""
                if PART_OF_CHARACTER in text:  # bytes that are no text by themselves are told apart by their token
                    data = f"<{token}>".encode()
                joins.append(run is not None and run.start() == 0)
                closes.append(run is None or run.end() < len(text))
                lengths.append(len(data))
                values.append(int(np.frombuffer(data, np.uint8).astype(np.uint64) @ self._powers[: len(data)]))
        self._joins, self._closes = np.array(joins), np.array(closes)
        self._values, self._lengths = np.array(values, np.uint64), np.array(lengths)
        self._n_runs = np.array(n_runs)
        self._first_run = np.cumsum(self._n_runs) - self._n_runs

    def __call__(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n_words,) uint64 hashes and (n_words,) the sequence that each word is from.

        Args:
            ids: (sum(lengths),) tokens of sequences, one after the other.
            lengths: (n_sequences,) their lengths.
        """
        n_runs = self._n_runs[ids]
        runs = np.arange(n_runs.sum()) + np.repeat(self._first_run[ids] - np.cumsum(n_runs) + n_runs, n_runs)
        owners = np.repeat(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths), n_runs)
        begins = np.ones(len(runs), bool)
        begins[1:] = ~self._joins[runs[1:]] | self._closes[runs[:-1]] | (owners[1:] != owners[:-1])
        starts = np.flatnonzero(begins)
        n_bytes = self._lengths[runs]
        place = np.cumsum(n_bytes) - n_bytes
        place -= np.repeat(place[starts], np.diff(starts, append=len(runs)))  # bytes of the word before this run
        weighted = self._values[runs] * self._powers[np.minimum(place, LONGEST_WORD - 1)]
        words = np.add.reduceat(weighted, starts) if len(starts) else weighted
        is_word = n_bytes[starts] > 0
        return words[is_word], owners[starts][is_word]


class WordNgrams:
    """The n-grams of words of some texts, as hashes.

    Both sides go through the tokenizer, so that what it does to text (accents, unknown characters) makes no difference.

    Args:
        texts: of the evaluation sets.
        tokenizer: a fast one; the corpus's.
        n: words.

    Attributes:
        hashes: (n_ngrams,) uint64, sorted; owners: (n_ngrams,) which text each is from.
        n_long: texts of at least n words, the only ones that can be found.
    """

    def __init__(self, texts: list[str], tokenizer, n: int) -> None:
        self.tokenizer, self.n = tokenizer, n
        self._words = WordHashes(tokenizer)
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        hashes, owners = self._hashes(*_flat([encoding.ids for encoding in encoded]))
        order = np.argsort(hashes)
        self.hashes, self.owners = hashes[order], owners[order]
        self.n_long = len(np.unique(owners))
        # Most n-grams of a corpus are in no evaluation set, and one look into a table rules them out.
        self._shift = np.uint64(64 - max(10, (16 * len(hashes)).bit_length()))
        self._possible = np.zeros(1 << (64 - int(self._shift)), bool)
        self._possible[hashes >> self._shift] = True

    def find(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (n_found,) numbers of sequences with an n-gram of the texts, each as often as it has one, and
        (n_found,) the hashes of these n-grams. The arguments are those of `WordHashes`."""
        hashes, owners = self._hashes(ids, lengths)
        possible = np.flatnonzero(self._possible[hashes >> self._shift])
        hashes, owners = hashes[possible], owners[possible]
        places = np.searchsorted(self.hashes[:-1], hashes)
        found = self.hashes[places] == hashes if len(self.hashes) else np.zeros(0, bool)
        return owners[found], hashes[found]

    def ngram_in(self, sequence: np.ndarray, hashes: np.ndarray) -> str:
        """The words of the last n-gram of a sequence that is among these."""
        holds_one = lambda part: np.isin(self._hashes(*_flat([part]))[0], hashes).any()  # noqa: E731
        start = max(i for i in range(len(sequence)) if holds_one(sequence[i:]))
        stop = min(i for i in range(start, len(sequence) + 1) if holds_one(sequence[start:i]))
        text = self.tokenizer.decode(sequence[start:stop], skip_special_tokens=True)
        return " ".join(WORD.findall(text.lower()))

    def _hashes(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n_ngrams,) uint64, and (n_ngrams,) the sequence of each: a polynomial in the words, modulo 2^64."""
        words, owners = self._words(ids, lengths)
        words = (words ^ (words >> np.uint64(29))) * MIXER
        n_ngrams = max(len(words) - self.n + 1, 0)
        hashes = np.zeros(n_ngrams, np.uint64)
        for k in range(self.n):
            hashes *= OF_WORDS
            hashes += words[k : k + n_ngrams]
        in_one = owners[:n_ngrams] == owners[self.n - 1 :]
        return hashes[in_one], owners[:n_ngrams][in_one]


def _flat(sequences: list) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as ids one after the other, and their lengths."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    return np.array([token for sequence in sequences for token in sequence], np.int64), lengths
