"""How well a model's hidden states show which sentences mean the same, before any fine-tuning.

STS-B's pairs are ranked by the cosine of the means over tokens of both sentences' last hidden states (Reimers and
Gurevych, 2019, section 4.1). It takes seconds, and is an early sign of how fine-tuning on tasks will turn out.

Dimensions: bs texts of seq_length tokens; dim.
"""

import numpy as np
import torch

from evaluation.fine_tuning import encode, load_for
from evaluation.glue import TASKS, Example, score

BATCH = 64


@torch.no_grad()
def mean_hidden_states(name: str, tokenizer, texts: list[str], device: torch.device) -> np.ndarray:
    """(n texts, dim) float64."""
    from transformers import AutoModel, DataCollatorWithPadding

    model = load_for(AutoModel, name, tokenizer).to(device).eval()
    features = encode(tokenizer, model, [(text,) for text in texts], TASKS["STS-B"].max_length)
    collate = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(texts)), key=lambda i: len(features[i]["input_ids"]))
    means = []
    for start in range(0, len(order), BATCH):
        batch = collate([features[i] for i in order[start : start + BATCH]]).to(device)
        hidden = model(**batch).last_hidden_state.double()  # (bs, seq_length, dim)
        attended = batch["attention_mask"][..., None]  # (bs, seq_length, 1)
        means.append((hidden * attended).sum(1) / attended.sum(1))
    return torch.cat(means).cpu().numpy()[np.argsort(order)]


def similarity_scores(name: str, tokenizer, pairs: list[Example], device: torch.device) -> dict[str, float]:
    """STS-B's metrics of the cosines, in percent; `score` is Spearman's alone, since cosines are on another scale."""
    states = mean_hidden_states(name, tokenizer, [text for pair in pairs for text in pair.texts], device)
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    cosines = (states[::2] * states[1::2]).sum(1, keepdims=True)  # (n pairs, 1)
    metrics = score(TASKS["STS-B"], [cosines], [pairs])
    return metrics | {"score": metrics["spearman"]}
