"""The matrix work of BERT-base and DistilBERT, counted by hand, and the table of devices."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from models.flops import MatrixWork, TrainingWork, peak_flops_of
from models.language_model import LanguageModel
from models.student import build_student, half_depth_config
from training.batches import StepCounts


def test_bert_base_and_its_student_take_what_arithmetic_says():
    with torch.device("meta"):
        teacher = LanguageModel(BertForMaskedLM(BertConfig()))
        student = LanguageModel(build_student(half_depth_config(BertConfig()), None))
    layer = 2 * (4 * 768 * 768 + 2 * 768 * 3072)
    head = 2 * (768 * 768 + 768 * 30522)
    attention = 4 * 128 * 768
    per_token = lambda model: MatrixWork(model).forward(10 * 128, 10 * 128, 10 * 128**2) / (10 * 128)
    assert per_token(teacher) == 12 * (layer + attention) + head  # 223 MFLOP
    assert per_token(student) == 6 * (layer + attention) + head  # 135 MFLOP
    assert MatrixWork(teacher, needs_head=False).forward(1, 1, 0) == 12 * layer


def test_a_step_takes_the_students_pass_three_times_the_teachers_once_and_the_relations():
    with torch.device("meta"):
        teacher = LanguageModel(BertForMaskedLM(BertConfig()))
        student = LanguageModel(build_student(half_depth_config(BertConfig()), None))
    counts = StepCounts(tokens=1280, rows=1280, labels=192, pairs=10 * 128**2)
    amount = counts.tokens, counts.rows, counts.pairs
    work = TrainingWork(student, teacher, True, True, torch.nn.Identity())
    plain = 3 * MatrixWork(student).forward(*amount) + MatrixWork(teacher).forward(*amount)
    assert work.flops(counts) == plain
    work.add_relations(3 * 768, 3 * 768)
    assert work.flops(counts) == plain + 3 * (2 + 1) * 2 * 768 * counts.pairs
    without_heads = TrainingWork(student, None, False, False, torch.nn.Linear(768, 10))
    assert without_heads.flops(counts) == 3 * (MatrixWork(student, False).forward(*amount) + 2 * 7680 * 1280)


def test_a_causal_model_compares_half_the_pairs():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    work = MatrixWork(LanguageModel(GPT2LMHeadModel(config)))
    assert work.forward(0, 0, 100) == 2 * 8 * 100
    assert work.forward(1, 0, 0) == 2 * 12 * 8 * 8


@pytest.mark.parametrize(
    "name, half",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A10G", None),  # not an A10
        ("Some Other Device", None),
    ],
)
def test_devices_are_told_by_whole_words(name, half):
    assert peak_flops_of(name, torch.bfloat16) == half
