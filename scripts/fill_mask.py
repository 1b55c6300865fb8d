"""Shows what models predict for the masked word of a sentence, side by side.

    python scripts/fill_mask.py --models bert-base-uncased serialization_dir/my_first_training \\
        --text "The river [MASK] in spring."
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from corpus.tokenization import load_tokenizer
from models.families import max_length
from models.language_model import LanguageModel
from models.loading import load_language_model
from utils import InputError, integer, path, words


def make_parser() -> argparse.ArgumentParser:
    parser = utils.make_parser(__doc__)
    add = parser.add_argument
    add("--models", type=path, nargs="+", required=True, help="hub names or folders, such as a dump_path")
    add("--text", type=words, required=True, help="a sentence with one [MASK]")
    add("--tokenizer_name", type=path, help="tokenizer of all models (default: each model's own)")
    add("--top", type=integer(1, 100), default=5, help="number of guesses to show (%(default)s)")
    return parser


@torch.no_grad()
def guesses(name: str, tokenizer_name: str, text: str, top: int) -> list[tuple[str, float]]:
    """The likeliest words for the mask, each with its probability, best first.

    Raises: InputError if the model can't guess, or the text has not exactly one mask.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    model = LanguageModel(load_language_model(name, "model", head_required=True)).eval()
    if tokenizer.mask_token is None or model.family.causal:
        raise InputError(f"--models {name}: it guesses what comes next, and not what is masked.")
    ids = tokenizer(text.replace("[MASK]", tokenizer.mask_token), return_tensors="pt").input_ids  # (1, seq_length)
    masks = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]
    if len(masks) != 1:
        raise InputError(f"--text has {len(masks)} masks; write [MASK] instead of one word.")
    if ids.shape[1] > max_length(model.model.config):
        raise InputError(f"--text has {ids.shape[1]} tokens, but {name} takes {max_length(model.model.config)}.")
    if len(tokenizer) > model.projection.out_features:
        raise InputError(f"the tokenizer {tokenizer_name} has more tokens than {name}; name its own.")
    probs = model.logits(model.hidden(ids, None)[masks])[0].softmax(-1)  # (voc_size,)
    best = probs[: len(tokenizer)].topk(min(top, len(tokenizer)))
    return [(tokenizer.decode([i]).strip(), p) for p, i in zip(*map(torch.Tensor.tolist, best), strict=True)]


@utils.command_line(make_parser)
def main(args: argparse.Namespace) -> None:
    columns = [
        [f"{word} {p:.0%}" for word, p in guesses(name, args.tokenizer_name or name, args.text, args.top)]
        for name in args.models
    ]
    print(utils.markdown_table([Path(name).name for name in args.models], zip(*columns, strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
