"""How often an epoch draws the sequences of each source of a text."""

import numpy as np

from utils import InputError


def weights_of(names: list[str], tokens: np.ndarray, weights: list[float] | None, exponent: float | None) -> np.ndarray:
    """(n_sources,) how often an epoch draws each source.

    Args:
        names: of the sources, for messages.
        tokens: (n_sources,) of each.
        weights: as they are given; or
        exponent: shares of an epoch in proportion to tokens^exponent, as XLM draws languages (Conneau and Lample, 2019,
            section 3.1), in an epoch that is as long as the text.

    Raises: InputError if there are not as many weights as sources, or a source is empty.
    """
    if weights is not None and len(weights) != len(names):
        raise InputError(
            f"--data_weights gives {len(weights)} numbers, but --data_file {len(names)} arguments: give one for each "
            f"(in quotes, a glob is one argument)."
        )
    if not tokens.all():
        raise InputError(f"--data_file {names[int(np.argmin(tokens))]}: no sequence of it is left to train on.")
    if weights is not None:
        return np.array(weights)
    shares = tokens**exponent / (tokens**exponent).sum()
    return shares * tokens.sum() / tokens
