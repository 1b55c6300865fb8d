"""Fine-tuning a pre-trained model on a task, by the Trainer of `transformers`: settings, encoding, prediction."""

import argparse
import functools
import inspect
import tempfile
from dataclasses import dataclass, fields

import numpy as np
import torch
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from grouped_batch_sampler import GROUP_WIDTH
from models.families import DROPOUT, FAMILIES, max_length
from models.loading import load_weights, read_config, some
from utils import InputError, RunError, integer, progress_bar, real

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of models, as far as exports and servers know them


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned. The defaults are among those that BERT's authors searched (Devlin et al., 2019, A.3),
    at the rate that small models need."""

    n_epoch: int = 3
    learning_rate: float = 5e-5
    batch_size: int = 32
    warmup_prop: float = 0.1
    weight_decay: float = 0.01
    dropout: float = 0.1  # whatever the model was trained with

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Settings":
        """Those of `add_settings_flags`."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def add_settings_flags(group) -> None:
    """A flag for each of the Settings, on a group of a parser's flags."""
    add, default = group.add_argument, Settings
    add("--n_epoch", type=integer(1, 1000), default=default.n_epoch, help="epochs (%(default)s)")
    add_optimizer_flags(group)
    add("--batch_size", type=integer(1, 1 << 20), default=default.batch_size, help="examples per batch (%(default)s)")


def add_optimizer_flags(group) -> None:
    """The flags of the optimizer, and of dropout."""
    add, default, rate = group.add_argument, Settings, real(0, 1, low_allowed=False)
    add("--learning_rate", type=rate, default=default.learning_rate, help="peak learning rate (%(default)s)")
    add("--warmup_prop", type=real(0, 1), default=default.warmup_prop, help="share of steps that warm up (%(default)s)")
    add("--weight_decay", type=real(0, 1), default=default.weight_decay, help="weight decay (%(default)s)")
    add("--dropout", type=real(0, 1), default=default.dropout, help="instead of the model's own (%(default)s)")


def load_for(
    auto_class: type, name: str, tokenizer=None, dropout: float | None = None, head_required: bool = False, **options
) -> PreTrainedModel:
    """A model with the head of a task, which starts from random weights unless the folder has one.

    Args:
        auto_class: such as AutoModelForSequenceClassification.
        tokenizer: the model's. One without a padding token, like GPT-2's, pads with its end token.
        dropout: instead of the model's own, in all layers.
        head_required: whether a head of random weights is an error.

    Raises: InputError if it can't be loaded, weights are missing, or it does not know all of the tokens.
    """
    if dropout is not None:
        own = read_config(name)
        options |= dict.fromkeys((key for names in DROPOUT.values() for key in names if hasattr(own, key)), dropout)
    model, missing = load_weights(auto_class, name, "model", **options)
    missing = [key for key in missing if "pooler" not in key]
    if of_body := [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]:
        raise InputError(f"model {name}: weights are missing, {some(of_body)}; the folder is not complete.")
    if missing and head_required:
        raise InputError(f"model {name}: it has no head for this task ({some(missing)} missing); fine-tune it first.")
    if tokenizer is not None:
        if len(tokenizer) > model.config.vocab_size:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, but {name} only "
                f"{model.config.vocab_size}; name its own with --tokenizer_name."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id
    return model


def taken_by(model: torch.nn.Module, features: dict) -> dict:
    """The features that the model's `forward` takes: a DistilBERT takes no token types."""
    names = _parameters(type(model))
    return {name: value for name, value in features.items() if name in names}


@functools.cache
def _parameters(model_class: type) -> set[str]:
    return set(inspect.signature(model_class.forward).parameters)


def longest(model: PreTrainedModel, tokenizer, asked: int) -> int:
    """The most tokens of a text to read: `asked`, or what the model can take if that is less."""
    known = model.config.model_type in FAMILIES
    return min(asked, tokenizer.model_max_length, max_length(model.config) if known else asked)


def encode(tokenizer, model: PreTrainedModel, texts: list[tuple[str, ...]], asked: int) -> list[dict]:
    """One or two texts each, of so many tokens at most -> what the model's `forward` takes."""
    columns = map(list, zip(*texts, strict=True))
    encoded = tokenizer(*columns, truncation=True, max_length=longest(model, tokenizer, asked))
    columns = taken_by(model, encoded)
    return [{name: column[i] for name, column in columns.items()} for i in range(len(texts))]


def encode_batch(
    tokenizer, model: torch.nn.Module, texts: list[tuple[str, ...]], asked: int = 128
) -> dict[str, torch.Tensor]:
    """What `forward` takes of one or two texts each, of so many tokens at most: (bs, seq_length) int64."""
    columns = map(list, zip(*texts, strict=True))
    length = longest(model, tokenizer, asked)
    encoded = tokenizer(*columns, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return taken_by(model, {name: encoded[name] for name in INPUTS if name in encoded})


class OneDevice(TrainingArguments):
    """The Trainer fills all the GPUs it sees, with larger batches: scores would depend on how many there are."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


class FineTuner:
    """Trains one model on a task, and predicts with it.

    Args:
        model: with the head of the task.
        tokenizer: to pad with.
        settings: how.
        seed: of order and dropout. The head's random weights were drawn before.
        dtype: what to train in.
        use_cpu: even if there is a GPU.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer, settings: Settings, seed: int, dtype: torch.dtype, use_cpu: bool
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.seed, self.dtype, self.use_cpu = seed, dtype, use_cpu
        self.options = {
            "seed": seed,
            "use_cpu": use_cpu,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": 2 * settings.batch_size,
            "num_train_epochs": settings.n_epoch,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }

    def train(self, features: list[dict], title: str, trainer_class: type[Trainer] = Trainer, **more) -> None:
        """Features as `encode` makes them, each with its `labels`.

        Args:
            title: what the progress bar says.
            trainer_class: one with another loss, for example; `more` goes to its constructor.

        Raises: RunError if the weights are not finite in the end.
        """
        steps = self.settings.n_epoch * -(-len(features) // self.settings.batch_size)
        warmup_steps = int(self.settings.warmup_prop * steps)
        with tempfile.TemporaryDirectory() as folder, progress_bar(total=steps, desc=title) as bar:
            precision = {"bf16": self.dtype == torch.bfloat16, "fp16": self.dtype == torch.float16}
            of_training = {"warmup_steps": warmup_steps, **precision, **_grouped_by_length()}
            trainer = self._trainer(folder, trainer_class, features, of_training, **more)
            trainer.add_callback(_Progress(bar))
            trainer.train()
        for wrapped in ("forward", "_original_forward"):  # accelerate leaves its autocast around the model's `forward`
            vars(self.model).pop(wrapped, None)
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise RunError(f"{title}: the weights are not finite any more; choose a lower --learning_rate.")

    def predict(self, features: list[dict]) -> np.ndarray | tuple[np.ndarray, ...]:
        """The outputs of the model's head for each of the features, computed in float32.

        Raises: RunError if some are not finite.
        """
        order = np.argsort([-len(feature["input_ids"]) for feature in features], kind="stable")
        with tempfile.TemporaryDirectory() as folder:
            outputs = self._trainer(folder, Trainer, None, {}).predict([features[i] for i in order]).predictions
        back = np.argsort(order)
        outputs = [part[back] for part in (outputs if isinstance(outputs, tuple) else (outputs,))]
        if not all(np.isfinite(part).all() for part in outputs):
            raise RunError(f"{self.model.name_or_path}: some of its predictions are not finite, so it has no score.")
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _trainer(self, folder: str, trainer_class: type[Trainer], features, of_training: dict, **more) -> Trainer:
        trainer = trainer_class(
            model=self.model,
            args=OneDevice(folder, **self.options, **of_training),
            train_dataset=features,
            data_collator=DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=GROUP_WIDTH),
            **more,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


class _Progress(TrainerCallback):
    def __init__(self, bar) -> None:
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(1)


def _grouped_by_length() -> dict:
    """What makes the Trainer put texts of similar length together; older versions call it by another name.

    In prediction it would change the order of the outputs.
    """
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}
