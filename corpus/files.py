"""One corpus made of several binarized files, checked against each other and the run's tokenizer."""

import glob
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from corpus.tokenization import describe_tokenizer
from dataset import TokenFile, TokensInMemory, TokensOnDisk, open_token_file
from utils import InputError, logger

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.pickle")


def shard_name(path: str, shard_id: int, num_shards: int) -> str:
    """`text.pickle` -> `text-00001-of-00004.pickle`, as the hub names parts of a data set."""
    return f"{path.removesuffix('.pickle')}-{shard_id:05d}-of-{num_shards:05d}.pickle"


def expand_globs(names: list[str]) -> list[str]:
    """The paths that paths and globs name, in order.

    Raises: InputError if a glob matches nothing, or a file comes twice. Whether a path exists is for the caller to see.
    """
    paths: list[str] = []
    for name in map(str, names):
        is_path = os.path.exists(name) or not glob.has_magic(name)
        matches = [name] if is_path else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise InputError(f"no file matches {name}.")
        paths += matches
    twice = [path for path, n in Counter(map(os.path.realpath, paths)).items() if n > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice.")
    return paths


class TokenCorpus:
    """The sequences of several files as one list: `len(corpus)`, `corpus[i]`, and blocks of many.

    Attributes:
        files: what it consists of.
        first_sequence, first_token: (n_files + 1,) int64, where each file begins in the whole, and the total.
        made_by: the description of the tokenizer that made the files; None for files of other tools.
    """

    def __init__(self, files: list[TokenFile]) -> None:
        self.files = files
        self.first_sequence = np.cumsum([0, *map(len, files)])
        self.first_token = np.cumsum([0, *(file.n_tokens for file in files)])
        ours = [file for file in files if file.made_by]
        self.made_by = ours[0].made_by if ours else None
        for file in ours:
            if file.made_by["vocab_hash"] != self.made_by["vocab_hash"]:
                raise InputError(
                    f"{file.path} was binarized with the tokenizer {file.made_by['tokenizer']}, but {ours[0].path} "
                    f"with {self.made_by['tokenizer']}: give files of one tokenizer."
                )

    def __len__(self) -> int:
        return int(self.first_sequence[-1])

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0].path}{more}"

    def __getitem__(self, i: int) -> np.ndarray:
        """(length,) ids."""
        i = range(len(self))[i]
        k = self._file_of(self.first_sequence, i)
        return self.files[k][i - int(self.first_sequence[k])]

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) ids of a span within one file, in the order of all tokens."""
        k = self._file_of(self.first_token, start)
        return self.files[k].read(start - self.first_token[k], stop - self.first_token[k])

    def _file_of(self, firsts: np.ndarray, i: int) -> int:
        return int(np.searchsorted(firsts, i, "right")) - 1 if len(self.files) > 1 else 0

    def blocks(self, tokens: bool = True) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """All sequences, some million tokens at a time.

        Yields: number of the first sequence; (n + 1,) int64 offsets of n sequences; their ids, if `tokens`.
        """
        for k, file in enumerate(self.files):
            for first, offsets, ids in file.blocks(tokens):
                yield first + int(self.first_sequence[k]), offsets + self.first_token[k], ids

    def take(self, indices: np.ndarray) -> "TokenCorpus":
        """A corpus of some sequences, in memory."""
        sequences = [self[i] for i in indices]
        offsets = np.concatenate([[0], np.cumsum([len(sequence) for sequence in sequences])])
        return TokenCorpus([TokensInMemory(self.files[0].path, np.concatenate(sequences), offsets)])

    @property
    def n_tokens(self) -> int:
        return int(self.first_token[-1])

    @property
    def on_disk(self) -> bool:
        """Whether another process can open it cheaply."""
        return all(isinstance(file, TokensOnDisk) for file in self.files)

    @property
    def identity(self) -> dict:
        """What identifies this corpus: its size and the checksum of its tokens."""
        crcs = [file.crc for file in self.files]
        crc = crcs[0] if len(crcs) == 1 else zlib.crc32(np.array(crcs, "<u4"))
        return {"sequences": len(self), "tokens": self.n_tokens, "crc32": crc}

    def verify(self) -> None:
        """Reads everything once (some GB/s). Raises InputError if a single bit has changed since it was written."""
        for file in self.files:
            file.verify()


def open_corpus(names: list[str], tokenizer=None) -> TokenCorpus:
    """Opens binarized files.

    Args:
        names: paths, or globs such as 'text-*-of-*.pickle'.
        tokenizer: if given, that of the run, which the files must have been made with.

    Raises: InputError if there is no such file, or another tokenizer made it.
    """
    paths = expand_globs(names)
    _log_missing_shards(paths)
    corpus = TokenCorpus([open_token_file(path) for path in paths])
    if tokenizer is not None and corpus.made_by:
        ours = describe_tokenizer(tokenizer)
        if corpus.made_by["vocab_hash"] != ours["vocab_hash"]:
            raise InputError(
                f"{corpus} was binarized with the tokenizer {corpus.made_by['tokenizer']} of "
                f"{corpus.made_by['vocab_size']} tokens, whose vocabulary is not that of {ours['tokenizer']} "
                f"({ours['vocab_size']}): binarize the text again, or give --tokenizer_name."
            )
    return corpus


def _log_missing_shards(paths: list[str]) -> None:
    numbers_of: dict[tuple[str, str], set[int]] = {}  # (name, number of shards) -> the shards that are there
    for path in paths:
        if match := SHARD.fullmatch(path):
            name, number, total = match.groups()
            numbers_of.setdefault((name, total), set()).add(int(number))
    for (name, total), numbers in numbers_of.items():
        if missing := sorted(set(range(int(total))) - numbers):
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            logger.info("%s: of %d shards, these are not there: %s", name, int(total), some)
