"""Windows, answers and metrics of SQuAD are what its authors define."""

import json

import numpy as np
import pytest
from workspace import load_tokenizer

from evaluation import squad
from evaluation.squad import Question
from utils import InputError

CONTEXT = "the cat sees the garden in the morning. " * 9


@pytest.fixture(scope="module")
def tokenizer(workspace):
    return load_tokenizer(workspace / "bert-base-uncased")


def about(answer: str, context: str = CONTEXT, nth: int = 0, question: str = "who sees it?") -> Question:
    start = -1
    for _ in range(nth + 1):
        start = context.index(answer, start + 1)
    return Question(f"{answer}-{nth}", question, context, ((answer, start),))


# By the rules of SQuAD's evaluation script, worked out by hand: (prediction, references, exact match, F1 in percent).
OFFICIAL = [
    ("France", ["France"], 100, 100),
    ("the Normans!", ["Normans"], 100, 100),  # articles and punctuation do not count
    ("NORMANS", ["the  Normans"], 100, 100),  # nor do case and blanks
    ("in the 10th century", ["10th century"], 0, 100 * 2 * (2 / 3) * 1 / (2 / 3 + 1)),
    ("10th", ["in the 10th and 11th centuries", "10th century"], 0, 100 * 2 * 1 * 0.5 / 1.5),  # the best reference
    ("a cat a cat", ["cat"], 0, 100 * 2 * 0.5 * 1 / 1.5),  # a word counts as often as it occurs
    ("cat dog", ["dog cat"], 0, 100),  # F1 does not know the order
    ("well-known", ["well known"], 0, 0),  # punctuation goes without leaving a blank
    ("", ["x"], 0, 0),
    ("Paris", ["London", "Rome"], 0, 0),
]


@pytest.mark.parametrize("prediction, references, exact_match, f1", OFFICIAL)
def test_metrics_are_the_official_ones(prediction, references, exact_match, f1):
    question = Question("1", "?", "", tuple((text, 0) for text in references))
    metrics = squad.metrics([question], {"1": prediction})
    assert metrics == {"exact_match": pytest.approx(exact_match), "f1": pytest.approx(f1)}


def test_metrics_are_means_over_the_questions():
    questions = [Question(str(i), "?", "", ((text, 0),)) for i, text in enumerate(("a cat", "a dog", "an old sailor"))]
    metrics = squad.metrics(questions, {"0": "cat", "1": "cat", "2": "sailor"})
    assert metrics == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx((100 + 0 + 200 / 3) / 3)}


def test_answers_that_are_not_where_they_should_be_are_left_out(caplog):
    right, shifted, empty = about("garden"), Question("2", "?", CONTEXT, (("garden", 3),)), about("")
    assert squad.learnable([shifted, right, empty], "train.json") == [right]
    assert "train.json: 2 of 3 answers are not where answer_start says" in caplog.text
    with pytest.raises(InputError, match="no answer is at its answer_start"):
        squad.learnable([shifted], "train.json")


def test_windows_begin_a_stride_apart_and_cover_the_context(tokenizer):
    windows = squad.make_windows([about("garden")], tokenizer, max_seq_length=40, doc_stride=11, max_query_length=8)
    firsts = []
    covered = set()
    for window in windows:
        ids = window.features["input_ids"]
        assert len(ids) == len(window.offsets) <= 40
        in_context = np.flatnonzero(window.offsets[:, 1] > 0)
        assert ids[0] == tokenizer.cls_token_id
        assert ids[in_context[0] - 1] == ids[in_context[-1] + 1] == tokenizer.sep_token_id
        for place in in_context:
            first, last = window.offsets[place]
            assert tokenizer.convert_ids_to_tokens(ids[place]).removeprefix("##") == CONTEXT[first:last]
        firsts.append(int(window.offsets[in_context[0], 0]))
        covered |= {tuple(map(int, window.offsets[place])) for place in in_context}
    tokens = tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert covered == set(tokens)
    assert firsts == [first for first, _ in tokens[::11][: len(windows)]]


def test_a_short_context_is_one_window(tokenizer):
    assert len(squad.make_windows([about("cat", "the cat sees it")], tokenizer)) == 1


def test_a_long_question_is_cut(tokenizer):
    asked = about("garden", question="the cat " * 40)
    (first, *_) = squad.make_windows([asked], tokenizer, max_seq_length=64, doc_stride=16, max_query_length=10)
    in_context = np.flatnonzero(first.offsets[:, 1] > 0)
    assert in_context[0] == 1 + 10 + 1


@pytest.mark.parametrize("nth", [0, 4, 8])
def test_the_label_is_the_answers_tokens_in_every_window_that_holds_it_whole(tokenizer, nth):
    question = about("garden in the", nth=nth)
    windows = squad.make_windows([question], tokenizer, max_seq_length=40, doc_stride=11, max_query_length=8)
    found = 0
    for window in windows:
        start, end = squad.label(window, question)
        shown = window.offsets[window.offsets[:, 1] > 0]
        first = question.answers[0][1]
        holds = shown[0, 0] <= first and first + len("garden in the") <= shown[-1, 1]
        assert ((start, end) != (0, 0)) == holds
        if holds:
            assert (window.offsets[start, 0], window.offsets[end, 1]) == (first, first + len("garden in the"))
            found += 1
    assert found


def test_the_answer_is_the_best_span_of_any_window(tokenizer):
    """Held against all pairs of all tokens."""
    question = about("garden")
    windows = squad.make_windows([question], tokenizer, max_seq_length=40, doc_stride=11, max_query_length=8)
    generator = np.random.default_rng(0)
    logits = [generator.normal(size=(2, len(window.offsets) + 3)) for window in windows]  # padded
    spans = [
        (starts[i] + ends[j], CONTEXT[window.offsets[i, 0] : window.offsets[j, 1]])
        for window, (starts, ends) in zip(windows, logits, strict=True)
        for i in range(len(window.offsets))
        for j in range(i, min(i + 5, len(window.offsets)))
        if window.offsets[i, 1] > 0 and window.offsets[j, 1] > 0
    ]
    (answers,) = squad.best_answers([question], windows, *zip(*logits, strict=True), n_best=20, max_answer_length=5)
    assert answers[0].text == max(spans)[1]
    assert CONTEXT[answers[0].start :].startswith(answers[0].text)
    assert len(answers) == 20
    assert sum(answer.probability for answer in answers) == pytest.approx(1)
    assert [answer.probability for answer in answers] == sorted((a.probability for a in answers), reverse=True)


def test_a_context_without_words_has_an_empty_answer(tokenizer):
    question = Question("1", "who?", " ", ())
    windows = squad.make_windows([question], tokenizer)
    logits = [np.zeros(len(window.offsets)) for window in windows]
    assert squad.best_answers([question], windows, logits, logits)[0][0].text == ""


@pytest.mark.parametrize("content, message", [
    ("no", "in the format of SQuAD"),
    ("{}", "in the format of SQuAD"),
    ('{"data": []}', "holds no questions"),
    (json.dumps({"data": [{"paragraphs": [{"context": "a", "qas": [{"id": 1, "question": "b", "answers": []}]}]}]}),
     "question 1 has no answer; SQuAD 1.1"),
])  # fmt: skip
def test_foreign_files_are_refused(tmp_path, content, message):
    (tmp_path / "dev.json").write_text(content)
    with pytest.raises(InputError, match=message):
        squad.read_questions(str(tmp_path / "dev.json"), "--predict_file")
