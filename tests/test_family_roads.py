"""For each family the whole road: text, numbers, counts, a teacher's layers, training, and what comes out loads."""

import copy
import math

import binarized_data
import extract_for_distil
import pytest
import token_counts
import torch
from small_models import SMALL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from workspace import flags_of, load_tokenizer, rows_of, run, weights_of

import train
from models.families import family_of
from models.loading import auto_class

TEACHERS = [name for name in SMALL if name != "distilbert"]


@pytest.fixture(scope="module")
def gpt2_tokenizer(workspace):
    """Pieces of bytes, one special token, and nothing to pad with, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train([str(workspace / "dump.txt")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, model_max_length=64)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_whole_road(name, workspace, gpt2_tokenizer, tmp_path):
    causal = family_of(SMALL[name]).causal
    tokenizer = gpt2_tokenizer if causal else load_tokenizer(workspace / "bert-base-uncased")
    config = copy.deepcopy(SMALL[name])
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 66
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    auto_class(config).from_config(config).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    text = tmp_path / "text.teacher.pickle"
    run(
        binarized_data,
        "--file_path",
        workspace / "dump.txt",
        "--bert_tokenizer",
        teacher,
        "--dump_file",
        tmp_path / "text",
    )
    run(token_counts, "--data_file", text, "--token_counts_dump", tmp_path / "counts.pickle")
    run(extract_for_distil, "--model_type", name, "--model_name", teacher, "--vocab_transform", "--dump_checkpoint",
        tmp_path / "init.pth")  # fmt: skip
    flags = flags_of(workspace, data_file=text, token_counts=tmp_path / "counts.pickle", teacher_name=teacher,
                     from_pretrained_weights=tmp_path / "init.pth", from_pretrained_config=tmp_path / "init.json",
                     n_epoch=1, batch_size=8, gradient_accumulation_steps=1, learning_rate=3e-3, alpha_relation=0.5,
                     dropout=0, attention_dropout=0, dump_path=tmp_path / "run")  # fmt: skip
    assert train.main([*flags, "--teacher_type", name]) == 0

    first, *_, last = (row for row in rows_of(tmp_path / "run") if row["kind"] == "valid")
    loss = "clm_loss" if causal else "mlm_loss"
    assert last[loss] < first[loss] - 0.3
    assert all(row["loss_relation"] > 0 for row in rows_of(tmp_path / "run") if row["kind"] == "train")
    assert math.isfinite(last["kl"])
    student = auto_class(config).from_pretrained(tmp_path / "run", dtype=torch.float32).eval()
    assert student.config.num_hidden_layers == 2
    assert not any(module.p for module in student.modules() if isinstance(module, torch.nn.Dropout))
    written = weights_of(tmp_path / "run")
    assert all(torch.equal(value, written[key]) for key, value in student.state_dict().items())
    ids = AutoTokenizer.from_pretrained(tmp_path / "run")("the cat sees the garden", return_tensors="pt").input_ids
    assert torch.isfinite(student(ids).logits).all()
