"""Cuts a model's vocabulary to what a text uses: most of a multilingual model's parameters are for other languages.

    python scripts/trim_vocabulary.py --model_name bert-base-multilingual-cased \\
        --token_counts data/token_counts.bert-base-multilingual-cased.pickle --min_count 10 --output_dir trimmed

writes to trimmed/ a tokenizer and the model with the rows that are left, ready for from_pretrained. A text whose tokens
are all kept is tokenized as before; other words fall into smaller pieces, and no text is lost, since all special tokens
and single characters are kept.

Binarize the text with the new tokenizer, and train with --tokenizer_name trimmed: the teacher may be the one in
trimmed/, or the whole one, whose vocabulary train.py then cuts in the same way.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.files import TokenCorpus, open_corpus
from corpus.token_counts import count_tokens, load_token_counts
from corpus.tokenization import describe_tokenizer, load_tokenizer
from corpus.vocabulary_trimming import Kept, choose_tokens, trim
from files.atomic import atomic_folder, write_json
from files.paths import check_new_folder
from models.language_model import LanguageModel
from models.loading import load_with_or_without_head, save_model
from models.trimming import trim_model
from utils import InputError, RunError, integer, logger, path


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--model_name", type=path, required=True, help="model to trim: hub name or folder")
    add("--tokenizer_name", type=path, help="tokenizer (default: the model's)")
    add("--token_counts", type=path, help="token counts of the text (from scripts/token_counts.py)")
    add(
        "--data_file",
        type=path,
        nargs="+",
        help="binarized text; without --token_counts its tokens are counted; with them it may be another text, to see "
        "how much of it stays the same",
    )
    add("--min_count", type=integer(1), default=1, help="keep tokens that occur at least this often (%(default)s)")
    add("--vocab_size", type=integer(1), help="keep this many tokens at most, the most frequent")
    add(
        "--drop_unseen_characters",
        action="store_true",
        help="keep only characters of kept tokens; others become unknown (not with byte-level BPE, which needs each)",
    )
    add("--output_dir", type=path, required=True, help="folder to write, which must not exist yet")
    return parser


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    if not (args.token_counts or args.data_file):
        raise InputError("which tokens does the text use? Give --token_counts or --data_file.")
    target = Path(args.output_dir)
    check_new_folder(target, "--output_dir")
    tokenizer = load_tokenizer(args.tokenizer_name or args.model_name)
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer {tokenizer.name_or_path} has no fast version (tokenizer.json).")
    text = open_corpus(args.data_file, tokenizer) if args.data_file else None
    if text:
        text.verify()
    if args.token_counts:
        counts = load_token_counts(args.token_counts, len(tokenizer))
    else:
        counts = count_tokens(text, len(tokenizer))
    before, vocab = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    tokens = choose_tokens(
        before, vocab, special, counts, args.min_count, args.vocab_size, not args.drop_unseen_characters
    )
    after, ids = trim(before, vocab, tokens)
    description = describe_tokenizer(tokenizer)
    kept = Kept(ids, description["vocab_size"], description["vocab_hash"])

    model, without_head = load_with_or_without_head(args.model_name, "model")
    if model.config.vocab_size < len(tokenizer):
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, but {args.model_name} only rows for "
                         f"{model.config.vocab_size}.")  # fmt: skip
    trimmed = trim_model(model, ids)
    with atomic_folder(target) as folder:
        save_model(LanguageModel(trimmed).encoder if without_head else trimmed, tokenizer, folder)
        write_json(folder / "tokenizer.json", after)
        kept.save(folder)
        check_tokenizer(folder, tokenizer, vocab, ids)
    print(report(model, trimmed, counts, kept, text))
    logger.info("%s: train.py --tokenizer_name %s --teacher_name %s", target, target, args.model_name)


def check_tokenizer(folder: Path, tokenizer, vocab: dict[str, int], ids: np.ndarray) -> None:
    """Reads the new tokenizer back. Raises: RunError if it is not the old one with these entries."""
    found = load_tokenizer(str(folder))
    tokens = {id_: token for token, id_ in vocab.items()}
    right = found.get_vocab() == {tokens[old]: new for new, old in enumerate(ids.tolist())}
    for old, new in zip(*(describe_tokenizer(t)["special_ids"].values() for t in (tokenizer, found)), strict=True):
        right &= (old is None) == (new is None) and (old is None or ids[new] == old)
    if not right:
        raise RunError(
            f"a {type(tokenizer).__name__} does not keep a trimmed vocabulary when it is loaded again; it can't be "
            f"trimmed."
        )


def report(
    model: PreTrainedModel, trimmed: PreTrainedModel, counts: np.ndarray, kept: Kept, text: TokenCorpus | None
) -> str:
    """What trimming saves, and how much of the text stays the same."""
    rows = []
    for name, measure in (
        ("entries of the vocabulary", lambda m: f"{m.config.vocab_size:,}"),
        ("parameters", lambda m: f"{sum(p.numel() for p in m.parameters()) / 1e6:.1f} M"),
        ("MB in float32", lambda m: f"{4 * sum(p.numel() for p in m.parameters()) / 1e6:.1f}"),
    ):
        rows.append([name, measure(model), measure(trimmed)])
    if text:
        n_tokens, n_sequences = what_stays(text, kept)
        same = (
            f"Of {text}, {n_tokens / text.n_tokens:.2%} of the tokens are kept, and {n_sequences / len(text):.1%} of "
        )
        same += "the sequences tokenize the same."
    else:
        same = f"{counts[kept.ids].sum() / max(1, counts.sum()):.2%} of the counted tokens are kept."
    return f"\n{utils.markdown_table(['', 'before', 'after'], rows)}\n\n{same}"


def what_stays(text: TokenCorpus, kept: Kept) -> tuple[int, int]:
    """How many of the text's tokens are kept, and how many sequences consist of kept tokens alone."""
    dropped = np.ones(kept.old_size, bool)
    dropped[kept.ids] = False
    n_tokens = n_sequences = 0
    for _, offsets, ids in text.blocks():
        n_dropped = np.concatenate([[0], np.cumsum(dropped[ids])])  # up to each token
        n_tokens += len(ids) - int(n_dropped[-1])
        n_sequences += int((np.diff(n_dropped[offsets - offsets[0]]) == 0).sum())
    return n_tokens, n_sequences


if __name__ == "__main__":
    raise SystemExit(main())
