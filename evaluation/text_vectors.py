"""Vectors of texts, and what they are worth: whether they rank pairs of sentences by how alike these are, and find the
paragraph that answers a question.

Both are measured without fine-tuning and take seconds to minutes: STS-B's pairs by the cosine of their vectors (Reimers
and Gurevych, 2019, section 4.1), and SQuAD's questions against all of its paragraphs.

Dimensions: n texts; dim.
"""

from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModel

from corpus.tokenization import load_tokenizer
from evaluation.fine_tuning import encode_batch, load_for
from evaluation.glue import TASKS, Example, score
from evaluation.squad import read_questions
from models.sentence_encoder import Pooling, pooling_of

BATCH = 16  # of long texts, larger ones take gigabytes
CUTOFF = 10  # paragraphs that count as found
LENGTH = 128  # tokens


class TextEncoder:
    """Makes one vector of each text, by the model's own pooling; if it has none, by the mean over the tokens.

    Args:
        name: hub name or folder.
        device: to compute on.
        tokenizer: None: the model's own.
        length: tokens of a text that are read at most.
    """

    def __init__(self, name: str, device: torch.device, tokenizer=None, length: int = LENGTH) -> None:
        self.tokenizer = tokenizer or load_tokenizer(name)
        self.model = load_for(AutoModel, name, self.tokenizer).to(device).eval()
        self.pooling, self.length = pooling_of(name) or Pooling(), length

    def batch(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """What the model's `forward` takes."""
        return encode_batch(self.tokenizer, self.model, [(text,) for text in texts], self.length)

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> np.ndarray:
        """(n, dim) float64."""
        batch = {name: ids.to(self.model.device) for name, ids in batch.items()}
        hidden = self.model(**batch).last_hidden_state.double()
        return self.pooling(hidden, batch["attention_mask"]).cpu().numpy()


def vectors_of(encoder, texts: list[str]) -> np.ndarray:
    """(n, dim) float64, in the order of the texts.

    Args:
        encoder: a TextEncoder, or what has its methods.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = ([texts[i] for i in order[start : start + BATCH]] for start in range(0, len(order), BATCH))
    return np.concatenate([encoder(encoder.batch(batch)) for batch in batches])[np.argsort(order)]


def similarity_scores(encoder, pairs: list[Example]) -> dict[str, float]:
    """STS-B's metrics of the cosines, in percent; `score` is Spearman's alone, since cosines are on another scale."""
    vectors = _of_length_1(vectors_of(encoder, [text for pair in pairs for text in pair.texts]))
    cosines = (vectors[::2] * vectors[1::2]).sum(1, keepdims=True)  # (n pairs, 1)
    metrics = score(TASKS["STS-B"], [cosines], [pairs])
    return metrics | {"score": metrics["spearman"]}


class Collection(NamedTuple):
    """Questions, paragraphs, and which paragraph answers each question."""

    questions: list[str]
    paragraphs: list[str]
    right: np.ndarray


def read_collection(file: str, flag: str) -> Collection:
    """All paragraphs of a file in SQuAD's format. Raises: InputError if it is not such a file."""
    questions = read_questions(file, flag)
    paragraphs = list(dict.fromkeys(question.context for question in questions))
    number = {paragraph: i for i, paragraph in enumerate(paragraphs)}
    right = np.array([number[question.context] for question in questions])
    return Collection([question.question for question in questions], paragraphs, right)


def ranking(questions: np.ndarray, paragraphs: np.ndarray) -> np.ndarray:
    """(n questions, n paragraphs) the numbers of the paragraphs, by falling cosine to each question.

    Args:
        questions, paragraphs: (n, dim) vectors.
    """
    return np.argsort(-_of_length_1(questions) @ _of_length_1(paragraphs).T, axis=1, kind="stable")


def retrieval_scores(ranked: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """nDCG@10 and recall@10 in percent, where each question has one right paragraph.

    Args:
        ranked: of `ranking`.
        right: (n questions,) the number of the right paragraph.
    """
    place = (ranked == right[:, None]).argmax(1)  # from 0
    found = place < CUTOFF
    return {"ndcg": 100 * float((found / np.log2(place + 2)).mean()), "recall": 100 * float(found.mean())}


def _of_length_1(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
