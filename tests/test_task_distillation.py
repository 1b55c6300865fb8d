"""The second step of distillation: its two losses are those of the definition, and they bring the student closer."""

import pytest
import torch
from test_relation_loss import formula as relations_formula
from transformers import AutoModelForSequenceClassification, DistilBertConfig, TrainingArguments
from workspace import load_tokenizer

from evaluation.fine_tuning import FineTuner, Settings, encode, load_for
from evaluation.task_distillation import Distillation, LayerTrainer, TaughtTrainer, follow_layers
from models.language_model import LayerVectors
from training.losses import Widening
from utils import InputError

TEXTS = [("the cat sees the garden",), ("a dog",), ("my neighbour carries the long road",)] * 8


def classifier(name, **options):
    return load_for(AutoModelForSequenceClassification, str(name), **options).eval()


@pytest.mark.parametrize("n_labels", [3, 1])
def test_the_loss_of_a_taught_model_is_that_of_the_definition(tmp_path, student, n_labels):
    model = load_for(AutoModelForSequenceClassification, str(student), num_labels=n_labels).eval()
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer = TaughtTrainer(model, arguments, alpha=0.7, temperature=3.0)
    ids, t_logits = torch.randint(8, 90, (4, 7)), torch.randn(4, n_labels)
    labels = torch.tensor([0, 2, 1, 1]) if n_labels == 3 else torch.rand(4)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": labels, "t_logits": t_logits})
    s_logits = model(ids).logits.double()
    if n_labels == 3:
        log_s, log_t = ((logits.double() / 3).log_softmax(1) for logits in (s_logits, t_logits))
        following = 9 * (log_t.exp() * (log_t - log_s)).sum(1).mean()
        of_task = -s_logits.log_softmax(1)[range(4), labels].mean()
    else:
        following, of_task = ((s_logits - target).square().mean() for target in (t_logits, labels[:, None]))
    assert loss.item() == pytest.approx((0.3 * of_task + 0.7 * following).item(), rel=1e-4)


def narrow_student(tokenizer):
    shape = {"n_layers": 2, "n_heads": 2, "dim": 16, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)
    return AutoModelForSequenceClassification.from_config(config).eval()


def distance(student, teacher, tokenizer, layers, widen=lambda states: states):
    """By the definition, in float64."""
    batch = tokenizer([text for (text,) in TEXTS], return_tensors="pt", padding=True)
    ids, attended = batch.input_ids, batch.attention_mask
    with torch.no_grad():
        s, t = (m(ids, attention_mask=attended, output_hidden_states=True).hidden_states for m in (student, teacher))
        pairs = [(widen(s[0]), t[0]), *((widen(s[i + 1]), t[layer + 1]) for i, layer in enumerate(layers))]
    parts = [(a.double() - b.double())[attended.bool()].square().mean() for a, b in pairs]
    return sum(parts).item()


def test_the_loss_of_layers_is_that_of_the_definition(tmp_path, workspace):
    tokenizer, teacher = load_tokenizer(workspace / "bert-base-uncased"), classifier(workspace / "bert-base-uncased")
    student = narrow_student(tokenizer)
    student.widening = Widening(16, 32)
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer = LayerTrainer(student, arguments, teacher=teacher, layers=[1, 2], watched=[], alpha_relation=0.0)
    inputs = tokenizer([text for (text,) in TEXTS], return_tensors="pt", padding=True)
    loss = trainer.compute_loss(student, dict(inputs))
    assert loss.item() == pytest.approx(distance(student, teacher, tokenizer, [1, 2], student.widening), rel=1e-5)
    loss.backward()
    assert student.widening.linear.weight.grad.abs().sum() > 0 and teacher.classifier.weight.grad is None


@pytest.mark.parametrize("narrow", [False, True])
def test_a_student_comes_closer_to_its_teachers_layers(workspace, student, narrow):
    tokenizer, teacher = load_tokenizer(student), classifier(workspace / "bert-base-uncased").requires_grad_(False)
    model = narrow_student(tokenizer) if narrow else classifier(student, dropout=0.0)
    own = sorted(model.state_dict())
    tuner = FineTuner(model, tokenizer, Settings(batch_size=8), 0, torch.float32, use_cpu=True)
    t, s = (encode(tokenizer, m, TEXTS, 64) for m in (teacher, model))
    before = None if narrow else distance(model, teacher, tokenizer, [0, 3])
    follow_layers(tuner, teacher, [{**a, **b} for a, b in zip(t, s, strict=True)], "", Distillation(10, 3e-3))
    assert narrow or distance(model, teacher, tokenizer, [0, 3]) < 0.7 * before
    assert sorted(model.state_dict()) == own  # what widened it is gone


def test_layers_that_the_teacher_does_not_have_are_named(workspace, student):
    tokenizer, teacher = load_tokenizer(student), classifier(workspace / "bert-base-uncased")
    model = classifier(student)
    model.config.teacher_layers = [0, 7]
    tuner = FineTuner(model, tokenizer, Settings(), 0, torch.float32, use_cpu=True)
    with pytest.raises(InputError, match=r"\[0, 7\], as the student's configuration has it"):
        follow_layers(tuner, teacher, [], "", Distillation(1, 1e-4))


def test_relations_are_compared_in_every_layer(tmp_path, workspace):
    tokenizer, teacher = load_tokenizer(workspace / "bert-base-uncased"), classifier(workspace / "bert-base-uncased")
    student, layers = narrow_student(tokenizer), [1, 2]
    student.widening = Widening(16, 32)
    watched = [(LayerVectors(student, i), LayerVectors(teacher, layer)) for i, layer in enumerate(layers)]
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    trainer = LayerTrainer(student, arguments, teacher=teacher, layers=layers, watched=watched, alpha_relation=3.0)
    assert trainer.heads == 2
    inputs = dict(tokenizer([text for (text,) in TEXTS], return_tensors="pt", padding=True))
    loss = trainer.compute_loss(student, inputs)
    expected = distance(student, teacher, tokenizer, layers, student.widening)
    lengths = inputs["attention_mask"].sum(1)
    states = student.distilbert(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True).hidden_states
    t_states = teacher.bert(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True).hidden_states
    for i, layer in enumerate(layers):
        s_attention = student.distilbert.transformer.layer[i].attention
        t_attention = teacher.bert.encoder.layer[layer].attention.self
        s = [getattr(s_attention, kind)(states[i]) for kind in ("q_lin", "k_lin", "v_lin")]
        t = [getattr(t_attention, kind)(t_states[layer]) for kind in ("query", "key", "value")]
        expected += 3.0 * relations_formula(s, t, 2, False, lengths).item() / int(lengths.sum())
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert student.distilbert.transformer.layer[0].attention.v_lin.weight.grad.abs().sum() > 0
