"""Examines binarized text before you spend days of training on it.

    python scripts/corpus_doctor.py --data_file data/binarized_text.bert-base-uncased.pickle \\
        --tokenizer_name bert-base-uncased --teacher_name bert-base-uncased --plot data/corpus.png

It always verifies checksums, and looks at lengths, duplicates, unknown and special tokens, and what
train.py would split and drop. With the tokenizer it shows some of the text, plain and masked; with the teacher, it also
measures the teacher's loss on a sample, which exposes a wrong tokenizer, and says what a run needs of memory and disk.

With --against it looks for sequences that share long runs of words with evaluation sets, such as the dev sets of GLUE
and SQuAD, and lists them for train.py --leave_out:

    python scripts/corpus_doctor.py --data_file data/binarized_text.bert-base-uncased.pickle \\
        --tokenizer_name bert-base-uncased --against glue/*/dev.tsv squad/dev-v1.1.json --overlap_file data/overlap.json

The exit status is 0 if the corpus is fit to train on, 1 if a problem was found, 2 if it can't be read.
"""

import argparse
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.files import TokenCorpus, expand_globs, open_corpus
from corpus.overlap import NGRAM, find_overlaps, write_overlap
from corpus.statistics import CorpusStatistics, survey
from corpus.token_counts import load_token_counts
from corpus.tokenization import describe_tokenizer, load_tokenizer
from files.paths import check_input_file, check_output_file, check_picture
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import MAX_UNKNOWN, MIN_LENGTH, LmSeqsDataset
from training.masking import NO_LABEL, Masking, mask_tokens
from training.recipe import Recipe
from utils import integer, path

N_SAMPLE = 200  # sequences that the teacher reads
WORTH_MENTIONING = 0.01  # share of the sequences
SHARED, OWN = 18, 5  # bytes a sequence: index and sorted order of all processes of a machine; each one's order


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--data_file", type=path, nargs="+", required=True, help="binarized files or globs")
    add("--tokenizer_name", "--bert_tokenizer", type=path, help="hub name or folder (default: the teacher's)")
    add("--teacher_name", "--bert_model", type=path, help="teacher: hub name or folder")
    add("--token_counts", type=path, help="token counts to check against the text (from scripts/token_counts.py)")
    add(
        "--max_length",
        type=integer(MIN_LENGTH, 1 << 20),
        help="longest sequence, in tokens (default: the teacher's, else 512)",
    )
    add("--against", type=path, nargs="+", help="evaluation sets to find (TSV, JSON, JSON lines, text): files or globs")
    add("--ngram", type=integer(2, 1000), default=NGRAM, help="words in a row that count as shared (%(default)s)")
    add("--overlap_file", type=path, help="JSON file to write, which lists the sequences that share words")
    add("--n_examples", type=integer(0), default=3, help="number of sequences to show (%(default)s)")
    add("--seed", type=integer(0, 2**63 - 1), default=0, help="random seed of the sequences to show (%(default)s)")
    add("--plot", type=path, help="PNG, PDF, or SVG file to plot lengths and frequencies to")
    return parser


class Report:
    """What is printed, section by section, and the problems and notes that end it."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def section(self, title: str) -> None:
        print(f"\n{title}\n{'-' * len(title)}")

    def line(self, name: str, value: object, remark: str = "") -> None:
        value = f"{value:,}" if isinstance(value, (int, np.integer)) else value
        print(f"{name:<28} {value}{f'   {remark}' if remark else ''}")

    def close(self) -> int:
        self.section("Findings")
        for kind, findings in (("problem", self.problems), ("note", self.notes)):
            for finding in findings:
                print(f"{kind}: {finding}")
        if not self.problems:
            print("fit to train on")
        return utils.EXIT_FAILED if self.problems else utils.EXIT_OK


def percent(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1):.2f} %"


def size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} GB"


# ------------------------------------------------------------------------------------------------------------- the text


def report_files(report: Report, corpus: TokenCorpus) -> None:
    report.section("Files")
    for file in corpus.files:
        origin = f"tokenizer {file.made_by['tokenizer']}, checksum intact" if file.made_by else "of another tool"
        report.line(file.path.name, size(file.path.stat().st_size), origin)
    if not corpus.on_disk:
        report.notes.append(
            "a pickle of another tool has no checksum, and every process loads it whole: scripts/merge_data.py "
            "turns it into one that is read in place"
        )


def report_sequences(report: Report, statistics: CorpusStatistics) -> None:
    lengths, n = statistics.lengths, len(statistics.lengths)
    n_duplicates = n - statistics.distinct
    report.section("Sequences")
    report.line("sequences", n)
    report.line("tokens", int(statistics.counts.sum()))
    shown = np.percentile(lengths, (0, 5, 50, 95, 100)).astype(int)
    report.line(
        "length", f"{lengths.mean():.1f} on average", "min {}, 5 % {}, median {}, 95 % {}, max {}".format(*shown)
    )
    number, times = statistics.most_repeated
    report.line("duplicates", n_duplicates, f"{percent(n_duplicates, n)}; number {number} occurs {times:,} times")
    print_histogram(lengths)
    if n_duplicates > WORTH_MENTIONING * n:
        report.notes.append(f"{percent(n_duplicates, n)} of the sequences are duplicates")


def report_training(report: Report, training: LmSeqsDataset, n: int, max_length: int) -> None:
    dropped = training.dropped
    report.section("What train.py makes of them")
    report.line("split into even parts", dropped.split, f"longer than {max_length} tokens")
    report.line("dropped", dropped.short, f"shorter than {MIN_LENGTH} tokens")
    report.line("dropped", dropped.unknown, f"{MAX_UNKNOWN:.0%} unknown tokens or more")
    report.line("left to train on", len(training), f"sequences of {training.n_tokens:,} tokens")
    if dropped.short > WORTH_MENTIONING * n:
        report.notes.append(f"{percent(dropped.short, n)} of the sequences are too short and will be dropped")


def print_histogram(lengths: np.ndarray, rows: int = 12, width: int = 60) -> None:
    top = max(rows, int(np.percentile(lengths, 99.5)))
    edges = np.unique(np.append(np.linspace(0, top + 1, rows + 1).astype(int), max(int(lengths.max()), top) + 1))
    counts = np.histogram(lengths, edges)[0]
    print()
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "█" * round(width * count / counts.max())
        print(f"{low:>7} to {high - 1:<7} {count:>12,} {bar}")


def report_tokens(report: Report, statistics: CorpusStatistics, description: dict, tokenizer) -> None:
    report.section("Tokens")
    counts, n_tokens = statistics.counts, int(statistics.counts.sum())
    report.line(
        "vocabulary", description["vocab_size"], f"{(counts > 0).sum():,} entries occur, largest id {len(counts) - 1:,}"
    )
    unknown = float(statistics.unknown @ statistics.lengths)
    report.line("unknown", f"{unknown:,.0f}", percent(unknown, n_tokens))
    report.line("boundaries missing", len(statistics.misplaced), "sequences that do not begin and end as they should")
    if tokenizer:
        frequent = tokenizer.convert_ids_to_tokens(np.argsort(-counts)[:12].tolist())
        report.line("most frequent", " ".join(map(str, frequent)))
    if len(counts) > description["vocab_size"]:
        report.problems.append(f"ids run up to {len(counts) - 1:,}, beyond the vocabulary: made with another tokenizer")
    if len(statistics.misplaced):
        report.problems.append(
            f"{len(statistics.misplaced):,} sequences, the first is number {statistics.misplaced[0]}, lack their "
            f"boundary tokens"
        )
    for name, count in statistics.special_inside.items():
        report.notes.append(f"the special token {name} occurs {count:,} times inside the text")
    if unknown > WORTH_MENTIONING * n_tokens:
        report.notes.append(
            f"{percent(unknown, n_tokens)} of the tokens are unknown: does the vocabulary fit the text?"
        )


def check_counts(report: Report, counts_file: str, statistics: CorpusStatistics, vocab_size: int) -> None:
    counts = load_token_counts(counts_file, vocab_size)
    actual = np.zeros(max(vocab_size, len(statistics.counts)), np.int64)
    actual[: len(statistics.counts)] = statistics.counts
    actual = actual[:vocab_size]
    if uncounted := int(actual[counts == 0].sum()):
        report.notes.append(
            f"{uncounted:,} tokens of this text were counted 0 times in {counts_file}: --mlm_smoothing takes them for "
            f"the rarest and masks them most often; count this text with scripts/token_counts.py"
        )
    elif differing := int((counts != actual).sum()):
        report.notes.append(
            f"{counts_file} is not the count of this text: {differing:,} entries differ (of a larger one?)"
        )


def report_examples(
    report: Report, corpus: TokenCorpus, training: LmSeqsDataset, statistics: CorpusStatistics, tokenizer, args
) -> None:
    report.section("Examples")
    generator = np.random.default_rng(args.seed)
    chosen = generator.choice(len(training), min(args.n_examples, len(training)), replace=False)
    for i in chosen:
        print(f"[{i}] {tokenizer.decode(training[i])}\n")
    number, times = statistics.most_repeated
    if times > 1:
        print(f"[{number}], {times:,} times: {tokenizer.decode(corpus[number])[:300]}\n")
    if tokenizer.mask_token_id is None or not len(chosen):
        return
    counts = np.zeros(len(tokenizer), np.int64)
    counts[: len(statistics.counts)] = statistics.counts[: len(tokenizer)]
    ids = training[chosen[0]]
    masking = Masking.of_recipe(tokenizer, counts, Recipe())
    masked, labels = mask_tokens(ids, masking, generator)
    places = np.flatnonzero(labels != NO_LABEL)
    shown = tokenizer.convert_ids_to_tokens(ids)
    for place, after in zip(places, tokenizer.convert_ids_to_tokens(masked[places]), strict=True):
        shown[place] = f"{{{shown[place]} → {after}}}"
    print(f"[{chosen[0]}], masked as in training: {' '.join(shown)}")


def report_overlap(report: Report, corpus: TokenCorpus, tokenizer, args) -> None:
    overlap = find_overlaps(corpus, tokenizer, expand_globs(args.against), args.ngram)
    n = len(overlap.sequences)
    report.section(f"Runs of {args.ngram} words that also occur in evaluation sets")
    for file in overlap.files:
        found = f"{file['found']:,} of {file['texts']:,} texts of {args.ngram} words or more"
        report.line(file["name"], found, f"in {file['sequences']:,} sequences")
    report.line("sequences in all", n, percent(n, len(corpus)))
    for number, words in overlap.examples:
        print(f"[{number}] ... {words} ...")
    if args.overlap_file:
        write_overlap(args.overlap_file, overlap, corpus, args.ngram)
    if n:
        way_out = f"train.py --leave_out {args.overlap_file}" if args.overlap_file else "--overlap_file lists them"
        report.notes.append(f"{n:,} sequences share runs of {args.ngram} words with evaluation sets: {way_out}")


# ---------------------------------------------------------------------------------------------------- teacher and needs


def report_teacher(
    report: Report, corpus: TokenCorpus, statistics: CorpusStatistics, tokenizer, teacher, length: int
) -> None:
    """The teacher's loss on a sample, against that of a guess by frequency: the entropy of the tokens."""
    import torch

    from evaluation import held_out
    from models.language_model import LanguageModel
    from training.distributed import has_native_bf16, single_process

    world = single_process(None)
    model = LanguageModel(teacher).to(world.device)
    sample = held_out.held_out_sequences(len(corpus), 1.0)[:N_SAMPLE]
    text = held_out.held_out_batches(corpus, tokenizer, length, not model.family.causal, sample)
    dtype = torch.bfloat16 if has_native_bf16(world.device) else torch.float32
    metrics = held_out.evaluate(model, None, text, world, dtype)
    loss = metrics["clm_loss" if model.family.causal else "mlm_loss"]
    text = statistics.counts.astype(float)
    text[[id_ for id_ in tokenizer.all_special_ids if id_ < len(text)]] = 0
    shares = text[text > 0] / text.sum()
    by_frequency = float(-(shares * np.log(shares)).sum())
    report.section("Teacher")
    report.line("loss", f"{loss:.3f} nats", f"on {len(sample)} sequences, {100 * metrics['accuracy']:.1f} % right")
    report.line(
        "a guess by frequency has", f"{by_frequency:.3f} nats", f"and an even one {math.log(len(tokenizer)):.3f}"
    )
    if loss > by_frequency:
        report.problems.append(
            f"the teacher (loss {loss:.2f}) is worse than a guess by frequency ({by_frequency:.2f}): the text was made "
            f"with another tokenizer, or the teacher is not trained"
        )


def report_needs(report: Report, corpus: TokenCorpus, training: LmSeqsDataset, teacher) -> None:
    """What train.py asks of the machine, for a student of half the depth and the default recipe."""
    import psutil

    from models.student import build_student, half_depth_config

    student = build_student(half_depth_config(teacher.config), None)
    s, t = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    recipe = Recipe()
    n_batches = len(GroupedBatchSampler(training.lengths, recipe.batch_size))
    steps = recipe.n_epoch * math.ceil(n_batches / recipe.gradient_accumulation_steps)
    n = len(training)
    on_disk = sum(os.path.getsize(file.path) for file in corpus.files)
    state = 12 * s  # weights and Adam's two moments
    report.section("A run with the default recipe")
    report.line("models", f"teacher {t / 1e6:.1f} M, student {s / 1e6:.1f} M parameters")
    report.line("steps", steps, f"{recipe.n_epoch} epochs of {training.n_tokens:,} tokens on one process")
    report.line("memory of the device", size(4 * t + 16 * s), "models, gradients, optimizer; activations come on top")
    own = f"index of the sequences; {size(OWN * n)} more for each process"
    report.line("memory of the machine", size(SHARED * n), own)
    report.line("", size(psutil.virtual_memory().available), "are available here")
    report.line("page cache", size(on_disk), "to read the text from the disk only once")
    kept = 8 * s + state + 4 * s * recipe.n_epoch
    report.line("disk", size(kept + state), f"of which {size(state)} only while a checkpoint is written")
    report.line("", size(shutil.disk_usage(".").free), "are free here")


def plot(target: str, statistics: CorpusStatistics, max_length: int) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    top = int(max(np.percentile(statistics.lengths, 99.5), MIN_LENGTH)) + 1
    width = -(-top // 80)  # whole tokens, so that all bars count equally many lengths
    left.hist(np.minimum(statistics.lengths, top), bins=np.arange(0, top + width + 1, width), color="C0")
    left.axvline(MIN_LENGTH, color="C3", linestyle="--", label=f"dropped below {MIN_LENGTH}")
    if max_length <= top:
        left.axvline(max_length, color="C1", linestyle="--", label=f"split above {max_length}")
    left.set(xlabel="tokens (the last bar: and more)", ylabel="sequences", title="lengths of the sequences")
    left.legend()
    counts = -np.sort(-statistics.counts[statistics.counts > 0])
    right.loglog(np.arange(1, len(counts) + 1), counts)
    right.set(xlabel="rank", ylabel="occurrences", title="frequency of the tokens")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> int:
    if args.plot:
        check_picture(args.plot, "--plot")
    if args.token_counts:
        check_input_file(args.token_counts, "--token_counts")
    name = args.tokenizer_name or args.teacher_name
    if args.overlap_file:
        check_output_file(args.overlap_file, "--overlap_file")
        if not args.against:
            raise utils.InputError("--overlap_file lists what --against finds: give both.")
    if args.against and not name:
        raise utils.InputError("--against reads the text again, as words: give --tokenizer_name.")
    report = Report()
    tokenizer = load_tokenizer(name) if name else None
    corpus = open_corpus(args.data_file, tokenizer)
    corpus.verify()
    teacher = None
    if args.teacher_name:
        from models.loading import load_language_model

        teacher = load_language_model(args.teacher_name, "teacher", head_required=True)
    max_length = max_length_of(tokenizer, teacher) if args.max_length is None else args.max_length
    description = describe_tokenizer(tokenizer) if tokenizer else corpus.made_by
    if description is None:
        raise utils.InputError(f"{corpus} does not say which tokenizer made it: give --tokenizer_name.")

    report_files(report, corpus)
    statistics = survey(corpus, description["special_ids"])
    report_sequences(report, statistics)
    report_tokens(report, statistics, description, tokenizer)
    if args.token_counts:
        check_counts(report, args.token_counts, statistics, description["vocab_size"])
    if args.plot:
        plot(args.plot, statistics, max_length)
    if not report.problems:
        if args.against:
            report_overlap(report, corpus, tokenizer, args)
        training = LmSeqsDataset(corpus, description["special_ids"], max_length)
        report_training(report, training, len(corpus), max_length)
        if tokenizer:
            report_examples(report, corpus, training, statistics, tokenizer, args)
        if teacher:
            report_teacher(report, corpus, statistics, tokenizer, teacher, max_length)
            report_needs(report, corpus, training, teacher)
    return report.close()


def max_length_of(tokenizer, teacher) -> int:
    """The maximum length that train.py uses for a teacher and its student."""
    if teacher is None:
        return 512
    from models.families import max_length

    return min(max_length(teacher.config), tokenizer.model_max_length)


if __name__ == "__main__":
    raise SystemExit(main())
