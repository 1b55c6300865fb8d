"""The numbers of a run, and what follows from them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What each number means stands in `train.py --help`, and so do the defaults of a command."""

    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_clm: float = 0.0
    alpha_mse: float = 0.0
    alpha_cos: float = 1.0
    temperature: float = 2.0
    restrict_ce_to_mask: bool = False
    n_epoch: int = 3
    gradient_accumulation_steps: int = 50
    tokens_per_pass: int = 0
    learning_rate: float = 5e-4
    warmup_prop: float = 0.05
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-6
    max_grad_norm: float = 5.0
    seed: int = 56
    log_interval: int | None = None
    eval_interval: int | None = None
    checkpoint_interval: int | None = None
    num_workers: int = 0
    peak_tflops: float | None = None
    compile: bool = False

    @property
    def uses_teacher(self) -> bool:
        return self.uses_teacher_logits or self.alpha_cos > 0

    @property
    def uses_teacher_logits(self) -> bool:
        return self.alpha_ce > 0 or self.alpha_mse > 0

    @property
    def head_on_all_tokens(self) -> bool:
        """Whether a loss needs the logits of every attended token, not only of those with a hard label."""
        return self.uses_teacher_logits and not self.restrict_ce_to_mask
