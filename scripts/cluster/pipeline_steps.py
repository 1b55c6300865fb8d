"""Steps for pipelines of datatrove (https://github.com/huggingface/datatrove), which calls each of them once a task."""

import operator
import re
from collections.abc import Iterator

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.word_tokenizers import WordTokenizer

from corpus.documents import pack, paragraphs
from corpus.files import shard_name
from corpus.overlap import ngrams_of
from corpus.token_counts import save_counts
from corpus.tokenization import LineEncoder, describe_tokenizer, load_tokenizer
from corpus.word_ngrams import WORD
from dataset import write_token_file
from utils import InputError, logger

LINES = 4096  # encoded together
CONDITION = re.compile(r"\s*([\w.]+)\s*(==|!=|>=|<=|>|<)\s*(.+?)\s*")
EQUAL = {"==": operator.eq, "!=": operator.ne}
ORDER = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class WriteShard(PipelineStep):
    """Packs documents into sequences, as scripts/make_dump.py does, encodes these and writes them to the task's shard.

    Args:
        target: name that the binarized file would have if it were one; `shard_name` gives that of each task.
        tokenizer_name: hub name or folder.
        target_length, min_length: of a sequence, in words (`corpus.documents.pack`).
        against: evaluation sets; sequences that share `ngram` words in a row with them are left out.
    """

    name, type = "binarized shard", "WRITER"

    def __init__(
        self, target: str, tokenizer_name: str, target_length: int, min_length: int, against: list[str], ngram: int
    ) -> None:
        super().__init__()
        self.target, self.tokenizer_name, self.against, self.ngram = target, tokenizer_name, against, ngram
        self.target_length, self.min_length = target_length, min_length

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = load_tokenizer(self.tokenizer_name)
        path = shard_name(self.target, rank, world_size)
        parts = self._encoded(data, tokenizer)
        first = next(parts, None)
        if first is None:
            logger.warning("task %d of %d has no text, so there is no %s", rank, world_size, path)
            return
        with write_token_file(path, describe_tokenizer(tokenizer)) as writer:
            writer.append(*first)
            for part in parts:
                writer.append(*part)
        save_counts(path)

    def _encoded(self, data: DocumentsPipeline, tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Flat ids and lengths of some thousand sequences at a time; never of none."""
        encode = LineEncoder(tokenizer)
        ngrams = ngrams_of(self.against, tokenizer, self.ngram)[0] if self.against else None
        for lines in self._packed(data):
            ids, lengths = encode(lines)
            if ngrams is not None:
                keep = np.ones(len(lengths), bool)
                keep[ngrams.find(ids, lengths)[0]] = False
                self.stat_update("overlapping", value=int((~keep).sum()), unit="part")
                ids, lengths = ids[np.repeat(keep, lengths)], lengths[keep]
            if len(lengths):
                self.stat_update("sequences", value=len(lengths), unit="part")
                self.stat_update("tokens", value=len(ids), unit="part")
                yield ids, lengths

    def _packed(self, data: DocumentsPipeline) -> Iterator[list[str]]:
        lines: list[str] = []
        for document in data:
            packed = pack([*paragraphs(document.text.splitlines())], self.target_length, self.min_length)
            lines += packed.text.decode().splitlines()
            if len(lines) >= LINES:
                yield lines
                lines = []
        if lines:
            yield lines


class Words(WordTokenizer):
    """Runs of letters and digits, for MinHash; datatrove's own words need spaCy, or data to be downloaded."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError("MinHash asks for words only")

    span_tokenize = sent_tokenize


def parse_condition(text: str) -> tuple[str, str, str]:
    """`language_score >= 0.65` -> (column, comparison, value). Raises: InputError."""
    match = CONDITION.fullmatch(text)
    if not match:
        raise InputError(f"--where: {text!r} is not a condition such as 'language == en' or 'score >= 0.5'.")
    return match.groups()


def holds(document: Document, column: str, comparison: str, value: str) -> bool:
    """Whether a document's column compares so with a value, as numbers unless the column holds something else.

    Raises: InputError if there is no such column, or it holds something else and order is asked for.
    """
    if column not in document.metadata:
        raise InputError(f"--where: there is no column {column}; there are {', '.join(document.metadata)}.")
    found = document.metadata[column]
    if found is None:  # nothing is known of this document
        return comparison == "!="
    if comparison in EQUAL and (isinstance(found, bool) or not isinstance(found, (int, float))):
        return EQUAL[comparison](str(found), value)
    try:
        return (EQUAL | ORDER)[comparison](float(found), float(value))
    except (TypeError, ValueError):
        raise InputError(f"--where: {column} holds {found!r}, of which {comparison} {value} makes no sense.") from None
