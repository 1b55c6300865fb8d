"""The numbers of a run, and what follows from them."""

from dataclasses import dataclass

# Tokens of a step of the original's on one process, 250 sequences of some 117; what its learning rate was made for.
TOKENS_PER_STEP = 29_000
FAR_FEWER = 4  # times
OF_TEACHER = ("ce", "mse", "cos", "relation", "layers", "pooled")  # terms of the loss that need one


@dataclass(frozen=True)
class Recipe:
    """`train.py --help` explains each number. The defaults are DistilBERT's, and are set here only."""

    # loss
    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_clm: float = 0.0
    alpha_mse: float = 0.0
    alpha_cos: float = 1.0
    alpha_relation: float = 0.0
    relation_layer: int | None = None
    relation_heads: int | None = None
    alpha_layers: float = 0.0
    teacher_layers: list[int] | None = None
    alpha_pooled: float = 0.0
    temperature: float = 2.0
    restrict_ce_to_mask: bool = False
    # masking
    mlm_mask_prop: float = 0.15
    word_mask: float = 0.8
    word_keep: float = 0.1
    word_rand: float = 0.1
    mlm_smoothing: float = 0.7
    whole_word_mask: bool = False
    # batches and steps
    n_epoch: int = 3
    data_weights: list[float] | None = None
    source_exponent: float | None = None
    batch_size: int = 5
    tokens_per_batch: int | None = None
    gradient_accumulation_steps: int = 50
    shuffle: bool = True
    group_by_size: bool = True
    # optimization
    learning_rate: float = 5e-4
    warmup_prop: float = 0.05
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    max_grad_norm: float = 5.0
    seed: int = 56
    # machine
    tokens_per_micro_batch: int = 0
    padding_free: bool = False
    num_workers: int = 0
    compile: bool = False
    peak_tflops: float | None = None
    # intervals
    log_interval: int | None = None
    eval_interval: int | None = None
    checkpoint_interval: int | None = None
    keep_checkpoints: int = 2
    # failures
    max_bad_steps: int = 0
    on_full_disk: str = "stop"

    @property
    def alphas(self) -> dict[str, float]:
        """What each term of the loss is multiplied by, without those that are left out."""
        terms = ("ce", "mse", "mlm", "clm", "cos", "relation", "layers", "pooled")
        return {term: alpha for term in terms if (alpha := getattr(self, f"alpha_{term}"))}

    @property
    def uses_teacher(self) -> bool:
        return any(getattr(self, f"alpha_{term}") for term in OF_TEACHER)

    @property
    def uses_teacher_logits(self) -> bool:
        return self.alpha_ce > 0 or self.alpha_mse > 0

    @property
    def uses_logits(self) -> bool:
        """Whether a loss needs the student's."""
        return self.uses_teacher_logits or self.alpha_mlm > 0 or self.alpha_clm > 0

    @property
    def encoder_only(self) -> bool:
        """Whether no loss needs a vocabulary head: then only the encoder is distilled, and nothing is masked."""
        return self.uses_teacher and not self.uses_logits

    @property
    def compares_sequences(self) -> bool:
        """Whether a loss looks at whole sequences, and not only at tokens."""
        return self.alpha_relation > 0 or self.alpha_pooled > 0

    @property
    def head_on_all_tokens(self) -> bool:
        """Whether a loss needs the logits of every attended token, not only of those with a label."""
        return self.uses_teacher_logits and not self.restrict_ce_to_mask
