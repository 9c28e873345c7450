"""A stand-in for Transformer Engine's `FusedAdam`, which needs a GPU: its arguments, attributes and state."""

import math

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine 2.20.2's steps over float32 parameters, in plain PyTorch."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, bias_correction=True,
        adam_w_mode=True, capturable=False, master_weights=False, exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32, use_decoupled_grad=False, store_param_remainders=False,
    ):  # fmt: skip
        super().__init__(
            params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        )
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.capturable, self.master_weights = capturable, master_weights
        self.exp_avg_dtype, self.exp_avg_sq_dtype = exp_avg_dtype, exp_avg_sq_dtype
        self.use_decoupled_grad, self.store_param_remainders = use_decoupled_grad, store_param_remainders
        # How often its own kernel stepped.
        self.own_steps = 0

    @torch.no_grad()
    def step(self):
        self.own_steps += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta_1, beta_2), decay = group["betas"], group["weight_decay"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if parameter.grad is None:
                    continue
                gradient = parameter.grad if self.adam_w_mode else parameter.grad + decay * parameter
                state["exp_avg"].lerp_(gradient, 1 - beta_1)
                state["exp_avg_sq"].mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
                if self.adam_w_mode:
                    parameter.mul_(1 - group["lr"] * decay)
                # In torch's order: another one rounds some 16-bit copies to the number beside theirs.
                root = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta_2 ** group["step"]) + group["eps"]
                rate = group["lr"] / (1 - beta_1 ** group["step"])
                parameter.addcdiv_(state["exp_avg"], root, value=-rate)


def install(monkeypatch):
    """Let Megatron take it, as where Transformer Engine is installed."""
    for module in (optimizer, distrib_optimizer):
        monkeypatch.setattr(module, "Adam", FusedAdam)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
