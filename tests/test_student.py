"""The shape that follows from a teacher, and the choice of layers. (Their weights: test_extract_for_distil.py.)"""

import itertools

import pytest
import torch
from small_models import SMALL
from transformers import BertConfig, ModernBertConfig
from workspace import ROOT

from models.loading import auto_class, count_parameters, load_config
from models.student import build_student, extract, half_depth_config, spread_layers, usual_layers


def test_half_of_bert_base_is_the_shipped_configuration():
    shipped = load_config(ROOT / "training_configs" / "distilbert-base-uncased.json")
    assert half_depth_config(BertConfig()).to_dict() == shipped.to_dict()
    student = build_student(shipped, None)
    assert round(sum(p.numel() for p in student.parameters()) / 1e6) == 67
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name, millions", [
    ("distilbert-base-cased", 66),
    ("distilbert-base-multilingual-cased", 135),
    ("distilbert-base-german-cased", 67),
    ("distilroberta-base", 82),
    ("distilgpt2", 82),
    ("modernbert-base-half", 95),
    ("distilbert-tiny", 4),
])  # fmt: skip
def test_shipped_configurations_have_the_sizes_they_are_known_for(name, millions):
    file = ROOT / "training_configs" / f"{name}.json"
    assert count_parameters(load_config(file), name) / 1e6 == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "bert"])
def test_a_student_of_all_layers_is_the_teacher_and_one_of_some_loads(name, tmp_path):
    torch.manual_seed(0)
    teacher = auto_class(SMALL[name]).from_config(SMALL[name]).eval()
    input_ids = torch.randint(5, 99, (2, 9))
    for layers in ([0, 1, 2, 3], usual_layers(SMALL[name])):
        config, state = extract(teacher, layers, vocab_transform=True)
        torch.save(state, tmp_path / "init.pth")
        student = build_student(config, str(tmp_path / "init.pth")).eval()
        student.save_pretrained(tmp_path / "student")
        student = auto_class(config).from_pretrained(tmp_path / "student").eval()
        same = torch.equal(student(input_ids).logits, teacher(input_ids).logits)
        assert same == (len(layers) == 4)
    types = getattr(SMALL[name], "layer_types", None)
    assert not types or student.config.layer_types == types[:2]


@pytest.mark.parametrize("name", SMALL)
def test_every_family_has_a_student_of_half_its_depth(name):
    student = half_depth_config(SMALL[name])
    assert student.num_hidden_layers == 2
    assert student.model_type == {"bert": "distilbert"}.get(name, name)
    assert student.vocab_size == 99
    assert half_depth_config(SMALL[name], name).model_type == name


def test_alternating_layers_keep_their_pattern_and_are_as_even_as_can_be():
    """Held against all choices."""
    for depth, n in ((4, 2), (7, 3), (9, 4), (10, 5), (12, 6)):
        types = ["local" if i % 3 else "global" for i in range(depth)]
        fitting = [c for c in itertools.combinations(range(depth), n) if [types[i] for i in c] == types[:n]]
        even = [i * (depth - 1) / (n - 1) for i in range(n)]
        unevenness = lambda layers, even=even: sum((layer - place) ** 2 for layer, place in zip(layers, even))  # noqa: B905
        assert unevenness(spread_layers(depth, n, types)) == pytest.approx(min(map(unevenness, fitting)))
        assert tuple(spread_layers(depth, n, types)) in fitting
    base = ModernBertConfig().layer_types  # every third layer looks at all tokens
    assert spread_layers(22, 11, base) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 18, 20]


def test_layers_are_evenly_spread():
    assert spread_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spread_layers(4, 2) == [0, 3]
    assert spread_layers(5, 1) == [0]
    for depth in range(2, 49):
        layers = spread_layers(depth, depth // 2)
        assert len(set(layers)) == depth // 2
        assert layers == sorted(layers)
        assert layers[-1] == (depth - 1 if depth > 3 else 0)
