"""Takes some of a teacher's layers as the first weights of its student.

    python scripts/extract_for_distil.py --bert_model bert-base-uncased \\
        --dump_checkpoint serialization_dir/init.pth --vocab_transform

writes init.pth, for train.py --from_pretrained_weights, and beside it init.json, the student's shape, for
--from_pretrained_config where that is not half the teacher's depth. With --save_model FOLDER the student is also
saved untrained, so that its scores later show what the training was worth.

Of twelve layers, it takes 0 2 4 7 9 11; of any other number, half of them, evenly spread. With --choose_layers and a
binarized text, it tries several choices on the text, without training, and takes the best:

    python scripts/extract_for_distil.py --bert_model bert-base-uncased --vocab_transform --choose_layers \\
        --data_file data/binarized_text.bert-base-uncased.pickle

With --dim, the student is narrower too, for instance half as wide: of the channels, heads, and neurons of the layers,
those stay that matter most on the text:

    python scripts/extract_for_distil.py --bert_model bert-base-uncased --vocab_transform --dim 384 \\
        --data_file data/binarized_text.bert-base-uncased.pickle

DistilBERT has no token types. BERT's type 0, which is added at every position, is folded into the table of positions,
so nothing is lost.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.files import open_corpus
from corpus.tokenization import load_tokenizer
from evaluation import held_out
from evaluation.layer_choice import Trial, n_trials, one_by_one, usual_lists
from files.atomic import atomic_folder, atomic_write, write_json
from files.paths import check_new_folder, check_output_file
from models.families import FAMILIES, family_of, max_length
from models.language_model import LanguageModel
from models.loading import LIMITS, load_with_or_without_head, save_model
from models.narrowing import narrow_config, narrowed
from models.sentence_encoder import Pooling, pooling_of
from models.student import build_student, extract, half_depth_config, student_with, usual_layers
from training.batches import MicroBatches
from training.distributed import add_precision_flags, choose_dtype, single_process
from utils import InputError, integer, logger, path


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add(
        "--model_name",
        "--bert_model",
        type=path,
        default="bert-base-uncased",
        help="the teacher: hub name or folder (%(default)s)",
    )
    add("--model_type", choices=FAMILIES, help="family of the teacher; only checked")
    add("--dump_checkpoint", type=path, default="serialization_dir/init.pth", help="file to write (%(default)s)")
    add("--vocab_transform", action="store_true", help="take the layer before the vocabulary projection too (advised)")
    add("--layers", type=integer(0, 1000), nargs="+", help="layers to take, counted from 0, lowest first")
    add("--save_model", type=path, help="new folder for the untrained student as a whole model, for from_pretrained")
    add("--tokenizer_name", type=path, help="tokenizer for --save_model and --data_file (default: the teacher's)")
    add("--student_type", choices=FAMILIES, help="its family (default: the teacher's, but distilbert for a bert)")

    group = parser.add_argument_group("choice of layers and width")
    group.add_argument(
        "--choose_layers",
        action="store_true",
        help="try lists of layers on --data_file, print a table, and take the best",
    )
    group.add_argument(
        "--dim",
        type=integer(*LIMITS["hidden_size"]),
        help="width of the student: keep what matters most on --data_file (default: the teacher's, with all there is)",
    )
    group.add_argument("--data_file", type=path, nargs="+", help="binarized text (scripts/binarized_data.py)")
    group.add_argument(
        "--n_layers", type=integer(1, 1000), help="number of layers of the student (default: half the teacher's)"
    )
    group.add_argument(
        "--n_sequences",
        type=integer(1),
        default=100,
        help="number of sequences to read for it, evenly spread; more are slower and more reliable (%(default)s)",
    )
    add_precision_flags(group)
    group.add_argument("--n_gpu", type=integer(0, 1 << 20), help="0 for the CPU (default: what there is)")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    if args.n_layers and not args.choose_layers:
        raise InputError("--n_layers is for --choose_layers; without it give --layers, or nothing.")
    if args.choose_layers and args.layers:
        raise InputError("--layers says which layers, --choose_layers asks which: give one of them.")
    if reads_text(args) and not args.data_file:
        asked = "--choose_layers" if args.choose_layers else "--dim"
        raise InputError(f"{asked} needs text to find out what matters: give it with --data_file.")
    if args.data_file and not reads_text(args):
        raise InputError("--data_file is for --choose_layers and --dim: give one, or leave it out.")
    if args.tokenizer_name and not (reads_text(args) or args.save_model):
        raise InputError("--tokenizer_name is for --data_file and --save_model: give one, or leave it out.")


def reads_text(args: argparse.Namespace) -> bool:
    return bool(args.choose_layers or args.dim)


def sequences_of(args: argparse.Namespace, config: PretrainedConfig, tokenizer, masked: bool) -> MicroBatches:
    """Some sequences of the text, evenly spread."""
    text = open_corpus(args.data_file, tokenizer)
    text.verify()
    sequences = np.unique(np.linspace(0, len(text) - 1, args.n_sequences).astype(int))
    return held_out.held_out_batches(text, tokenizer, max_length(config), masked, sequences)


def choose_layers(
    args: argparse.Namespace, teacher: PreTrainedModel, text: MicroBatches, pooling: Pooling | None
) -> list[int]:
    """Prints a table of the lists tried, best first, and returns the best.

    Args:
        text: with words to predict, if the teacher predicts words.
        pooling: of a teacher that predicts none.
    """
    depth, n = teacher.config.num_hidden_layers, args.n_layers or len(usual_layers(teacher.config))
    world, n_sequences = single_process(args.n_gpu), len(text.batches.dataset)
    teacher = teacher.eval().requires_grad_(False).to(world.device)
    lists = usual_lists(depth, n, getattr(teacher.config, "layer_types", None))
    total = n_trials(depth, n) + len(lists) + 1
    with utils.progress_bar(True, True, desc="lists of layers", total=total) as bar:
        trial = Trial(teacher, args.student_type, text, pooling, world, choose_dtype(args, world.device), bar.update)
        lists = {"taken away one by one": one_by_one(depth, n, trial.score)} | lists
        rows = {name: trial.metrics(layers) for name, layers in lists.items()}
    teacher.to("cpu")
    best_first = sorted(rows, key=lambda name: rows[name][trial.measure])
    columns = {"vectors": "hidden_pooled", "hidden states": "hidden_cos"}
    said = f"1 - cosine to the teacher's, of vectors and of hidden states, on {n_sequences} sequences"
    if not pooling:
        columns = {"KL": "kl", "loss": held_out.LOSS[family_of(teacher.config).causal], "as teacher": "agreement"}
        said = f"KL to the teacher and loss in nats a word, on {n_sequences} sequences; the teacher's loss: "
        said += f"{rows[best_first[0]]['teacher_loss']:.3f}"
    cells = []
    for name in best_first:
        values = [f"{rows[name][key]:.3f}" for key in columns.values()]
        if not pooling:
            values[-1] = f"{100 * rows[name]['agreement']:.1f} %"
        cells.append([name, " ".join(map(str, lists[name])), *values])
    print(f"\n{utils.markdown_table(['choice', 'layers', *columns], cells)}\n\n{said}")
    return lists[best_first[0]]


def narrow(
    args: argparse.Namespace, config: PretrainedConfig, state: dict[str, torch.Tensor], text: MicroBatches
) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """The shape and weights of a student, made narrower."""
    device = single_process(args.n_gpu).device
    student = student_with(config, state, "the student").to(device)
    shape, weights = narrowed(student, args.dim, (batch.to(device) for batch in text))
    logger.info(
        "%d of %d channels stay, and in each layer %d of %d heads and as large a share of the neurons",
        shape.hidden_size, config.hidden_size, shape.num_attention_heads, config.num_attention_heads,
    )  # fmt: skip
    return shape, {name: weights[name] for name in state}  # not those that the student has at random


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    check_flags(args)
    target = Path(args.dump_checkpoint)
    check_output_file(target, "--dump_checkpoint")
    shape = target.with_suffix(".json")
    check_output_file(shape, "--dump_checkpoint, the student's shape beside it:")
    if shape == target:
        raise InputError(f"--dump_checkpoint {target}: that is the name of the shape beside the weights; give a .pth.")
    if shape.name == "config.json" and shape.exists():
        raise InputError(
            f"--dump_checkpoint {target}: the student's shape would replace {shape}, a model's configuration; give "
            f"another name."
        )
    if args.save_model:
        check_new_folder(args.save_model, "--save_model")
    needs_tokenizer = args.save_model or args.data_file
    tokenizer = load_tokenizer(args.tokenizer_name or args.model_name) if needs_tokenizer else None
    teacher, without_head = load_with_or_without_head(args.model_name, "teacher")
    if args.model_type and teacher.config.model_type != args.model_type:
        raise InputError(f"--model_type {args.model_type}: {args.model_name} is a {teacher.config.model_type}.")
    if args.n_layers and args.n_layers >= teacher.config.num_hidden_layers:
        raise InputError(
            f"--n_layers {args.n_layers}: the teacher has {teacher.config.num_hidden_layers}; choose fewer."
        )
    if args.dim:
        narrow_config(half_depth_config(teacher.config, args.student_type), args.dim)  # raises what there is to say
    text = None
    if args.data_file:
        text = sequences_of(args, teacher.config, tokenizer, not (without_head or family_of(teacher.config).causal))
    if args.choose_layers:
        pooling = pooling_of(args.model_name) or Pooling() if without_head else None
        layers = choose_layers(args, teacher, text, pooling)
    else:
        layers = args.layers or usual_layers(teacher.config)
    config, state = extract(teacher, layers, args.vocab_transform, args.student_type)
    if args.dim:
        config, state = narrow(args, config, state, text)
    if without_head:
        logger.info("%s has no language-model head: the encoder alone is taken", args.model_name)
        state = {name: value for name, value in state.items() if name.startswith(f"{family_of(config).encoder}.")}
    depth = teacher.config.num_hidden_layers
    logger.info("layers %s of %d become the student's %d", " ".join(map(str, layers)), depth, len(layers))
    if teacher.config.model_type == "bert" and config.model_type == "distilbert":
        if teacher.config.layer_norm_eps != 1e-12:
            logger.warning("the teacher's layer norms add %g, a DistilBERT's 1e-12", teacher.config.layer_norm_eps)
        logger.info("token type 0 is folded into the positions; the other token types and the pooler are left out")
        if not (args.vocab_transform or without_head):
            logger.info("without --vocab_transform the layer before the vocabulary projection starts at random")
    with atomic_write(target) as file:
        torch.save(state, file)
    student = build_student(config, str(target))  # reads it back and checks that every tensor fits
    student = LanguageModel(student).encoder if without_head else student
    write_json(shape, {**config.to_diff_dict(), "model_type": config.model_type})
    logger.info(
        "%s: %.1f M parameters; train.py --from_pretrained_weights %s --from_pretrained_config %s",
        target, student.num_parameters() / 1e6, target, shape,
    )  # fmt: skip
    if args.save_model:
        with atomic_folder(Path(args.save_model)) as folder:
            save_model(student, tokenizer, folder)
        logger.info("%s: the same for from_pretrained", args.save_model)


if __name__ == "__main__":
    raise SystemExit(main())
