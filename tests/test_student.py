"""The shape that follows from a teacher, and the choice of layers. (Their weights: test_extract_for_distil.py.)"""

import pytest
from small_models import SMALL
from transformers import BertConfig
from workspace import ROOT

from models.loading import load_config
from models.student import build_student, half_depth_config, spread_layers


def test_half_of_bert_base_is_the_shipped_configuration():
    shipped = load_config(ROOT / "training_configs" / "distilbert-base-uncased.json")
    assert half_depth_config(BertConfig()).to_dict() == shipped.to_dict()
    student = build_student(shipped, None)
    assert round(sum(p.numel() for p in student.parameters()) / 1e6) == 67
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", SMALL)
def test_every_family_has_a_student_of_half_its_depth(name):
    student = half_depth_config(SMALL[name])
    assert student.num_hidden_layers == 2
    assert student.model_type == {"bert": "distilbert"}.get(name, name)
    assert student.vocab_size == 99
    assert half_depth_config(SMALL[name], name).model_type == name


def test_layers_are_evenly_spread():
    assert spread_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spread_layers(4, 2) == [0, 3]
    assert spread_layers(5, 1) == [0]
    for depth in range(2, 49):
        layers = spread_layers(depth, depth // 2)
        assert len(set(layers)) == depth // 2
        assert layers == sorted(layers)
        assert layers[-1] == (depth - 1 if depth > 3 else 0)
