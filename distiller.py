"""The training loop: micro-batches in, a trained student out.

An update (optimizer step) takes one *window*: `gradient_accumulation_steps` micro-batches on each process. The loss is
a mean over the tokens of the whole window on all processes, whatever the sizes of its micro-batches. At the end of an
epoch the window is shorter, and still an update of its own.

Everything random in an update follows from (seed, epoch, number of the update, rank), so a run that is stopped and
resumed gives the same weights as one that was not.
"""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

import evaluation
import losses
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset
from micro_batches import Masking, MicroBatch, MicroBatches
from models import LanguageModel
from run_folder import RunFolder
from utils import RunError, StopSignal, World, logger, set_seed

CHECKPOINT_SECONDS = 15 * 60  # between checkpoints, where no interval is given
N_EVALUATIONS = 20  # over a run, where no interval is given


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run. What each means stands in `train.py --help`."""

    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_clm: float = 0.0
    alpha_mse: float = 0.0
    alpha_cos: float = 1.0
    temperature: float = 2.0
    restrict_ce_to_mask: bool = False
    n_epoch: int = 3
    gradient_accumulation_steps: int = 50
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

    @property
    def uses_teacher(self) -> bool:
        return self.alpha_ce > 0 or self.alpha_mse > 0 or self.alpha_cos > 0

    @property
    def head_on_all_tokens(self) -> bool:
        """Whether a loss needs the logits of every attended token, not only of those with a hard label."""
        return (self.alpha_ce > 0 or self.alpha_mse > 0) and not self.restrict_ce_to_mask


@dataclass(frozen=True)
class Corpus:
    """The text of a run: what to train on, how it is masked (None: a causal model), what to evaluate on."""

    train_set: LmSeqsDataset
    train_sampler: GroupedBatchSampler
    masking: Masking | None
    pad_id: int
    held_out: MicroBatches | None


class Distiller:
    """Trains `student` on `corpus`, with the teacher's help if there is one.

    Args:
        recipe: the numbers.
        student: the model to train, on `world.device`.
        teacher: frozen, on `world.device`; None for plain language modelling. If the recipe has no loss that needs it,
            it is only used in evaluation.
        corpus: the text.
        world: this process among all.
        dtype: torch.float32, or what to compute in under autocast.
        folder: where everything is written; used by the master only.
    """

    def __init__(
        self,
        recipe: Recipe,
        student: LanguageModel,
        teacher: LanguageModel | None,
        corpus: Corpus,
        world: World,
        dtype: torch.dtype,
        folder: RunFolder,
    ) -> None:
        self.recipe, self.student, self.teacher, self.corpus = recipe, student, teacher, corpus
        self.world, self.dtype, self.folder = world, dtype, folder
        self.alphas = {
            "ce": recipe.alpha_ce,
            "mlm": recipe.alpha_mlm,
            "clm": recipe.alpha_clm,
            "mse": recipe.alpha_mse,
            "cos": recipe.alpha_cos,
        }
        self.alphas = {term: alpha for term, alpha in self.alphas.items() if alpha > 0}

        n_micro_batches = len(corpus.train_sampler)
        self.micro_batches_per_update = world.size * recipe.gradient_accumulation_steps
        self.updates_per_epoch = math.ceil(n_micro_batches / self.micro_batches_per_update)
        self.n_updates = self.updates_per_epoch * recipe.n_epoch
        self.log_interval = recipe.log_interval or min(500, max(1, self.n_updates // 100))
        self.eval_interval = recipe.eval_interval or max(1, self.n_updates // N_EVALUATIONS)

        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(student, recipe.weight_decay),
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            eps=recipe.adam_epsilon,
            fused=True,
        )
        warmup = math.ceil(self.n_updates * recipe.warmup_prop)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, self.n_updates)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)

        self.epoch = 0
        self.updates_of_epoch = 0  # done in this epoch
        self.update = 0  # done in all
        self.tokens = 0  # student's tokens trained on, over all processes
        self._start_interval()

    # ------------------------------------------------------------------------------------------------------- one update

    def step(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """The loss terms of one micro-batch: scalars, each a sum over its rows (see `losses`)."""
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32):
            s_hidden = self.student.hidden(batch.input_ids, batch.attention_mask)  # (bs * seq_length, dim)
            s_logits = self.student.logits(s_hidden[batch.head_rows])  # (n_rows, voc_size)
            if self.recipe.uses_teacher:
                t_hidden, t_logits = self._teach(batch)

        terms = {}
        if "ce" in self.alphas:
            terms["ce"] = losses.distillation(s_logits, t_logits, self.recipe.temperature)
        if "mse" in self.alphas:
            terms["mse"] = losses.squared_error(s_logits, t_logits)
        for term in ("mlm", "clm"):
            if term in self.alphas:
                terms[term] = losses.hard_labels(s_logits[batch.labelled], batch.labels)
        if "cos" in self.alphas:
            terms["cos"] = losses.cosine(s_hidden[batch.token_rows], t_hidden[batch.token_rows])
        return terms

    @torch.no_grad()
    def _teach(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        t_hidden = self.teacher.hidden(batch.input_ids, batch.attention_mask)  # (bs * seq_length, dim)
        needs_logits = "ce" in self.alphas or "mse" in self.alphas
        return t_hidden, self.teacher.logits(t_hidden[batch.head_rows]) if needs_logits else None

    def optimize(self, window: list[MicroBatch]) -> None:
        """One update from a window of micro-batches (this process's share of it, which may be empty)."""
        set_seed(self.recipe.seed, self.update, self.world.rank)  # of dropout
        self.student.train()
        counts = self._count_rows(window)
        weights = {term: alpha / counts[ROWS_OF[term]] for term, alpha in self.alphas.items()}
        means = torch.zeros(len(self.alphas), dtype=torch.float64, device=self.world.device)
        for batch in window:
            terms = self.step(batch.to(self.world.device))
            terms = torch.stack([weights[term] * terms[term] for term in self.alphas])
            self.scaler.scale(terms.sum()).backward()
            means += terms.detach()
            self.progress.update()
        self._reduce_gradients(means)

        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
        # The scaler skips an update whose float16 gradients overflowed, and lowers its scale.
        self._check_finite(means.sum() if self.scaler.is_enabled() else means.sum() + norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.update += 1
        self.updates_of_epoch += 1
        self.interval["terms"] += means
        self.interval["tokens"] += counts["token_rows"].long()
        self.interval["updates"] += 1

    def _count_rows(self, window: list[MicroBatch]) -> dict[str, torch.Tensor]:
        """Rows that each term's mean is taken over, in the whole window on all processes."""
        n = [sum(len(getattr(batch, name)) for batch in window) for name in COUNTED]
        counts = torch.tensor(n, dtype=torch.float64, device=self.world.device)
        self.world.all_reduce(counts)
        return dict(zip(COUNTED, counts.clamp(min=1), strict=True))

    def _reduce_gradients(self, means: torch.Tensor) -> None:
        """The one exchange of an update. A sum, not a mean: each gradient is already weighted by the whole window."""
        if self.world.size == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:  # this process had no micro-batch in a short last window
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        self.world.all_reduce(flat)
        for parameter, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad.copy_(grad.view_as(parameter))
        self.world.all_reduce(means)

    def _check_finite(self, value: torch.Tensor) -> None:
        if not math.isfinite(value.item()):
            raise RunError(
                f"the loss or its gradient is not finite at update {self.update + 1} of {self.n_updates}; the last "
                f"checkpoint is kept. A lower --learning_rate or a longer --warmup_prop usually helps, and so does "
                f"--bf16 in place of --fp16."
            )

    # ---------------------------------------------------------------------------------------------------- the whole run

    def train(self) -> str | None:
        """Runs to the end, or to the end of the update in which a stop signal came; returns that signal's name."""
        recipe = self.recipe
        logger.info(
            "%d updates in %d epochs, %d micro-batches an update%s",
            self.n_updates,
            recipe.n_epoch,
            self.micro_batches_per_update,
            f"; going on from update {self.update}" if self.update else "",
        )
        done = self.epoch * len(self.corpus.train_sampler) + self.updates_of_epoch * self.micro_batches_per_update
        total = recipe.n_epoch * len(self.corpus.train_sampler)
        self.progress = tqdm(
            total=math.ceil(total / self.world.size),
            initial=done // self.world.size,
            unit="batch",
            dynamic_ncols=True,
            disable=None if self.world.is_master else True,  # None: only on a terminal
        )
        last_save = time.monotonic()
        with StopSignal() as stop, self.progress:
            if self.update == 0:
                self._evaluate_and_log()
            while self.epoch < recipe.n_epoch:
                self.corpus.train_sampler.set_epoch(self.epoch)
                for window in self._windows():
                    self.optimize(window)
                    if self.update % self.log_interval == 0 or self.update == self.n_updates:
                        self._log_interval()
                    if self.update % self.eval_interval == 0 and self.update + self.eval_interval <= self.n_updates:
                        self._evaluate_and_log()
                    if self._on_any_process(stop.name is not None) and self.update < self.n_updates:
                        self.save()
                        return stop.name or "a signal to another process"
                    if self._checkpoint_is_due(last_save):
                        self.save()
                        last_save = time.monotonic()
                self.epoch += 1
                self.updates_of_epoch = 0
                if self.epoch == recipe.n_epoch:
                    self._evaluate_and_log()
                self.save(epoch=self.epoch - 1)
                last_save = time.monotonic()
        return None

    def _on_any_process(self, flag: bool) -> bool:
        """The processes must leave the loop at the same update."""
        if self.world.size == 1:
            return flag
        n = torch.tensor(float(flag), device=self.world.device)
        self.world.all_reduce(n)
        return n.item() > 0

    def _windows(self) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of the rest of the epoch, a window at a time."""
        world, corpus, recipe = self.world, self.corpus, self.recipe
        first = self.updates_of_epoch * self.micro_batches_per_update
        mine = corpus.train_sampler.share_of_rank(world.rank, world.size, first)
        micro_batches = MicroBatches(
            corpus.train_set,
            corpus.train_sampler,
            (recipe.seed, self.epoch),
            corpus.masking,
            corpus.pad_id,
            recipe.head_on_all_tokens,
        )
        workers = recipe.num_workers
        loader = DataLoader(
            micro_batches,
            batch_size=None,
            sampler=mine,
            num_workers=workers,
            pin_memory=world.device.type == "cuda",
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares the index
            generator=torch.Generator(),  # else it would draw from the one that dropout uses
            prefetch_factor=max(2, recipe.gradient_accumulation_steps // workers) if workers else None,
        )
        batches = iter(loader)
        for _ in range(self.updates_per_epoch - self.updates_of_epoch):
            yield list(itertools.islice(batches, self.recipe.gradient_accumulation_steps))

    # -------------------------------------------------------------------------------------------------------- measuring

    def evaluate(self) -> dict[str, float]:
        """Held-out losses of the student and its agreement with the teacher (see `evaluation.evaluate`)."""
        return evaluation.evaluate(self.student, self.teacher, self.corpus.held_out, self.world, self.dtype)

    def _evaluate_and_log(self) -> None:
        if self.corpus.held_out is None:
            return
        with self._clock_stopped():
            metrics = self.evaluate()
        if self.world.is_master:
            self.folder.log_metrics("valid", self.update, self.tokens, metrics)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            logger.info("update %d/%d  held-out  %s", self.update, self.n_updates, shown)

    def _start_interval(self) -> None:
        device = self.world.device
        self.interval = {
            "terms": torch.zeros(len(self.alphas), dtype=torch.float64, device=device),  # weighted means, summed
            "tokens": torch.zeros((), dtype=torch.int64, device=device),
            "updates": 0,
            "seconds": 0.0,  # of earlier processes of this run
        }
        self._interval_start = time.monotonic()

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """For what isn't training, so that tokens/s is the training's."""
        start = time.monotonic()
        yield
        self._interval_start += time.monotonic() - start

    def _log_interval(self) -> None:
        """Means over the updates since the last time; `optimize` has already summed them over all processes."""
        interval = self.interval
        updates, tokens = interval["updates"], interval["tokens"].item()
        seconds = interval["seconds"] + time.monotonic() - self._interval_start
        terms = dict(zip(self.alphas, (interval["terms"] / updates).tolist(), strict=True))
        self.tokens += tokens
        metrics = {"loss": sum(terms.values())}
        metrics |= {f"loss_{term}": value / self.alphas[term] for term, value in terms.items()}
        metrics |= {"lr": self.scheduler.get_last_lr()[0], "tokens_per_second": tokens / seconds}
        if self.world.is_master:
            self.folder.log_metrics("train", self.update, self.tokens, metrics)
            logger.info(
                "update %d/%d (%.1f %%)  loss %.4f  %s  lr %.2e  %s tokens/s  %s left",
                self.update,
                self.n_updates,
                100 * self.update / self.n_updates,
                metrics["loss"],
                "  ".join(f"{term} {metrics[f'loss_{term}']:.4f}" for term in self.alphas),
                metrics["lr"],
                f"{metrics['tokens_per_second']:,.0f}",
                tqdm.format_interval((self.n_updates - self.update) * seconds / updates),
            )
        self._start_interval()

    # ------------------------------------------------------------------------------------------------------------ state

    def _checkpoint_is_due(self, last_save: float) -> bool:
        if self.updates_of_epoch == self.updates_per_epoch:
            return False  # the end of the epoch saves
        if self.recipe.checkpoint_interval:
            return self.update % self.recipe.checkpoint_interval == 0
        # Only the master writes, so the processes need not agree on what its clock says.
        return self.world.is_master and time.monotonic() - last_save > CHECKPOINT_SECONDS

    def save(self, epoch: int | None = None) -> None:
        """Writes the model and the state to go on from; with `epoch`, also the weights under that epoch's name."""
        if self.world.is_master:
            with self._clock_stopped():
                self.folder.save(self.student.model, self.state_dict(), epoch)

    def state_dict(self) -> dict:
        """All that changes during a run, at the boundary of an update."""
        return {
            "student": self.student.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "updates_of_epoch": self.updates_of_epoch,
            "update": self.update,
            "tokens": self.tokens,
            "interval": {
                **self.interval,
                "seconds": self.interval["seconds"] + time.monotonic() - self._interval_start,
            },
        }

    def load_state_dict(self, state: dict) -> None:
        self.student.model.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.updates_of_epoch = state["epoch"], state["updates_of_epoch"]
        self.update, self.tokens = state["update"], state["tokens"]
        device = self.world.device
        self.interval = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in state["interval"].items()}
        self._interval_start = time.monotonic()


# Which rows a term's mean is taken over; the names are fields of MicroBatch.
COUNTED = ("token_rows", "head_rows", "labels")
ROWS_OF = {"ce": "head_rows", "mse": "head_rows", "mlm": "labels", "clm": "labels", "cos": "token_rows"}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups; biases and layer norms, told by their type, never decay."""
    exempt = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    exempt |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
