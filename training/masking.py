"""Which tokens of a batch are masked, and what replaces them.

Dimensions: n_tokens of all sequences of a batch; voc_size.
"""

from dataclasses import dataclass

import numpy as np

from corpus.tokenization import word_beginnings
from training.recipe import Recipe

NO_LABEL = -100  # instead of a label, as in PyTorch's losses


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen and replaced (BERT's 80/10/10, XLM's emphasis on rare tokens).

    Attributes:
        token_probs: (voc_size,) how likely each token is chosen, up to a factor; 0 for special tokens.
        random_ids: ids that a random replacement may be: all but the special ones.
        mask_id: [MASK].
        proportion: share of the attended tokens that is chosen.
        word_mask, word_keep, word_rand: of those, the shares that become [MASK], stay, become a random token.
        begins_word: (voc_size,) bool, which tokens begin a word, for masks of whole words; None: tokens are chosen.
    """

    token_probs: np.ndarray
    random_ids: np.ndarray
    mask_id: int
    proportion: float = Recipe.mlm_mask_prop
    word_mask: float = Recipe.word_mask
    word_keep: float = Recipe.word_keep
    word_rand: float = Recipe.word_rand
    begins_word: np.ndarray | None = None

    @classmethod
    def of_tokenizer(cls, tokenizer, counts: np.ndarray, smoothing: float = 0.0, **more) -> "Masking":
        """Tokens are chosen in proportion to max(count, 1) ** -smoothing, special ones never (Lample and Conneau, 2019,
        section 3.3)."""
        probs = np.maximum(counts, 1).astype(np.float64) ** -smoothing
        probs[tokenizer.all_special_ids] = 0.0
        return cls(probs, np.flatnonzero(probs), tokenizer.mask_token_id, **more)

    @classmethod
    def of_recipe(cls, tokenizer, counts: np.ndarray, recipe: Recipe) -> "Masking":
        """As in training."""
        return cls.of_tokenizer(
            tokenizer,
            counts,
            recipe.mlm_smoothing,
            proportion=recipe.mlm_mask_prop,
            word_mask=recipe.word_mask,
            word_keep=recipe.word_keep,
            word_rand=recipe.word_rand,
            begins_word=word_beginnings(tokenizer) if recipe.whole_word_mask else None,
        )

    def is_like(self, other: "Masking") -> bool:
        """Whether both draw from the same distribution."""
        shares = ("proportion", "word_mask", "word_keep", "word_rand")
        return (
            np.array_equal(self.token_probs, other.token_probs)
            and all(getattr(self, name) == getattr(other, name) for name in shares)
            and (self.begins_word is None) == (other.begins_word is None)
        )


def mask_tokens(ids: np.ndarray, masking: Masking, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Chooses tokens of a batch, by their probabilities and without replacement, and replaces them.

    Drawing one token after another, each time from those that are left, would be slow. The same distribution has a
    closed form (Efraimidis and Spirakis, 2006): let each token wait for a time Exp(1) / probability, and take the first
    ones. The minimum of such times falls on a token with its share of the probabilities, and since the exponential has
    no memory, so does the next among the others. Unlike torch.multinomial, this has no limit on the number of tokens.

    Args:
        ids: (n_tokens,).

    Returns: (n_tokens,) masked ids; (n_tokens,) labels, the original ids at the chosen tokens and NO_LABEL elsewhere.
    """
    probs = masking.token_probs[ids]
    candidates = np.flatnonzero(probs)
    n_chosen = min(int(np.ceil(masking.proportion * len(ids))), candidates.size)
    if masking.begins_word is None:
        times = generator.exponential(size=candidates.size) / probs[candidates]
        chosen = np.sort(candidates[np.argpartition(times, n_chosen - 1)[:n_chosen]] if n_chosen else candidates[:0])
    else:
        chosen = _choose_words(ids, candidates, probs[candidates], n_chosen, masking.begins_word, generator)

    kind = generator.random(len(chosen)) * (masking.word_mask + masking.word_keep + masking.word_rand)
    random_ids = masking.random_ids[generator.integers(len(masking.random_ids), size=len(chosen))]
    is_masked = kind < masking.word_mask
    is_random = kind >= masking.word_mask + masking.word_keep
    masked, labels = ids.copy(), np.full_like(ids, NO_LABEL)
    masked[chosen[is_masked]] = masking.mask_id
    masked[chosen[is_random]] = random_ids[is_random]
    labels[chosen] = ids[chosen]
    return masked, labels


def _choose_words(ids, candidates, probs, n_tokens: int, begins_word, generator) -> np.ndarray:
    """Sorted places of whole words that have about `n_tokens` tokens together, drawn as `mask_tokens` draws tokens; a
    word's probability is the mean of its tokens' (Devlin et al., 2019, as their code was revised).

    Args:
        candidates: (n,) places in `ids` that may be chosen, with (n,) `probs`.
    """
    if not n_tokens:
        return candidates[:0]
    begins = begins_word[ids[candidates]] | (np.diff(candidates, prepend=-2) > 1)  # or follows a special token
    word = np.cumsum(begins) - 1  # (n,)
    lengths = np.bincount(word)
    order = np.argsort(generator.exponential(size=len(lengths)) * lengths / np.bincount(word, probs))
    middles = np.cumsum(lengths[order]) - lengths[order] / 2  # so that the mean number of tokens is right
    taken = np.zeros(len(lengths), bool)
    taken[order[: max(1, int((middles <= n_tokens).sum()))]] = True
    return candidates[taken[word]]
