"""What follows from a teacher: the shape of its student, and the student's first weights."""

from collections.abc import Sequence

import torch
from transformers import AutoConfig, DistilBertConfig, PretrainedConfig, PreTrainedModel

from models.families import family_of
from models.loading import auto_class, load_state_dict, some
from utils import InputError, logger

TEACHER_LAYERS = "teacher_layers"  # in a student's configuration: where its layers are from
# DistilBERT's name of each number of a configuration <- BERT's.
BERT_SHAPE = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation": "hidden_act",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
}
# DistilBERT's name of each part of a layer <- BERT's.
BERT_LAYER = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


def half_depth_config(teacher: PretrainedConfig, student_type: str | None = None) -> PretrainedConfig:
    """The teacher's shape at half the depth.

    Args:
        student_type: the teacher's own family, or DistilBERT for a BERT, without token types and pooler; None for the
            one that is usual.

    Raises: InputError if a teacher of this family has no student of that one.
    """
    depth = max(1, teacher.num_hidden_layers // 2)
    student_type = student_type or family_of(teacher).student or teacher.model_type
    if (teacher.model_type, student_type) == ("bert", "distilbert"):
        values = {ours: getattr(teacher, theirs) for ours, theirs in BERT_SHAPE.items()}
        return DistilBertConfig(**values | {"n_layers": depth, "sinusoidal_pos_embds": True})
    if student_type != teacher.model_type:
        raise InputError(
            f"--student_type {student_type}: its shape does not follow from a {teacher.model_type} teacher's; "
            f"give it with --student_config."
        )
    left_out = ("architectures", "_name_or_path", "transformers_version", "dtype", "model_type", TEACHER_LAYERS)
    values = {key: value for key, value in teacher.to_dict().items() if key not in left_out}
    config = AutoConfig.for_model(student_type, **values)
    config.num_hidden_layers = depth
    if types := getattr(config, "layer_types", None):  # where they alternate, the student keeps the pattern
        config.layer_types = types[:depth]
    return config


def build_student(config: PretrainedConfig, weights: str | None) -> PreTrainedModel:
    """A student of this shape, with random weights or those of a .pth file.

    Raises: InputError if the weights don't fit the shape.
    """
    if weights is None:
        return auto_class(config).from_config(config, dtype=torch.float32)
    return student_with(config, load_state_dict(weights), weights)


def student_with(config: PretrainedConfig, state: dict[str, torch.Tensor], weights: str) -> PreTrainedModel:
    """A student of this shape with the weights of a state dict; those it lacks are random.

    Args:
        weights: where they are from, for messages.

    Raises: InputError if they don't fit the shape.
    """
    student = auto_class(config).from_config(config, dtype=torch.float32)
    own = student.state_dict()
    unknown = sorted(set(state) - set(own))
    misfits = [key for key in own if key in state and state[key].shape != own[key].shape]
    if unknown or misfits:
        example = misfits[0] if misfits else unknown[0]
        shapes = f": {tuple(state[example].shape)} there, {tuple(own[example].shape)} here" if misfits else ""
        raise InputError(
            f"{weights} does not fit the student's shape ({some(misfits or unknown)}{shapes}); "
            f"give its shape with --student_config."
        )
    tied = set(student.all_tied_weights_keys)
    missing = [key for key in own if key not in state and key not in tied]
    if len(missing) == len(own) - len(tied):
        raise InputError(f"{weights} holds none of the student's weights.")
    if missing:
        logger.warning("%s does not hold %s: these start from random weights", weights, some(missing))
    student.load_state_dict(state, strict=False)
    student.tie_weights()
    if f"{family_of(config).positions}.weight" in state and getattr(config, "sinusoidal_pos_embds", False):
        student.config.sinusoidal_pos_embds = False  # the table is the teacher's now
    return student


# -------------------------------------------------------------------------------------------------- layers of a teacher


def usual_layers(teacher: PretrainedConfig) -> list[int]:
    """Half of the teacher's layers, evenly spread."""
    n = half_depth_config(teacher).num_hidden_layers
    return spread_layers(teacher.num_hidden_layers, n, getattr(teacher, "layer_types", None))


def spread_layers(depth: int, n: int, types: Sequence[str] | None = None) -> list[int]:
    """`n` of `depth` layers, evenly spread from the first to the last: 0 2 4 7 9 11 for 6 of 12.

    Args:
        types: of the layers, where they alternate. The student has the pattern of the teacher's first n layers, and
            each of its layers comes from one of its type: of all such choices, the one nearest to an even spread.
    """
    even = [i * (depth - 1) / max(1, n - 1) for i in range(n)]
    if len(set(types or ())) < 2:
        return [round(place) for place in even]
    best: dict[int, tuple[float, list[int]]] = {-1: (0.0, [])}  # last layer so far -> squared distances, layers
    for i, place in enumerate(even):
        best = {
            layer: min(
                (distance + (layer - place) ** 2, [*chosen, layer])
                for last, (distance, chosen) in best.items()
                if last < layer
            )
            for layer in range(min(best) + 1, depth)
            if types[layer] == types[i]
        }
    return min(best.values())[1]


def followed_layers(given: list[int] | None, student: PretrainedConfig, teacher: PretrainedConfig) -> list[int]:
    """Which of the teacher's layers each of the student's follows: as given, or those it was extracted from, or evenly
    spread ones. Raises: InputError if the teacher has no such layers, or they are too few or too many."""
    depth, n = teacher.num_hidden_layers, student.num_hidden_layers
    noted = getattr(student, TEACHER_LAYERS, None)
    layers = given or noted or spread_layers(depth, n, getattr(teacher, "layer_types", None))
    if not isinstance(layers, list) or len(layers) != n or any(layer not in range(depth) for layer in layers):
        found = "" if given else ", as the student's configuration has it"
        raise InputError(
            f"--teacher_layers ({layers}{found}): name one of the teacher's layers, 0 to {depth - 1}, for each of the "
            f"student's {n}."
        )
    return layers


def extract_to_distilbert(
    state: dict[str, torch.Tensor], layers: list[int], vocab_transform: bool
) -> dict[str, torch.Tensor]:
    """A BERT's state dict -> its DistilBERT's, by copy. Without `vocab_transform` that layer is left out."""
    source = "bert.embeddings"
    taken = {
        "distilbert.embeddings.word_embeddings.weight": state[f"{source}.word_embeddings.weight"],
        "distilbert.embeddings.position_embeddings.weight": (
            state[f"{source}.position_embeddings.weight"] + state[f"{source}.token_type_embeddings.weight"][0]
        ),
        "vocab_projector.weight": state["cls.predictions.decoder.weight"],
        "vocab_projector.bias": state["cls.predictions.bias"],
    }
    modules = {"distilbert.embeddings.LayerNorm": "bert.embeddings.LayerNorm"}
    for student, teacher in enumerate(layers):
        for ours, theirs in BERT_LAYER.items():
            modules[f"distilbert.transformer.layer.{student}.{ours}"] = f"bert.encoder.layer.{teacher}.{theirs}"
    if vocab_transform:
        modules["vocab_transform"] = "cls.predictions.transform.dense"
        modules["vocab_layer_norm"] = "cls.predictions.transform.LayerNorm"
    for ours, theirs in modules.items():
        for part in ("weight", "bias"):
            taken[f"{ours}.{part}"] = state[f"{theirs}.{part}"]
    return taken


def extract_same_family(state: dict[str, torch.Tensor], layers: list[int], prefix: str) -> dict[str, torch.Tensor]:
    """A state dict with only some of its layers, renumbered."""
    taken = {}
    for name, value in state.items():
        if not name.startswith(f"{prefix}."):
            taken[name] = value
            continue
        number, rest = name[len(prefix) + 1 :].split(".", 1)
        for student in (i for i, layer in enumerate(layers) if layer == int(number)):
            taken[f"{prefix}.{student}.{rest}"] = value
    return taken


def with_layers(model: PreTrainedModel, layers: list[int], student_type: str | None = None) -> PreTrainedModel:
    """A student with some of the model's layers and all its other weights that fit; arguments as for `extract`."""
    return student_with(*extract(model, layers, True, student_type), "the model")


def extract(
    teacher: PreTrainedModel, layers: list[int], vocab_transform: bool, student_type: str | None = None
) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """The student's shape and first weights. Raises: InputError if the teacher has no such layers.

    Args:
        layers: of the teacher, lowest first.
        vocab_transform: whether the layer before the vocabulary projection is taken too.
        student_type: the student's family; None for the usual one.
    """
    depth = teacher.config.num_hidden_layers
    config = half_depth_config(teacher.config, student_type)
    types = getattr(teacher.config, "layer_types", None)
    if not all(0 <= layer < depth for layer in layers):
        raise InputError(f"--layers {' '.join(map(str, layers))}: the teacher's layers are 0 to {depth - 1}.")
    config.num_hidden_layers = len(layers)
    setattr(config, TEACHER_LAYERS, list(layers))
    if types:
        config.layer_types = [types[layer] for layer in layers]
    state = teacher.state_dict()
    if (teacher.config.model_type, config.model_type) == ("bert", "distilbert"):
        taken = extract_to_distilbert(state, layers, vocab_transform)
    else:
        taken = extract_same_family(state, layers, family_of(config).layers)
    return config, {name: value.clone() for name, value in taken.items()}
