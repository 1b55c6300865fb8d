"""The training loop: batches in, a trained student out.

A step (one of the optimizer) takes `gradient_accumulation_steps` batches on each process, which go through the models
as micro-batches. The loss is a mean over the tokens of the whole step on all processes, whatever the sizes of its
micro-batches. At the end of an epoch the step is shorter, but still a separate step.

Everything random in a step follows from (seed, epoch, number of the step, rank), so a run that is stopped and resumed
gives the same weights as one that was not.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from evaluation import held_out
from models.flops import peak_flops
from models.language_model import LanguageModel
from models.memory import FreeMemory
from training.batches import MicroBatch, RunData, StepCounts
from training.distributed import World
from training.meter import Meter
from training.objective import Objective, loss_weights
from training.optimization import Optimization
from training.recipe import Recipe
from training.run_folder import RunFolder
from training.stop_signal import StopSignal
from utils import RunError, logger, set_seed

CHECKPOINT_SECONDS = 15 * 60  # between checkpoints, where no interval is given


def usual_evaluations(n_trained: int, n_evaluated: int) -> int:
    """How many evaluations a run has, where no interval is given: 20, or fewer, down to 4, so that they read at most a
    quarter as much text as training does.

    Args:
        n_trained: tokens that the run trains on.
        n_evaluated: tokens of one evaluation.
    """
    return min(20, max(4, n_trained // (4 * n_evaluated)))


class Distiller:
    """Trains `student` on `data`, with the teacher's help if there is one.

    Args:
        recipe: the numbers.
        student: the model to train, on `world.device`.
        teacher: frozen, on `world.device`; None for plain language modeling. If the recipe has no loss that needs it,
            it is only used in evaluation.
        data: the text.
        world: this process among all.
        dtype: torch.float32, or what to compute in under autocast.
        folder: where everything is written; used by the master only. None: nothing is (see `training.dry_run`).
    """

    def __init__(
        self,
        recipe: Recipe,
        student: LanguageModel,
        teacher: LanguageModel | None,
        data: RunData,
        world: World,
        dtype: torch.dtype,
        folder: RunFolder | None,
    ) -> None:
        self.recipe, self.student, self.teacher, self.data = recipe, student, teacher, data
        self.world, self.dtype, self.folder = world, dtype, folder
        self._prepare_models()

        self.batches_per_step = world.size * recipe.gradient_accumulation_steps
        self.steps_per_epoch = math.ceil(len(data.train_sampler) / self.batches_per_step)
        self.n_steps = self.steps_per_epoch * recipe.n_epoch
        self.log_interval = recipe.log_interval or min(500, max(1, self.n_steps // 100))
        self.eval_interval = recipe.eval_interval or self._usual_eval_interval()

        trained = nn.ModuleList([student, self.objective.widening])
        self.optimization = Optimization(trained, recipe, self.n_steps, world, dtype)
        self.meter = Meter(recipe.alphas, self.n_steps, world, self.peak_flops)
        encoder_only = recipe.encoder_only
        self.product = student.encoder if encoder_only else student.model  # what is saved
        self.loss_name = held_out.HIDDEN_LOSS if encoder_only else held_out.LOSS[student.family.causal]
        self.epoch = self.steps_of_epoch = 0  # steps done in this epoch
        self.n_done = 0  # steps done in all
        self.best_loss, self.owes_evaluation = math.inf, False  # held-out
        self.stop, self.must_stop = StopSignal(), False  # a signal to this process, and to any
        self.free_memory = FreeMemory(world.device)

    def _prepare_models(self) -> None:
        recipe, student, teacher = self.recipe, self.student, self.teacher
        for model in filter(None, (student, teacher)):
            if recipe.padding_free:
                model.use_packed_attention()
            if recipe.compile:
                model.compile_layers()
        if teacher:
            teacher.cast_products(self.dtype)
        set_seed(recipe.seed)  # the widening, if there is one, is drawn from this
        self.objective = Objective(recipe, student, teacher, self.world.device, self.dtype)
        self.peak_flops = 1e12 * (recipe.peak_tflops or 0) or peak_flops(self.world.device, self.dtype)

    def _usual_eval_interval(self) -> int:
        if not self.data.held_out:
            return self.n_steps
        n_evaluated = sum(text.batches.dataset.n_tokens for text in self.data.held_out.values())
        n = usual_evaluations(self.recipe.n_epoch * self.data.train_sampler.n_tokens, n_evaluated)
        return max(1, self.n_steps // n)

    # --------------------------------------------------------------------------------------------------------- one step

    def step(self, micro_batches: list[MicroBatch], counts: StepCounts) -> bool:
        """One step of the optimizer, in which nothing waits for the device.

        Args:
            micro_batches: this process's part of the step; may be empty.
            counts: of the whole step, on all processes.

        Returns: False if the step was dropped, because a process must stop and has no time left to finish it.
        """
        set_seed(self.recipe.seed, self.n_done, self.world.rank)  # dropout draws from this
        self.student.train()
        weights = loss_weights(self.recipe.alphas, counts)
        self.objective.begin_step()
        parts = torch.zeros(len(weights), dtype=torch.float64, device=self.world.device)  # of the loss, for the log
        # Autocast keeps the weights it has cast until the outermost of its contexts ends: here, once a step.
        with torch.autocast(self.world.device.type, enabled=False):
            for micro_batch in micro_batches:
                if self.stop.is_pressing:
                    break
                micro_batch = micro_batch.to(self.world.device)
                s, t = self.objective.read_as_student(micro_batch), self.objective.read_as_teacher(micro_batch)
                loss, its_parts = self.objective(s, t, micro_batch, weights)
                self.optimization.backward(loss)
                parts += its_parts
                self.meter.advance(micro_batch.n_sequences)
        is_pressing, self.must_stop = self.world.any(self.stop.is_pressing, self.stop.came)
        if is_pressing:
            self.optimization.forget_gradients()
            return False
        bad = self.optimization.step(parts)
        self.n_done += 1
        self.steps_of_epoch += 1
        self.meter.add(parts, bad, counts.tokens, self.objective.work.flops(counts))
        return True

    # ---------------------------------------------------------------------------------------------------------- the run

    def train(self) -> str | None:
        """Trains to the end, or to the end of the step in which a stop signal came; returns that signal's name."""
        recipe, world = self.recipe, self.world
        more = f"; continuing after step {self.n_done}" if self.n_done else ""
        logger.info(
            "%d steps in %d epochs, %d batches each%s", self.n_steps, recipe.n_epoch, self.batches_per_step, more
        )
        n_sequences = math.ceil(recipe.n_epoch * self.data.train_sampler.n_sequences / world.size)
        self.last_save = time.monotonic()
        with self.stop, self.meter.progress(n_sequences, n_sequences * self.n_done // self.n_steps):
            if self.n_done == 0 or self.owes_evaluation:
                self._evaluate_and_log()
                if self.n_done == self.n_steps:
                    self.save()
            while self.epoch < recipe.n_epoch:
                for micro_batches, counts in self.steps():
                    # Several processes agree on it at the end of a step; one need not wait for that.
                    alone_and_told = world.size == 1 and self.stop.came
                    if self.must_stop or alone_and_told or not self.step(micro_batches, counts):
                        self.save()
                        return self.stop.name or "a signal to another process"
                    self._after_step()
                self.epoch += 1
                self.steps_of_epoch = 0
                if self.epoch == recipe.n_epoch:
                    self._evaluate_and_log()
                self.save(epoch=self.epoch - 1)
        return self.stop.name if self.owes_evaluation else None

    def steps(self) -> Iterator[tuple[list[MicroBatch], StepCounts]]:
        """This process's micro-batches of each step that remains in the epoch, and what all processes have in it.

        The processes tell one another what their next step holds before they take this one, so that none waits for it.
        """
        loaded = self.data.steps(self.recipe, self.world, self.epoch, self.steps_of_epoch)
        told = ((micro_batches, StepCounts.of(micro_batches).over_all(self.world)) for micro_batches in loaded)
        this = next(told, None)
        while this:
            following = next(told, None)
            yield this[0], this[1]()
            this = following

    def _after_step(self) -> None:
        """Logs, evaluates, and saves, each when it is due."""
        self.free_memory.give_back()
        if self.n_done % self.log_interval == 0 or self.n_done == self.n_steps:
            self._log()
        if self.n_done % self.eval_interval == 0 and self.n_done + self.eval_interval <= self.n_steps:
            self._evaluate_and_log()
        if self.steps_of_epoch < self.steps_per_epoch and self._checkpoint_is_due():  # the end of an epoch saves anyway
            self.save()

    def _log(self) -> None:
        self.meter.check_finite(self.n_done, self.recipe.max_bad_steps)
        metrics, line = self.meter.read(self.n_done, self.optimization.lr)
        if self.world.is_master:
            self.folder.log_metrics("train", self.n_done, self.meter.tokens, metrics)
            logger.info("%s", line)

    def evaluate(self) -> dict[str, float] | None:
        """Held-out losses of the student and its agreement with the teacher (see `held_out.evaluate_all`)."""
        models, data = (self.student, self.teacher), self.data.held_out
        if self.recipe.encoder_only:
            return held_out.evaluate_hidden(self.objective, data[""], self.world, lambda: self.stop.is_pressing)
        return held_out.evaluate_all(*models, data, self.world, self.dtype, lambda: self.stop.is_pressing)

    def _evaluate_and_log(self) -> None:
        if not self.data.held_out:
            return
        with self.meter.paused():
            metrics = self.evaluate()
            self.owes_evaluation = metrics is None  # there was no time; the resumed run makes up for it
            if self.owes_evaluation:
                return
            loss = metrics[self.loss_name]
            if loss < self.best_loss and self.world.is_master:
                self._write(lambda: self.folder.save_best(self.product, self.objective.widening.state_dict()))
            self.best_loss = min(loss, self.best_loss)
        if self.world.is_master:
            self.folder.log_metrics("valid", self.n_done, self.meter.tokens, metrics)
            for line in held_out.describe(metrics):
                logger.info("step %d/%d  %s", self.n_done, self.n_steps, line)

    # ------------------------------------------------------------------------------------------------------------ state

    def _checkpoint_is_due(self) -> bool:
        if self.recipe.checkpoint_interval:
            return self.n_done % self.recipe.checkpoint_interval == 0
        # Only the master writes, so the processes need not agree on what its clock says.
        return self.world.is_master and time.monotonic() - self.last_save > CHECKPOINT_SECONDS

    def save(self, epoch: int | None = None) -> None:
        """Writes the model and the state to continue from; with `epoch`, also the weights under that epoch's name."""
        self.meter.check_finite(self.n_done, self.recipe.max_bad_steps)
        if self.world.is_master:
            with self.meter.paused():
                self._write(lambda: self.folder.save(self.product, self.state_dict(), epoch))
        self.last_save = time.monotonic()

    def _write(self, write: Callable[[], None]) -> None:
        """With --on_full_disk continue, a write that fails is left to the next checkpoint, except at the end."""
        try:
            write()
        except RunError as error:
            if self.recipe.on_full_disk == "stop" or self.n_done == self.n_steps or self.stop.came:
                raise
            logger.warning("%s (--on_full_disk continue: trying again at the next checkpoint)", error)

    def state_dict(self) -> dict:
        """Everything that changes during a run, at the boundary of a step."""
        return {
            "student": self.student.model.state_dict(),
            "widening": self.objective.widening.state_dict(),
            "optimization": self.optimization.state_dict(),
            "meter": self.meter.state_dict(),
            "epoch": self.epoch,
            "steps_of_epoch": self.steps_of_epoch,
            "step": self.n_done,
            "best_loss": self.best_loss,
            "owes_evaluation": self.owes_evaluation,
        }

    def load_state_dict(self, state: dict) -> None:
        self.student.model.load_state_dict(state["student"])
        self.objective.widening.load_state_dict(state["widening"])
        self.optimization.load_state_dict(state["optimization"])
        self.meter.load_state_dict(state["meter"])
        self.epoch, self.steps_of_epoch, self.n_done = state["epoch"], state["steps_of_epoch"], state["step"]
        self.best_loss, self.owes_evaluation = state["best_loss"], state["owes_evaluation"]
