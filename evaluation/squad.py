"""SQuAD 1.1 (Rajpurkar et al., 2016): its files, windows over long texts, the choice of an answer, and its metrics.

A text longer than a window is read in several, whose beginnings are `doc_stride` tokens apart (Devlin et al., 2019, and
their run_squad.py). Each window gives every token a logit for being the answer's first and one for being its last; the
answer is the span with the largest sum in any window.

Dimensions: n_windows; seq_length tokens of a window.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering

from corpus.tokenization import load_tokenizer
from evaluation.fine_tuning import load_for, longest, taken_by
from files.json_reader import read_json
from utils import InputError, logger

MAX_SEQ_LENGTH, DOC_STRIDE, MAX_QUERY_LENGTH = 384, 128, 64  # tokens
ANSWERED = {"id": (str, int), "question": str, "answers": [{"text": str, "answer_start": int}]}
SQUAD = {"data": [{"paragraphs": [{"context": str, "qas": [ANSWERED]}]}]}
N_BEST, MAX_ANSWER_LENGTH = 20, 30  # answers; tokens


class Question(NamedTuple):
    """A question about a context, and the answers that people gave: (text, first character in the context)."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


@dataclass
class Window:
    """A part of a context behind its question.

    Attributes:
        features: what a model's `forward` takes, lists of seq_length ints.
        question: number of the question.
        offsets: (seq_length, 2) int, which characters of the context each token is; -1 for those of no context.
    """

    features: dict[str, list[int]]
    question: int
    offsets: np.ndarray


class Answer(NamedTuple):
    """A span of a context: its text, its first character, and its share among the best spans."""

    text: str
    start: int
    probability: float


def read_questions(path: str, flag: str) -> list[Question]:
    """The questions of a file in SQuAD's format. Raises: InputError if it is not such a file."""
    articles = read_json(path, SQUAD, "give a file in the format of SQuAD 1.1", flag)["data"]
    questions = [
        Question(
            str(qa["id"]),
            qa["question"].strip(),
            paragraph["context"],
            tuple((answer["text"], answer["answer_start"]) for answer in qa["answers"]),
        )
        for article in articles
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    if not questions:
        raise InputError(f"{flag} {path} holds no questions.")
    if unanswered := [question.id for question in questions if not question.answers]:
        raise InputError(
            f"{flag} {path}: question {unanswered[0]} has no answer; SQuAD 1.1 has one for each, 2.0 is not supported."
        )
    return questions


def learnable(questions: list[Question], path: str) -> list[Question]:
    """The questions whose (first) answer is where the file says; a warning counts the others.

    Raises: InputError if that is none.
    """
    right = [question for question in questions if _is_in_place(*question.answers[0], question.context)]
    if not right:
        raise InputError(f"{path}: no answer is at its answer_start, counted in characters, in its context.")
    if n_wrong := len(questions) - len(right):
        logger.warning("%s: %d of %d answers are not where answer_start says, and are left out of training",
                       path, n_wrong, len(questions))  # fmt: skip
    return right


def _is_in_place(text: str, first: int, context: str) -> bool:
    return bool(text) and context.startswith(text, first)


# -------------------------------------------------------------------------------------------------------------- windows


def make_windows(
    questions: list[Question],
    tokenizer,
    max_seq_length: int = MAX_SEQ_LENGTH,
    doc_stride: int = DOC_STRIDE,
    max_query_length: int = MAX_QUERY_LENGTH,
) -> list[Window]:
    """The windows of all questions, in their order."""
    windows = []
    n_special = tokenizer.num_special_tokens_to_add(pair=True)
    for number, question in enumerate(questions):
        asked, n_asked = _first_tokens(question.question, tokenizer, max_query_length)
        overlap = max(max_seq_length - n_asked - n_special - doc_stride, 0)
        encoded = tokenizer(
            asked,
            question.context,
            truncation="only_second",
            max_length=max_seq_length,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for i, encoding in enumerate(encoded.encodings):
            of_context = np.array([part == 1 for part in encoding.sequence_ids])
            offsets = np.where(of_context[:, None], np.array(encoding.offsets), -1)
            windows.append(Window({name: encoded[name][i] for name in tokenizer.model_input_names}, number, offsets))
    return windows


def _first_tokens(text: str, tokenizer, n: int) -> tuple[str, int]:
    """The part of a text that its first n tokens cover, and how many it has."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return (text, len(offsets)) if len(offsets) <= n else (text[: offsets[n - 1][1]], n)


def label(window: Window, question: Question) -> tuple[int, int]:
    """The first and last token of the (first) answer; (0, 0), [CLS], where it does not lie in the window whole."""
    text, first = question.answers[0]
    last = first + len(text) - 1
    holds = lambda character: np.flatnonzero((window.offsets[:, 0] <= character) & (character < window.offsets[:, 1]))  # noqa: E731
    start, end = holds(first), holds(last)
    return (int(start[0]), int(end[-1])) if len(start) and len(end) else (0, 0)


# -------------------------------------------------------------------------------------------------------------- answers


def best_answers(
    questions: list[Question],
    windows: list[Window],
    start_logits: list[np.ndarray],
    end_logits: list[np.ndarray],
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> list[list[Answer]]:
    """For each question its best spans, best first.

    Args:
        start_logits, end_logits: for each window (seq_length or more,).
    """
    spans: list[list[tuple[float, int, int]]] = [[] for _ in questions]  # (score, first character, one after the last)
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        best = heapq.nlargest(n_best, _spans(window, starts, ends, n_best, max_answer_length))
        spans[window.question] = heapq.nlargest(n_best, {*spans[window.question], *best})
    answers = []
    for question, best in zip(questions, spans, strict=True):
        scores = np.array([score for score, *_ in best])
        probabilities = np.exp(scores - scores.max()) if len(best) else scores
        probabilities = probabilities / probabilities.sum() if len(best) else scores
        answers.append(
            [
                Answer(question.context[start:stop], start, float(probability))
                for (_, start, stop), probability in zip(best, probabilities, strict=True)
            ]
            or [Answer("", 0, 1.0)]  # a context without a token
        )
    return answers


def _spans(window: Window, starts: np.ndarray, ends: np.ndarray, n_best: int, max_answer_length: int):
    """The spans between the likeliest first and last tokens of a window: (score, first character, one after)."""
    in_context = np.flatnonzero(window.offsets[:, 1] > 0)
    likeliest = lambda logits: in_context[np.argsort(-logits[in_context], kind="stable")[:n_best]]  # noqa: E731
    for start in likeliest(starts):
        for end in likeliest(ends):
            if start <= end < start + max_answer_length:
                score = float(starts[start]) + float(ends[end])
                yield score, int(window.offsets[start, 0]), int(window.offsets[end, 1])


def metrics(questions: list[Question], answers: dict[str, str]) -> dict[str, float]:
    """Exact match and F1 in percent, as SQuAD's evaluation script defines them: the best over the reference answers,
    without case, punctuation and articles."""
    from torchmetrics.functional.text import squad

    predicted = [{"id": question.id, "prediction_text": answers[question.id]} for question in questions]
    references = [
        {
            "id": question.id,
            "answers": {
                "text": [text for text, _ in question.answers],
                "answer_start": [start for _, start in question.answers],
            },
        }
        for question in questions
    ]
    return {name: float(value) for name, value in squad(predicted, references).items()}


class QuestionAnswerer:
    """A fine-tuned model that answers questions:

        QuestionAnswerer("folder").answer("Who wrote it?", "It was written by Ada.")

    Args:
        name: folder or hub name of a model that scripts/run_squad_w_distillation.py has trained, or another one for
            question answering.
    """

    def __init__(self, name: str) -> None:
        self.tokenizer = load_tokenizer(name)
        self.model = load_for(AutoModelForQuestionAnswering, name, self.tokenizer, head_required=True).eval()

    def answer(self, question: str, context: str) -> Answer:
        """The likeliest span of the context. A long context is read in windows."""
        asked = Question("", question.strip(), context, ())
        length = longest(self.model, self.tokenizer, MAX_SEQ_LENGTH)
        stride, of_question = min(DOC_STRIDE, length // 4), min(MAX_QUERY_LENGTH, length // 4)
        windows = make_windows([asked], self.tokenizer, length, stride, of_question)
        logits = []
        for window in windows:
            features = {name: torch.tensor([ids]) for name, ids in taken_by(self.model, window.features).items()}
            with torch.no_grad():
                output = self.model(**features)
            logits.append((output.start_logits[0].numpy(), output.end_logits[0].numpy()))
        return best_answers([asked], windows, *map(list, zip(*logits, strict=True)))[0][0]
