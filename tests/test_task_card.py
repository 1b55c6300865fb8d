"""The card of a fine-tuned model has its scores, and what the card of the student says of languages and license."""

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from evaluation.glue import TASKS
from evaluation.task_card import Data, make_task_card

STUDENT_CARD = """---
language: en
license: mit
base_model: bert-base-uncased
datasets: [wikimedia/wikipedia]
---
"""


@pytest.fixture(scope="module")
def classifier(student):
    return AutoModelForSequenceClassification.from_pretrained(student)


def test_it_says_what_the_hub_asks_for(tmp_path, classifier):
    (tmp_path / "README.md").write_text(STUDENT_CARD)
    metrics = {"pearson": 81.234, "spearman": 80.0}
    card = make_task_card(
        "mine", classifier, str(tmp_path), "some/teacher", Data.of(TASKS["STS-B"]), metrics, "python x"
    )
    data = ModelCard(str(card)).data  # as the hub reads it
    assert (data.language, data.license, data.base_model) == ("en", "mit", "bert-base-uncased")
    assert data.datasets == ["wikimedia/wikipedia", "nyu-mll/glue"]
    assert data.pipeline_tag == "text-classification"
    (pearson, spearman) = data.eval_results
    assert (pearson.metric_type, pearson.metric_value, pearson.dataset_config) == ("pearson", 81.23, "stsb")
    assert (spearman.metric_type, spearman.metric_value, spearman.dataset_split) == ("spearmanr", 80.0, "validation")
    assert "fine-tuned on STS-B, with the help of `teacher`" in card.text
    assert "81.23" in card.text and "python x" in card.text


def test_a_hub_name_is_the_base_model(student):
    model = AutoModelForQuestionAnswering.from_pretrained(student)
    card = make_task_card("mine", model, "some/student", None, Data("my task"), {"f1": 50.0}, "python x")
    assert (card.data.base_model, card.data.pipeline_tag) == ("some/student", "question-answering")
    assert card.data.eval_results[0].dataset_type == "my task"


def test_a_card_that_can_not_be_read_is_told(tmp_path, classifier, caplog, monkeypatch):
    monkeypatch.setattr("utils.logger.propagate", True)
    for text in ("---\nlanguage: [en\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(text)
        card = make_task_card("mine", classifier, str(tmp_path), None, Data("my task"), {"accuracy": 50.0}, "python x")
        assert card.data.license is None
        assert f"{tmp_path / 'README.md'} is left aside" in caplog.text
        caplog.clear()
