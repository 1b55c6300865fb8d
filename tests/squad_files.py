"""Small files in SQuAD's format, whose answers a model can learn to find."""

import json
from pathlib import Path

import numpy as np
from workspace import ENDINGS, OBJECTS, SUBJECTS, VERBS


def write_squad(path: Path, n: int, seed: int = 0) -> None:
    """Questions for the object of a sentence."""
    generator = np.random.default_rng(seed)
    paragraphs = []
    for i in range(n):
        subject, verb, answer, ending = map(str, map(generator.choice, (SUBJECTS, VERBS, OBJECTS, ENDINGS)))
        context = f"{subject} {verb} {answer} {ending}."
        qa = {"id": f"{seed}-{i}", "question": f"{subject} {verb}", "answers": [
            {"text": answer, "answer_start": context.index(answer, len(subject) + len(verb))}
        ]}  # fmt: skip
        paragraphs.append({"context": context, "qas": [qa]})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "sentences", "paragraphs": paragraphs}]}))
