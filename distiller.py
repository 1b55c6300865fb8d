"""The training loop: micro-batches in, a trained student out.

An update (optimizer step) takes one *window*: `gradient_accumulation_steps` micro-batches on each process. The loss is
a mean over the tokens of the whole window on all processes, whatever the sizes of its micro-batches. At the end of an
epoch the window is shorter, and still an update of its own.

Everything random in an update follows from (seed, epoch, number of the update, rank), so a run that is stopped and
resumed gives the same weights as one that was not.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

import evaluation
import losses
from flops import MatrixWork, peak_flops
from grouped_batch_sampler import GroupedBatchSampler
from lm_seqs_dataset import LmSeqsDataset
from memory import peak_memory
from micro_batches import Masking, MicroBatch, MicroBatches, Windows
from models import LanguageModel
from recipe import Recipe
from run_folder import RunFolder
from utils import RunError, StopSignal, World, logger, set_seed
from vocabulary_loss import Projection, Weights, vocabulary_loss

CHECKPOINT_SECONDS = 15 * 60  # between checkpoints, where no interval is given
N_EVALUATIONS = 20  # over a run, where no interval is given


@dataclass(frozen=True)
class Corpus:
    """The text of a run: what to train on, how it is masked (None: a causal model), what to evaluate on."""

    train_set: LmSeqsDataset
    train_sampler: GroupedBatchSampler
    masking: Masking | None
    pad_id: int
    held_out: MicroBatches | None


class Counts(NamedTuple):
    """What is in a window, on all processes together."""

    tokens: float = 0
    rows: float = 0  # that reach the vocabulary head
    labels: float = 0
    pairs: float = 0  # of tokens that attend to one another: the sum of squared lengths
    stops: float = 0  # processes that were told to stop

    @classmethod
    def of(cls, window: list[MicroBatch], stop: bool) -> "Counts":
        return cls(
            sum(len(batch.token_rows) for batch in window),
            sum(len(batch.head_rows) for batch in window),
            sum(len(batch.labels) for batch in window),
            sum(batch.pairs for batch in window),
            stop,
        )


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
        folder: where everything is written; used by the master only. None: nothing is (see `dry_run`).
    """

    def __init__(
        self,
        recipe: Recipe,
        student: LanguageModel,
        teacher: LanguageModel | None,
        corpus: Corpus,
        world: World,
        dtype: torch.dtype,
        folder: RunFolder | None,
    ) -> None:
        self.recipe, self.student, self.teacher, self.corpus = recipe, student, teacher, corpus
        self.world, self.dtype, self.folder = world, dtype, folder
        # In the order of the sums that `step` returns; a model has either masked or next words as hard labels.
        hard = "clm" if student.family.causal else "mlm"
        self.alphas = {
            "ce": recipe.alpha_ce,
            "mse": recipe.alpha_mse,
            hard: recipe.alpha_mlm + recipe.alpha_clm,
            "cos": recipe.alpha_cos,
        }
        if recipe.compile:
            for model in filter(None, (student, teacher)):
                model.hidden = torch.compile(model.hidden, dynamic=True)
        if teacher:
            teacher.cast_products(dtype)
        self.t_projection = Projection.of(teacher.projection, dtype) if recipe.uses_teacher_logits else None
        self.student_work = MatrixWork(student)
        self.teacher_work = MatrixWork(teacher, recipe.uses_teacher_logits) if recipe.uses_teacher else None
        self.peak_flops = 1e12 * recipe.peak_tflops if recipe.peak_tflops else peak_flops(world.device, dtype)

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

    def step(
        self, batch: MicroBatch, weights: list[float], s_projection: Projection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one micro-batch.

        Args:
            weights: what the sums over rows are multiplied by, in the order of these.
            s_projection: the student's, as it is in this update.

        Returns: the weighted loss, a scalar, and (4,) float64 the sums over rows of ce, mse, hard labels and cos.
        """
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32):
            s_hidden = self.student.hidden(batch.input_ids, batch.attention_mask)  # (bs * seq_length, dim)
            s_rows = self.student.transform(s_hidden.index_select(0, batch.head_rows))  # (n_rows, dim)
            t_hidden, t_rows = self._teach(batch) if self.recipe.uses_teacher else (None, None)
        sums = torch.zeros(4, dtype=torch.float64, device=s_hidden.device)
        loss = torch.zeros((), device=s_hidden.device)
        *of_logits, weight_cos = weights
        if any(of_logits):
            loss, sums[:3] = vocabulary_loss(
                s_rows,
                self.student.projection,
                s_projection,
                t_rows,
                self.t_projection,
                batch.labels,
                Weights(*of_logits),
                self.recipe.temperature,
            )
        if weight_cos:
            s_tokens = s_hidden.index_select(0, batch.token_rows)  # (n_tokens, dim); its gradient needs no sorting
            cos = losses.cosine(s_tokens, t_hidden[batch.token_rows])
            loss, sums[3] = loss + weight_cos * cos, cos.detach()
        return loss, sums

    @torch.no_grad()
    def _teach(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        t_hidden = self.teacher.hidden(batch.input_ids, batch.attention_mask)  # (bs * seq_length, dim)
        rows = self.teacher.transform(t_hidden[batch.head_rows]) if self.recipe.uses_teacher_logits else None
        return t_hidden, rows

    def optimize(self, window: list[MicroBatch], counts: Counts) -> None:
        """One update from a window of micro-batches (this process's share of it, which may be empty).

        Args:
            counts: of the whole window, on all processes.
        """
        set_seed(self.recipe.seed, self.update, self.world.rank)  # of dropout
        self.student.train()
        n = [max(count, 1) for count in (counts.rows, counts.rows, counts.labels, counts.tokens)]
        weights = [alpha / n for alpha, n in zip(self.alphas.values(), n, strict=True)]
        s_projection = Projection.of(self.student.projection, self.dtype)
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for batch in window:
            loss, batch_sums = self.step(batch.to(self.world.device), weights, s_projection)
            self.scaler.scale(loss).backward()
            sums += batch_sums
            self.progress.update(len(batch.input_ids))
        self._reduce_gradients(sums)

        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
        bad = ~sums.sum().isfinite()
        if not self.scaler.is_enabled():  # else the scaler looks at the gradients, and lowers its scale
            bad |= ~norm.isfinite()
            self.optimizer.found_inf = bad.float()  # makes the fused optimizer leave the weights alone
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.update += 1
        self.updates_of_epoch += 1
        self.interval["terms"] += torch.stack([total / n for total, n in zip(sums, n, strict=True)])
        self.interval["bad"] += bad
        self.interval["tokens"] += counts.tokens
        self.interval["flops"] += self.flops(counts)
        self.interval["updates"] += 1

    def try_pass(self, batch: MicroBatch) -> None:
        """Forward and backward through a micro-batch, for what it costs."""
        loss, _ = self.step(batch, [alpha / len(batch.token_rows) for alpha in self.alphas.values()],
                            Projection.of(self.student.projection, self.dtype))  # fmt: skip
        self.scaler.scale(loss).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self, counts: Counts) -> float:
        """Matrix work of a window, for all processes together."""
        flops = 3 * self.student_work.forward(counts.tokens, counts.rows, counts.pairs)
        if self.teacher_work:
            flops += self.teacher_work.forward(counts.tokens, counts.rows, counts.pairs)
        return flops

    def count(self, window: list[MicroBatch], stop: bool) -> Counts:
        """Counts of the window on all processes. Exchanged between the processors, so no device is waited for."""
        counts = torch.tensor(Counts.of(window, stop), dtype=torch.float64)
        self.world.all_reduce(counts)
        return Counts(*counts.tolist())

    def _reduce_gradients(self, sums: torch.Tensor) -> None:
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
        self.world.all_reduce(sums)

    def _check_finite(self) -> None:
        """Whether the updates since the last log line went well; asked there and before a save, not in every update,
        since the answer has to be waited for."""
        n_bad = int(self.interval["bad"].item())
        if n_bad:
            raise RunError(
                f"the loss or its gradient was not finite in {n_bad} of the last {self.interval['updates']} updates, "
                f"up to {self.update} of {self.n_updates}; the last checkpoint is kept. A lower --learning_rate or a "
                f"longer --warmup_prop usually helps, and so does --bf16 in place of --fp16."
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
        total = math.ceil(recipe.n_epoch * len(self.corpus.train_set) / self.world.size)
        self.progress = tqdm(
            total=total,
            initial=total * self.update // self.n_updates,
            unit="seq",
            dynamic_ncols=True,
            disable=None if self.world.is_master else True,  # None: only on a terminal
        )
        last_save = time.monotonic()
        with StopSignal() as stop, self.progress:
            if self.update == 0:
                self._evaluate_and_log()
            while self.epoch < recipe.n_epoch:
                self.corpus.train_sampler.set_epoch(self.epoch)
                for window in self.windows():
                    counts = self.count(window, stop.name is not None)
                    if counts.stops:
                        self.save()
                        return stop.name or "a signal to another process"
                    self.optimize(window, counts)
                    if self.update % self.log_interval == 0 or self.update == self.n_updates:
                        self._log_interval()
                    if self.update % self.eval_interval == 0 and self.update + self.eval_interval <= self.n_updates:
                        self._evaluate_and_log()
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

    def windows(self) -> Iterator[list[MicroBatch]]:
        """This process's share of the rest of the epoch, a window at a time."""
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
        steps = recipe.gradient_accumulation_steps
        starts = range(0, steps * (self.updates_per_epoch - self.updates_of_epoch), steps)
        workers = recipe.num_workers
        return iter(
            DataLoader(
                Windows(micro_batches, recipe.tokens_per_pass),
                batch_size=None,
                sampler=[mine[start : start + steps] for start in starts],
                num_workers=workers,
                pin_memory=world.device.type == "cuda",
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares the index
                generator=torch.Generator(),  # else it would draw from the one that dropout uses
            )
        )

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
            "terms": torch.zeros(len(self.alphas), dtype=torch.float64, device=device),  # means, summed over updates
            "bad": torch.zeros((), device=device),  # updates left out, since they were not finite
            "tokens": 0,
            "flops": 0.0,
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
        self._check_finite()
        interval, updates = self.interval, self.interval["updates"]
        means = dict(zip(self.alphas, (interval["terms"] / updates).tolist(), strict=True))
        seconds = interval["seconds"] + time.monotonic() - self._interval_start  # after the wait for the device
        means = {term: mean for term, mean in means.items() if self.alphas[term]}
        self.tokens += int(interval["tokens"])
        flops = interval["flops"] / seconds / self.world.size
        metrics = {"loss": sum(self.alphas[term] * mean for term, mean in means.items())}
        metrics |= {f"loss_{term}": mean for term, mean in means.items()}
        metrics |= {"lr": self.scheduler.get_last_lr()[0], "tokens_per_second": interval["tokens"] / seconds}
        metrics |= {"tflops": flops / 1e12, "mfu": flops / self.peak_flops if self.peak_flops else None}
        metrics |= {"peak_memory_gib": peak_memory(self.world.device) / 2**30}
        if self.world.is_master:
            self.folder.log_metrics("train", self.update, self.tokens, metrics)
            logger.info(
                "update %d/%d (%.1f %%)  loss %.4f  %s  lr %.2e  %s tokens/s  MFU %s  peak %.1f GiB  %s left",
                self.update,
                self.n_updates,
                100 * self.update / self.n_updates,
                metrics["loss"],
                "  ".join(f"{term} {mean:.4f}" for term, mean in means.items()),
                metrics["lr"],
                f"{metrics['tokens_per_second']:,.0f}",
                f"{metrics['mfu']:.1%}" if self.peak_flops else "unknown",
                metrics["peak_memory_gib"],
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
        self._check_finite()
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups; biases and layer norms, told by their type, never decay."""
    exempt = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    exempt |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
