"""How much matrix work a model does, and how much a device could do: the two sides of MFU.

MFU (model FLOPs utilization; Chowdhery et al., 2022, appendix B) counts the products that the algorithm needs for real
tokens, a multiplication and an addition each, and nothing for padding, for what is computed twice, or for embeddings.
The teacher's forward pass is needed, so it counts.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from models.language_model import LanguageModel

# Dense peak in TFLOP/s, from the makers' data sheets: name of the device, 16-bit tensor cores, float32 without them.
# Names are looked for in this order, as words of what the driver calls the device.
PEAK_TFLOPS = (
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835, 60),
    ("H100", 989, 67),
    ("H200", 989, 67),
    ("GH200", 989, 67),
    ("A100", 312, 19.5),
    ("A40", 149.7, 37.4),
    ("A10", 125, 31.2),
    ("L40S", 362, 91.6),
    ("L4", 121, 30.3),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71, 35.6),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device could do in this dtype; None where the table does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return peak_flops_of(name, dtype)


def peak_flops_of(name: str, dtype: torch.dtype) -> float | None:
    words = f" {name.replace('-', ' ')} "
    for known, half, single in PEAK_TFLOPS:
        if f" {known} " in words:
            return 1e12 * (single if dtype == torch.float32 else half)
    return None


class MatrixWork:
    """FLOPs of a model's forward pass; a backward pass takes twice as many.

    Args:
        needs_head: whether the vocabulary head is applied at all.
    """

    def __init__(self, model: LanguageModel, needs_head: bool = True) -> None:
        config = model.model.config
        encoder = model.model.get_submodule(model.family.encoder)
        in_encoder = _matrix_weights(encoder)
        in_head = _matrix_weights(model.model) - in_encoder
        self.per_token = 2 * in_encoder
        self.per_row = 2 * in_head if needs_head else 0
        self.per_pair = 4 * config.num_hidden_layers * config.hidden_size  # attention: scores, and their weighted sum
        if model.family.causal:
            self.per_pair //= 2

    def forward(self, tokens: float, rows: float, pairs: float) -> float:
        """FLOPs of a batch.

        Args:
            tokens: real ones.
            rows: how many of them reach the vocabulary head.
            pairs: the sum of squared sequence lengths.
        """
        return self.per_token * tokens + self.per_row * rows + self.per_pair * pairs


class TrainingWork:
    """FLOPs of training a student, with the help of a teacher or without.

    Args:
        teacher: None if no loss needs it.
        head: whether a loss needs the student's logits.
        teachers_head: whether a loss needs the teacher's.
        beside: what is trained beside the student.
        n_applied: how often that is applied to each token.
    """

    def __init__(
        self, student: LanguageModel, teacher: LanguageModel | None, head: bool, teachers_head: bool,
        beside: nn.Module, n_applied: int = 1,
    ) -> None:  # fmt: skip
        self.student = MatrixWork(student, head)
        self.student.per_token += 2 * _matrix_weights(beside) * n_applied
        self.teacher = MatrixWork(teacher, teachers_head) if teacher else None
        self.causal = student.family.causal
        self.of_relations = 0  # for each pair of tokens

    def add_relations(self, s_width: int, t_width: int) -> None:
        """For queries, keys and values of these widths together: a product for the relations of each model, and one for
        the student's gradient."""
        self.of_relations = (2 * 2 * s_width + 2 * t_width) // (2 if self.causal else 1)

    def flops(self, counts) -> float:
        """Of a step: the student's pass forward and back, the teacher's forward.

        Args:
            counts: with the numbers of `tokens`, `rows` and `pairs` (see `MatrixWork.forward`).
        """
        amount = counts.tokens, counts.rows, counts.pairs
        of_teacher = self.teacher.forward(*amount) if self.teacher else 0
        return 3 * self.student.forward(*amount) + of_teacher + self.of_relations * counts.pairs


def _matrix_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | Conv1D))
