"""Fine-tunes a model on SQuAD 1.1, with or without a fine-tuned teacher, and scores it.

Plain, as a teacher is made:

    python scripts/run_squad_w_distillation.py --model_name_or_path bert-base-uncased --output_dir serialization_dir/squad_teacher \\
        --train_file squad/train-v1.1.json --predict_file squad/dev-v1.1.json

With that teacher: a second step of distillation, which gave DistilBERT one more point of F1 (Sanh et al., 2019):

    python scripts/run_squad_w_distillation.py --model_name_or_path serialization_dir/my_first_training \\
        --teacher_type bert --teacher_name_or_path serialization_dir/squad_teacher --output_dir serialization_dir/squad_student \\
        --train_file squad/train-v1.1.json --predict_file squad/dev-v1.1.json

--output_dir then holds the model for AutoModelForQuestionAnswering, its answers in predictions.json and
nbest_predictions.json, and exact match and F1 in results.json. Without --train_file the model is only scored.
"""  # noqa: E501

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering, Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.tokenization import load_tokenizer
from evaluation import scores, squad
from evaluation.fine_tuning import FineTuner, Settings, add_optimizer_flags, load_for, taken_by
from evaluation.task_card import CARD, Data, make_task_card
from evaluation.task_distillation import Distillation, add_layer_flags, check_shared_vocabulary, follow_layers
from files.atomic import atomic_write, replacing_files, write_json
from files.paths import check_output_folder
from models.families import FAMILIES, max_length
from models.loading import save_model
from training import losses
from training.distributed import add_precision_flags, choose_dtype, single_process
from utils import InputError, integer, logger, path, real

SQUAD = Data("SQuAD", "rajpurkar/squad", split="validation")
RESULTS, PREDICTIONS, N_BEST_PREDICTIONS = "results.json", "predictions.json", "nbest_predictions.json"


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    size, families = integer(1, 1 << 20), sorted(FAMILIES)
    add = parser.add_argument_group("model and files").add_argument
    add("--model_name_or_path", type=path, required=True, help="hub name or folder of the model to fine-tune")
    add("--model_type", choices=families, help="family of the model; only checked")
    add("--tokenizer_name", type=path, help="tokenizer (default: the model's)")
    add("--train_file", type=path, help="questions to train on, in SQuAD's format")
    add("--predict_file", type=path, help="questions to answer and score")
    add("--output_dir", type=path, required=True, help="folder for the model and its answers")
    add("--overwrite_output_dir", action="store_true", help="write to --output_dir even if it is not empty")
    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add("--teacher_name_or_path", type=path, help="model fine-tuned on SQuAD to learn from")
    add("--teacher_type", choices=families, help="family of the teacher; only checked")
    add("--alpha_ce", type=real(0, 1e6), default=0.5, help="weight of the teacher's spans (%(default)s)")
    add("--alpha_squad", type=real(0, 1e6), default=0.5, help="weight of the right spans (%(default)s)")
    add("--temperature", type=real(0.01, 1000), default=2.0, help="temperature of both softmaxes (%(default)s)")
    add_layer_flags(group, 0)
    add = parser.add_argument_group("windows and answers").add_argument
    window = integer(16, 1 << 20)
    add("--max_seq_length", type=window, default=squad.MAX_SEQ_LENGTH, help="tokens per window (%(default)s)")
    add("--doc_stride", type=size, default=squad.DOC_STRIDE, help="tokens from window to window (%(default)s)")
    add("--max_query_length", type=size, default=squad.MAX_QUERY_LENGTH, help="tokens per question (%(default)s)")
    add("--n_best_size", type=integer(1, 1000), default=squad.N_BEST, help="answers to keep (%(default)s)")
    add("--max_answer_length", type=size, default=squad.MAX_ANSWER_LENGTH, help="tokens per answer (%(default)s)")
    group = parser.add_argument_group("fine-tuning")
    add = group.add_argument
    add("--num_train_epochs", type=integer(1, 1000), default=Settings.n_epoch, help="epochs (%(default)s)")
    add("--per_gpu_train_batch_size", "--batch_size", type=size, default=12, help="windows per batch (%(default)s)")
    add_optimizer_flags(group)
    add("--seed", type=integer(0, 2**31 - 1), default=42, help="random seed (%(default)s)")
    add_precision_flags(parser)
    parser.add_argument("--n_gpu", type=integer(0, 1), help="0 for the CPU (default: what there is)")
    return parser


class DistillationTrainer(Trainer):
    """alpha_ce x T^2 x KL(teacher || student) + alpha_squad x cross-entropy, each the mean of first and last token.

    Args:
        teacher: frozen, on the student's device.
        recipe: has `alpha_ce`, `alpha_squad` and `temperature`.
    """

    def __init__(self, *args, teacher: torch.nn.Module, recipe: argparse.Namespace, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.recipe = teacher, recipe

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        recipe = self.recipe
        right = [inputs["start_positions"], inputs["end_positions"]]  # (bs,)
        texts = {name: value for name, value in inputs.items() if not name.endswith("_positions")}
        output = model(**taken_by(self.model, texts))
        with torch.no_grad(), self.accelerator.autocast():  # the student's `forward` has it around itself
            t_output = self.teacher(**taken_by(self.teacher, texts))
        padded = ~inputs["attention_mask"].bool()  # (bs, seq_length); no answer is there
        loss = torch.zeros((), device=padded.device)
        for name, positions in zip(("start_logits", "end_logits"), right, strict=True):
            s, t = (given[name].float().masked_fill(padded, -1e4) for given in (output, t_output))  # (bs, seq_length)
            kl = losses.ce_loss(s, t, recipe.temperature).mean()
            loss = loss + recipe.alpha_ce * kl + recipe.alpha_squad * functional.cross_entropy(s, positions)
        return (loss / 2, output) if return_outputs else loss / 2


# ---------------------------------------------------------------------------------------------------------------- parts


def check_flags(args: argparse.Namespace, tokenizer) -> None:
    utils.check_needed(
        args, make_parser(), "teacher_name_or_path", "teacher_type", "alpha_ce", "alpha_squad", "temperature",
        "layer_epochs", "layer_rate", "alpha_relation",
    )  # fmt: skip
    if not args.train_file and not args.predict_file:
        raise InputError("give --train_file to train, --predict_file to score, or both.")
    check_output_folder(args.output_dir, "--output_dir")
    folder = Path(args.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite_output_dir:
        raise InputError(f"--output_dir {folder} is not empty: add --overwrite_output_dir, or give another folder.")
    room = args.max_seq_length - args.max_query_length - tokenizer.num_special_tokens_to_add(pair=True)
    if room < args.doc_stride:
        raise InputError(
            f"--max_seq_length {args.max_seq_length} leaves {max(room, 0)} tokens for the text beside a question of "
            f"--max_query_length {args.max_query_length}, but the windows begin --doc_stride {args.doc_stride} apart."
        )
    if args.teacher_name_or_path:
        if not args.train_file:
            raise InputError("--teacher_name_or_path needs --train_file, since it only helps to train.")
        if not args.alpha_ce + args.alpha_squad:
            raise InputError("--alpha_ce and --alpha_squad are both 0: there is nothing to learn from.")
        teacher = args.teacher_name_or_path
        check_shared_vocabulary(teacher, load_tokenizer(teacher), args.model_name_or_path, tokenizer)


def load(name: str, tokenizer, flag: str, family: str | None, max_seq_length: int, **options):
    """A model with a head for spans, of the family that was named."""
    model = load_for(AutoModelForQuestionAnswering, name, tokenizer, **options)
    if family and model.config.model_type != family:
        raise InputError(f"{flag} {family}: {name} is a {model.config.model_type}.")
    if max_seq_length > (limit := max_length(model.config)):
        raise InputError(f"--max_seq_length {max_seq_length}: {name} takes {limit} tokens.")
    return model


def windows_of(args: argparse.Namespace, file: str, questions: list[squad.Question], tokenizer) -> list[squad.Window]:
    windows = squad.make_windows(questions, tokenizer, args.max_seq_length, args.doc_stride, args.max_query_length)
    logger.info("%s: %s questions, %s windows", file, f"{len(questions):,}", f"{len(windows):,}")
    return windows


def train(args: argparse.Namespace, questions: list[squad.Question], tuner: FineTuner, tokenizer, device) -> None:
    models, more = [tuner.model], {}
    if args.teacher_name_or_path:
        teacher = load(
            args.teacher_name_or_path, tokenizer, "--teacher_type", args.teacher_type, args.max_seq_length,
            head_required=True,
        )  # fmt: skip
        teacher.to(device).eval().requires_grad_(False)
        models.append(teacher)
        more = {"trainer_class": DistillationTrainer, "teacher": teacher, "recipe": args}
    features = []
    for window in windows_of(args, args.train_file, questions, tokenizer):
        start, end = squad.label(window, questions[window.question])
        taken = {name: ids for model in models for name, ids in taken_by(model, window.features).items()}
        features.append({**taken, "start_positions": start, "end_positions": end})
    if args.layer_epochs:
        texts = [{name: ids for name, ids in each.items() if not name.endswith("_positions")} for each in features]
        title = f"{Path(args.model_name_or_path).name}, SQuAD, layers"
        how = Distillation(args.layer_epochs, args.layer_rate, args.alpha_relation)
        follow_layers(tuner, teacher, texts, title, how)
    tuner.train(features, f"{Path(args.model_name_or_path).name}, SQuAD", **more)


def predict(
    args: argparse.Namespace, questions: list[squad.Question], tuner: FineTuner, tokenizer
) -> tuple[dict[str, float], list[list[squad.Answer]]]:
    """Metrics, and the best answers to each question."""
    windows = windows_of(args, args.predict_file, questions, tokenizer)
    starts, ends = tuner.predict([taken_by(tuner.model, window.features) for window in windows])[:2]
    answers = squad.best_answers(questions, windows, list(starts), list(ends), args.n_best_size, args.max_answer_length)
    texts = {question.id: best[0].text for question, best in zip(questions, answers, strict=True)}
    return squad.metrics(questions, texts), answers


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    tokenizer = load_tokenizer(args.tokenizer_name or args.model_name_or_path)
    check_flags(args, tokenizer)
    to_train = []
    if args.train_file:
        to_train = squad.learnable(squad.read_questions(args.train_file, "--train_file"), args.train_file)
    to_answer = squad.read_questions(args.predict_file, "--predict_file") if args.predict_file else []
    device = single_process(args.n_gpu).device
    dtype = choose_dtype(args, device)
    utils.set_seed(args.seed)  # the head is drawn from this
    model = load(
        args.model_name_or_path, tokenizer, "--model_type", args.model_type, args.max_seq_length, dropout=args.dropout,
        head_required=not to_train,
    )  # fmt: skip
    settings = Settings(
        args.num_train_epochs, args.learning_rate, args.per_gpu_train_batch_size, args.warmup_prop, args.weight_decay,
        args.dropout,
    )  # fmt: skip
    tuner = FineTuner(model, tokenizer, settings, args.seed, dtype, use_cpu=device.type == "cpu")
    folder = Path(args.output_dir)
    if to_train:
        train(args, to_train, tuner, tokenizer, device)
        with replacing_files(folder) as temporary:
            save_model(model, tokenizer, temporary)
    if to_answer:
        metrics, answers = predict(args, to_answer, tuner, tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        best = {q.id: a[0].text for q, a in zip(to_answer, answers, strict=True)}
        n_best = {q.id: [answer._asdict() for answer in a] for q, a in zip(to_answer, answers, strict=True)}
        write_json(folder / PREDICTIONS, best)
        write_json(folder / N_BEST_PREDICTIONS, n_best)
        seconds = round(time.monotonic() - start, 1)
        results = {**metrics, "questions": len(to_answer), "seconds": seconds, "versions": scores.versions()}
        write_json(folder / RESULTS, results | {"flags": vars(args)})
        if to_train:
            origin, name = args.model_name_or_path, folder.resolve().name
            card = make_task_card(name, model, origin, args.teacher_name_or_path, SQUAD, metrics, args.command)
            with atomic_write(folder / CARD, "w") as file:
                file.write(str(card))
        print(json.dumps(metrics))
    logger.info("done in %.0f s: %s", time.monotonic() - start, folder)


if __name__ == "__main__":
    raise SystemExit(main())
