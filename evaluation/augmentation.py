"""More texts of a task: copies of its examples in which a masked language model has rewritten words.

Each word of a text is masked once, and the model's best guesses for it are noted. In a copy, each word gives way with a
probability to one of its guesses (Jiao et al., 2020, arXiv 1909.10351, algorithm 1). What the label of a copy would be
nobody knows; a fine-tuned teacher says what it thinks.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from corpus.tokenization import load_tokenizer, padding_id, word_beginnings
from files.atomic import append_json_lines
from files.json_reader import read_json_lines
from models.families import max_length
from models.language_model import LanguageModel
from models.loading import load_language_model
from training.checkpoint import fingerprint
from utils import InputError, integer, path, progress_bar

WORD = re.compile(r"\w+(?:[-'’]\w+)*")  # with what it is contracted or compounded of
CHANCE = 0.4  # of a word to be rewritten in a copy
N_GUESSES = 15
CHUNK = 64  # examples between two writes
BATCH_TOKENS = 4096  # padding included


def add_augmentation_flags(group, default_model: str) -> None:
    """--augment and --augment_with, on a group of a parser's flags.

    Args:
        default_model: what rewrites unless told otherwise, for the help.
    """
    group.add_argument(
        "--augment",
        type=integer(0, 1000),
        default=0,
        metavar="N",
        help="also learn from N copies of each example in which a masked language model has rewritten words "
        "(%(default)s)",
    )
    group.add_argument("--augment_with", type=path, help=f"its hub name or folder (default: {default_model})")


class Word(NamedTuple):
    """A word of a text, from `start` to `end`, and what could stand there instead, best first."""

    start: int
    end: int
    guesses: list[str]


def rewritten(
    examples: list[tuple[str, ...]], n_copies: int, model: str, seed: int, file: Path, device: torch.device, title: str
) -> list[tuple[str, ...]]:
    """Copies of all examples; fewer of those that have few words. A copy of two texts has one of them rewritten.

    Args:
        examples: one or two texts each.
        model: masked language model, folder or hub name.
        file: where they are added as they are made, an example a line: {"texts": [...], "copies": [[...], ...]}. After
            an interruption they are continued there.
        title: what the progress bar says.

    Raises: InputError if the model can't guess words, or the file was made of something else.
    """
    guesser = Guesser(model, device)
    made_of = {"n_copies": n_copies, "seed": seed, "model": guesser.fingerprint,
               "examples": zlib.crc32(repr(examples).encode(errors="surrogatepass"))}  # fmt: skip
    done = _begun(file, made_of)
    with progress_bar(total=len(examples), initial=len(done), desc=title) as bar:
        while chunk := examples[len(done) : len(done) + CHUNK]:
            words = guesser.words([text for texts in chunk for text in texts])
            lines = []
            for i, texts in enumerate(chunk, len(done)):
                generator = np.random.default_rng([seed, i])
                copies = _copies(texts, [next(words) for _ in texts], n_copies, generator)
                lines.append({"texts": texts, "copies": copies})
            append_json_lines(file, *lines)
            done += [line["copies"] for line in lines]
            bar.update(len(chunk))
    return [tuple(copy) for copies in done for copy in copies]


def _begun(file: Path, made_of: dict) -> list[list[list[str]]]:
    """The copies of each example that the file has; begins it if it has none."""
    way_out = "remove it, and it is made again"
    lines = read_json_lines(file, dict, way_out) if file.exists() else []
    if not lines:
        append_json_lines(file, made_of)
    elif lines[0] != made_of or not all("copies" in line for line in lines[1:]):
        raise InputError(f"{file} was made of other examples or with other flags; {way_out}.")
    return [line["copies"] for line in lines[1:]]


def _copies(
    texts: tuple[str, ...], words: list[list[Word]], n_copies: int, generator: np.random.Generator
) -> list[tuple[str, ...]]:
    """Different ones, none like the example."""
    copies: dict[tuple[str, ...], None] = {}
    for i in range(n_copies):
        copy, place = list(texts), i % len(texts)
        for word in reversed(words[place]):  # so that the places of those before it stay as they are
            if word.guesses and generator.random() < CHANCE:
                guess = word.guesses[generator.integers(len(word.guesses))]
                copy[place] = copy[place][: word.start] + guess + copy[place][word.end :]
        copies[tuple(copy)] = None
    copies.pop(texts, None)
    return list(copies)


class Guesser:
    """Guesses the words of texts, each from the words around it.

    Args:
        name: masked language model, folder or hub name.

    Attributes:
        fingerprint: a checksum of its weights.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.tokenizer = load_tokenizer(name)
        self.model = LanguageModel(load_language_model(name, "--augment_with", head_required=True)).eval()
        if self.tokenizer.mask_token is None or self.model.family.causal:
            raise InputError(f"--augment_with {name}: it guesses what comes next, and not what is masked.")
        if len(self.tokenizer) > self.model.projection.out_features:
            raise InputError(f"--augment_with {name}: its tokenizer has more tokens than the model.")
        self.fingerprint = fingerprint(self.model.state_dict().values())
        self.model.to(device)
        self.device = device
        self.spelled = [self.tokenizer.decode([i]).strip() for i in range(len(self.tokenizer))]
        beginnings = word_beginnings(self.tokenizer)
        # What is no whole word is never guessed.
        self.no_words = torch.tensor(
            [not (begins and word.isalnum()) for begins, word in zip(beginnings, self.spelled, strict=True)]
        )

    def words(self, texts: list[str]) -> Iterator[list[Word]]:
        """Those of each text; of a text longer than the model takes, those of its beginning."""
        encoded = self.tokenizer(
            texts, truncation=True, max_length=max_length(self.model.model.config), return_offsets_mapping=True
        )
        places, masked = [], []  # a word each: its text, start and end; the tokens with a mask in its place
        for i, text in enumerate(texts):
            ids, offsets = encoded["input_ids"][i], np.array(encoded["offset_mapping"][i])  # (n, 2) characters
            for start, end in (match.span() for match in WORD.finditer(text)):
                pieces = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
                if len(pieces) and offsets[pieces[-1], 1] >= end:  # otherwise the text is cut off before its end
                    places.append((i, start, end))
                    masked.append((ids[: pieces[0]], ids[pieces[-1] + 1 :]))
        found: list[list[Word]] = [[] for _ in texts]
        for (i, start, end), guesses in zip(places, self._guesses(masked), strict=True):
            others = [guess for guess in guesses if guess.casefold() != texts[i][start:end].casefold()]
            found[i].append(Word(start, end, others[:N_GUESSES]))
        return iter(found)

    @torch.inference_mode()
    def _guesses(self, masked: list[tuple[list[int], list[int]]]) -> list[list[str]]:
        """What could stand between the two parts of each, best first, one more than are needed."""
        found: list[list[str]] = [[]] * len(masked)
        lengths = [len(before) + 1 + len(after) for before, after in masked]
        order = sorted(range(len(masked)), key=lengths.__getitem__, reverse=True)
        while order:
            longest = lengths[order[0]]
            n = max(1, BATCH_TOKENS // longest)
            batch, order = order[:n], order[n:]
            ids = torch.full((len(batch), longest), padding_id(self.tokenizer))
            for row, i in zip(ids, batch, strict=True):
                before, after = masked[i]
                row[: lengths[i]] = torch.tensor([*before, self.tokenizer.mask_token_id, *after])
            real = torch.arange(longest) < torch.tensor([lengths[i] for i in batch])[:, None]
            states = self.model.hidden(ids.to(self.device), real.to(self.device)).unflatten(0, ids.shape)
            at = torch.tensor([len(masked[i][0]) for i in batch])
            logits = self.model.logits(states[torch.arange(len(batch)), at])[:, : len(self.spelled)]
            best = logits.cpu().masked_fill(self.no_words, -torch.inf).topk(N_GUESSES + 1).indices
            for i, tokens in zip(batch, best.tolist(), strict=True):
                found[i] = [self.spelled[token] for token in tokens]
        return found
