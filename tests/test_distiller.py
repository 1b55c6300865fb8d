"""The losses and their gradients against the straightforward formula in float64."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_relation_loss import formula as relations_formula

from distiller import Distiller, usual_evaluations
from grouped_batch_sampler import GroupedBatchSampler
from models.language_model import LanguageModel
from models.student import build_student, half_depth_config
from training.batches import Padding, RunData, StepCounts, cut_micro_batches, pad, prepare_batch_clm, prepare_batch_mlm
from training.distributed import World
from training.masking import Masking
from training.recipe import Recipe
from training.relation_loss import usual_heads
from utils import RunError

ONLY = {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0}
RECIPES = {
    "ce": {**ONLY, "alpha_ce": 5.0},
    "ce at masks": {**ONLY, "alpha_ce": 5.0, "restrict_ce_to_mask": True, "temperature": 3.0},
    "mlm": {**ONLY, "alpha_mlm": 2.0},
    "mse": {**ONLY, "alpha_mse": 0.3},
    "mse at masks": {**ONLY, "alpha_mse": 0.3, "restrict_ce_to_mask": True},
    "cos": {**ONLY, "alpha_cos": 1.0},
    "relation": {**ONLY, "alpha_relation": 3.0, "relation_heads": 8},
    "relation of another layer": {**ONLY, "alpha_relation": 3.0, "relation_layer": 1},
    "layers": {**ONLY, "alpha_layers": 2.0, "teacher_layers": [2, 1]},
    "pooled": {**ONLY, "alpha_pooled": 2.0},
    "all": {"alpha_mse": 0.01, "alpha_relation": 0.1, "alpha_layers": 0.5, "alpha_pooled": 0.3},
    "all at masks": {"alpha_mse": 0.01, "restrict_ce_to_mask": True},
}


def straightforward(student, teacher, batches, recipe: Recipe, widen=None) -> torch.Tensor:
    """The loss of the blueprint, written down as it reads: full logits, one padded batch, boolean selection.

    `batches` are (input_ids, attended, lm_labels) triples, each (bs, seq_length); labels are -100 where there is none.
    `widen` is (t_dim, s_dim), for a student of another width.
    """
    kl, mse, n_kl, hard, n_hard, cos, n_cos, relation, layers, pooled, n_pooled = (0.0,) * 11
    for input_ids, attended, labels in batches:
        out_s = student(input_ids, attention_mask=attended.long(), output_hidden_states=True)
        with torch.no_grad():
            out_t = teacher(input_ids, attention_mask=attended.long(), output_hidden_states=True)
        chosen = labels != -100 if recipe.restrict_ce_to_mask else attended
        s, t = out_s.logits[chosen], out_t.logits[chosen]
        p_t, p_s = (t / recipe.temperature).softmax(-1), (s / recipe.temperature).softmax(-1)
        kl = kl + (p_t * (p_t.log() - p_s.log())).sum() * recipe.temperature**2
        mse = mse + ((s - t) ** 2).sum()
        n_kl += chosen.sum()
        if recipe.alpha_clm:
            hard = hard + F.cross_entropy(
                out_s.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            n_hard += (labels[:, 1:] != -100).sum()
        else:
            hard = hard + F.cross_entropy(
                out_s.logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            n_hard += (labels != -100).sum()
        h_s, h_t = out_s.hidden_states[-1][attended], out_t.hidden_states[-1][attended]
        h_s = h_s if widen is None else h_s @ widen.T
        cos = cos + (1 - (h_s * h_t).sum(-1) / (h_s.norm(dim=-1) * h_t.norm(dim=-1))).sum()
        n_cos += attended.sum()
        for each_s, each_t, real in zip(out_s.hidden_states[-1], out_t.hidden_states[-1], attended, strict=True):
            mean_s, mean_t = each_s[real].mean(0), each_t[real].mean(0)
            pooled = pooled + 1 - F.cosine_similarity(mean_s if widen is None else widen @ mean_s, mean_t, dim=0)
            n_pooled += 1
        if recipe.alpha_layers:
            first, second = recipe.teacher_layers or [0, 3]  # evenly spread
            for state, followed in enumerate((0, first + 1, second + 1)):
                h_s, h_t = out_s.hidden_states[state][attended], out_t.hidden_states[followed][attended]
                layers = layers + ((h_s if widen is None else h_s @ widen.T) - h_t).square().mean(-1).sum()
        if recipe.alpha_relation:
            layer = teacher.config.num_hidden_layers - 1 if recipe.relation_layer is None else recipe.relation_layer
            t_attention = teacher.bert.encoder.layer[layer].attention.self
            t_vectors = [getattr(t_attention, kind)(out_t.hidden_states[layer]) for kind in ("query", "key", "value")]
            s_attention = student.distilbert.transformer.layer[-1].attention
            s_vectors = [getattr(s_attention, kind)(out_s.hidden_states[-2]) for kind in ("q_lin", "k_lin", "v_lin")]
            n_heads = recipe.relation_heads or usual_heads((student.config.dim, teacher.config.hidden_size))
            relation = relation + relations_formula(s_vectors, t_vectors, n_heads, False, attended.sum(1))
    return (
        recipe.alpha_ce * kl / n_kl
        + recipe.alpha_mse * mse / n_kl
        + (recipe.alpha_mlm + recipe.alpha_clm) * hard / n_hard
        + recipe.alpha_cos * cos / n_cos
        + recipe.alpha_relation * relation / n_cos
        + recipe.alpha_layers * layers / n_cos
        + recipe.alpha_pooled * pooled / n_pooled
    )


def make_distiller(student, teacher, recipe: Recipe) -> Distiller:
    sampler = GroupedBatchSampler(np.full(8, 16), batch_size=1)
    world = World(torch.device("cpu"))
    data = RunData(SimpleNamespace(), sampler, None, Padding(0), {})
    return Distiller(recipe, LanguageModel(student), LanguageModel(teacher), data, world, torch.float32, None)


def distill_once(student, teacher, micro_batches, recipe: Recipe) -> tuple[float, dict]:
    return take_step(make_distiller(student, teacher, recipe), micro_batches)


def take_step(distiller: Distiller, micro_batches) -> tuple[float, dict]:
    """The loss that a Distiller logs for one step, and the gradients that it hands to the optimizer."""
    student, gradients = distiller.student.model, {}

    def capture(optimizer, *_):
        gradients.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})

    distiller.optimization.optimizer.register_step_pre_hook(capture)
    distiller.step(micro_batches, StepCounts.of(micro_batches))
    metrics, _ = distiller.meter.read(1, 0.0)
    return metrics["loss"], gradients


def assert_gradients_equal(ours: dict, reference: torch.nn.Module) -> None:
    for name, parameter in reference.named_parameters():
        if parameter.grad is None:
            assert name not in ours or ours[name].abs().max() == 0, name
            continue
        scale = parameter.grad.norm()
        if name.endswith("k_lin.bias") or scale < 1e-12:  # zero in exact arithmetic
            continue
        error = (ours[name].double() - parameter.grad).norm() / scale
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def triple(batch, ids_shape):
    labels = torch.full(ids_shape, -100).flatten()
    labels[batch.label_positions] = batch.labels
    attended = torch.ones(ids_shape, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.bool()
    return batch.input_ids, attended, labels.view(ids_shape)


@pytest.mark.parametrize("name", RECIPES)
def test_masked_losses_equal_the_formula(name, tokenizer, teacher):
    # Two micro-batches of unequal size, so that a mean of their means would be wrong.
    recipe = Recipe(**RECIPES[name], max_grad_norm=1e9, gradient_accumulation_steps=2)
    config = half_depth_config(teacher.config)
    config.dropout = config.attention_dropout = 0.0
    torch.manual_seed(1)
    student = build_student(config, None)
    generator = np.random.default_rng(0)
    masking = Masking.of_tokenizer(tokenizer, np.ones(len(tokenizer)))
    draw = lambda n: [generator.integers(5, len(tokenizer), generator.integers(8, 30)) for _ in range(n)]
    batches = [prepare_batch_mlm(draw(n), masking, generator) for n in (3, 9)]
    micro_batches = cut_micro_batches(batches, Padding(0), head_on_all_tokens=recipe.head_on_all_tokens)
    exact = copy.deepcopy(student).double()
    loss = straightforward(
        exact, copy.deepcopy(teacher).double(), [triple(b, b.input_ids.shape) for b in micro_batches], recipe
    )
    loss.backward()
    value, gradients = distill_once(student, teacher, micro_batches, recipe)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_equal(gradients, exact)


@pytest.mark.parametrize("term", ["alpha_cos", "alpha_layers", "alpha_pooled"])
def test_a_student_of_another_width_is_compared_through_a_projection_that_learns_too(tokenizer, teacher, term):
    recipe = Recipe(**{**ONLY, term: 1.0}, max_grad_norm=1e9, learning_rate=1e-3, warmup_prop=0.0)
    config = half_depth_config(teacher.config)
    config.dropout = config.attention_dropout = 0.0
    config.dim, config.n_heads = 24, 3
    student = build_student(config, None)
    generator = np.random.default_rng(0)
    masking = Masking.of_tokenizer(tokenizer, np.ones(len(tokenizer)))
    sequences = [generator.integers(5, len(tokenizer), n) for n in (9, 20, 14)]
    batch = pad(prepare_batch_mlm(sequences, masking, generator), Padding(0), recipe.head_on_all_tokens)
    distiller = make_distiller(student, teacher, recipe)
    assert distiller.student.dim == 24
    widen = distiller.objective.widening.linear.weight
    exact, exact_widen = copy.deepcopy(student).double(), widen.detach().double().requires_grad_()
    triples = [triple(batch, batch.input_ids.shape)]
    loss = straightforward(exact, copy.deepcopy(teacher).double(), triples, recipe, exact_widen)
    loss.backward()
    before = widen.detach().clone()
    value, gradients = take_step(distiller, [batch])
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_equal(gradients, exact)
    assert ((before - widen) * exact_widen.grad).sum() > 0  # a step against the gradient
    same = make_distiller(student, teacher, recipe).objective.widening.linear.weight
    assert torch.equal(same, before)  # drawn from the seed


def test_accumulated_micro_batches_equal_one_large_batch(tokenizer, teacher):
    torch.manual_seed(1)
    student = build_student(half_depth_config(teacher.config), None)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    generator = np.random.default_rng(0)
    masking = Masking.of_tokenizer(tokenizer, np.ones(len(tokenizer)))
    sequences = [generator.integers(5, len(tokenizer), n) for n in (8, 30, 12, 25, 9, 17)]
    batch = prepare_batch_mlm(sequences, masking, generator)
    large = pad(batch, Padding(0), True)
    small = [pad(batch.take(np.arange(start, start + 2)), Padding(0), True) for start in (0, 2, 4)]
    recipe = Recipe(max_grad_norm=1e9)
    value_1, gradients_1 = distill_once(copy.deepcopy(student), teacher, [large], recipe)
    value_3, gradients_3 = distill_once(copy.deepcopy(student), teacher, small, recipe)
    assert value_1 == pytest.approx(value_3, rel=1e-6)
    for name, gradient in gradients_1.items():
        if not name.endswith("k_lin.bias"):  # zero in exact arithmetic
            assert (gradient - gradients_3[name]).norm() < 1e-5 * gradient.norm(), name


def test_causal_losses_equal_the_formula():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(vocab_size=90, n_embd=32, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(1)
    teacher = GPT2LMHeadModel(GPT2Config(**shape, n_layer=2, initializer_range=0.2)).eval()
    student = GPT2LMHeadModel(GPT2Config(**shape, n_layer=1))
    recipe = Recipe(alpha_ce=5.0, alpha_mlm=0.0, alpha_clm=2.0, alpha_cos=1.0, max_grad_norm=1e9)
    generator = np.random.default_rng(0)
    draw = lambda n: [generator.integers(0, 90, generator.integers(5, 30)) for _ in range(n)]
    micro_batches = [pad(prepare_batch_clm(draw(n)), Padding(0), True) for n in (2, 7)]
    triples = []
    for micro_batch in micro_batches:
        ids, attended = micro_batch.input_ids, micro_batch.attention_mask
        triples.append((ids, attended, ids.masked_fill(~attended, -100)))
    exact = copy.deepcopy(student).double()
    loss = straightforward(exact, copy.deepcopy(teacher).double(), triples, recipe)
    loss.backward()
    value, gradients = distill_once(student, teacher, micro_batches, recipe)
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients_equal(gradients, exact)


def test_a_step_that_is_not_finite_leaves_the_weights_alone(tokenizer, teacher):
    torch.manual_seed(1)
    student = build_student(half_depth_config(teacher.config), None)
    masking = Masking.of_tokenizer(tokenizer, np.ones(len(tokenizer)))
    batch = prepare_batch_mlm([np.arange(5, 30)] * 3, masking, np.random.default_rng(0))
    micro_batches = [pad(batch, Padding(0), True)]
    sampler = GroupedBatchSampler(np.full(8, 16), batch_size=1)
    data = RunData(SimpleNamespace(), sampler, None, Padding(0), {})
    models = LanguageModel(student), LanguageModel(teacher)
    distiller = Distiller(Recipe(warmup_prop=0.0), *models, data, World(torch.device("cpu")), torch.float32, None)
    finite = distiller.objective

    class Overflow:
        def __getattr__(self, name):
            return getattr(finite, name)

        def __call__(self, *args):
            loss, parts = finite(*args)
            return loss * torch.inf, parts

    before = copy.deepcopy(student.state_dict())
    distiller.objective = Overflow()
    distiller.step(micro_batches, StepCounts.of(micro_batches))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    with pytest.raises(RunError, match="not finite in 1 of the last 1 steps"):
        distiller.save()
    distiller.objective = finite
    distiller.step(micro_batches, StepCounts.of(micro_batches))
    assert not torch.equal(student.state_dict()["vocab_transform.weight"], before["vocab_transform.weight"])


def test_usual_evaluations_read_at_most_a_quarter_of_what_training_reads():
    numbers = {4_000_000: 20, 3_200_000: 20, 1_000_000: 6, 261_000: 4, 1000: 4}
    assert {n: usual_evaluations(n, 40_000) for n in numbers} == numbers
