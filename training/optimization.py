"""From gradients to new weights: AdamW, its schedule, clipping, float16's scaling, the exchange between processes."""

import math

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from training.distributed import World
from training.recipe import Recipe


class Optimization:
    """Updates the trainable parameters of a model, once a step.

    Args:
        model: on `world.device`.
        recipe: rates, decay and the like.
        n_steps: of the whole run: the rate reaches 0 at its end.
        world: this process among all.
        dtype: what is computed in; with float16 the loss is scaled.

    Attributes:
        parameters: those that are trained.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, n_steps: int, world: World, dtype: torch.dtype) -> None:
        self.world, self.max_grad_norm = world, recipe.max_grad_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe.weight_decay),
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            fused=True,
        )
        warmup = math.ceil(n_steps * recipe.warmup_prop)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, n_steps)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self._gradients = self._in_one_tensor() if world.size > 1 else None

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return self.scheduler.get_last_lr()[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of one micro-batch's loss to those accumulated so far."""
        self.scaler.scale(loss).backward()

    def step(self, parts: torch.Tensor) -> torch.Tensor:
        """Updates the weights, unless the loss or its gradient is not finite, and clears the gradients.

        To ask whether they are finite would wait for the device. Instead the answer stays there, as a flag that the
        fused optimizer reads itself: `found_inf`, which PyTorch made for the scaler of float16.

        Args:
            parts: (n_terms,) what each term adds to the loss of this process; of all processes afterwards.

        Returns: scalar bool tensor, whether the weights were left alone.
        """
        if self.world.size > 1:
            self.exchange(parts)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        bad = ~parts.sum().isfinite()
        if not self.scaler.is_enabled():  # otherwise the scaler looks at the gradients, and lowers its scale
            bad |= ~norm.isfinite()
            self.optimizer.found_inf = bad.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.forget_gradients()
        return bad

    def forget_gradients(self) -> None:
        if self._gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._gradients.zero_()

    def _in_one_tensor(self) -> torch.Tensor:
        """Makes all gradients views of one tensor, to be exchanged at once and without a copy. Backward passes add to
        what a gradient holds, in place, so the views stay; a process that has no batch in a short last step has zeros.
        """
        together = torch.zeros(sum(p.numel() for p in self.parameters), device=self.world.device)
        parts = together.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return together

    def exchange(self, parts: torch.Tensor) -> None:
        """Sums the gradients and `parts` over the processes, in place. No mean: the loss of each process is divided by
        what is in the step of all."""
        self.world.all_reduce(self._gradients)
        self.world.all_reduce(parts)

    def state_dict(self) -> dict:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups; biases and norms never decay. Norms are recognized by the
    name of their class (LayerNorm, RMSNorm of many families)."""
    exempt = {id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters(False)}
    exempt |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]
