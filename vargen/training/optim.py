"""Muon for hidden weights beside AdamW for everything else (Jordan et al., 2024; Liu et al., 2025, arXiv:2502.16982).

One optimizer object holds both, so that a checkpoint has one optimizer state. The orthogonalisation runs in the dtype of
the parameter: on CPUs the usual bfloat16 is slower, not faster.

Letters: m rows and n columns of a weight, k matrices of one shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic of the Muon report: steep at 0, singular values end in about [0.7, 1.2]


def orthogonalize(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Move the singular values of matrices close to 1 by a Newton-Schulz iteration.

    Args:
        matrices: ``[k, m, n]`` float.
        num_steps: iterations.

    Returns:
        ``[k, m, n]``.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """Muon in the groups with ``muon=True``, torch's AdamW in the others.

    Not ``torch.optim.Muon``: it iterates in bfloat16, one matrix at a time, and takes neither kernels nor stacks.

    Args:
        params: parameter groups; a Muon group holds matrices, and kernels, which are matrices of one row per output
            channel. A parameter with attribute ``num_blocks`` is a stack of that many matrices along its rows (a fused
            query-key-value weight) and each is orthogonalised on its own.
        lr: learning rate of groups that bring none.
        momentum: of Muon, Nesterov form.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled, of groups that bring none.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            group.setdefault("momentum", momentum)
            if group.setdefault("muon", False) and any(p.ndim < 2 for p in group["params"]):
                raise ValueError("a Muon group takes matrices and kernels; put biases and norms in an AdamW group")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's own looks for a count of steps in Muon's state too

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(
            list
        )  # shape -> (weight, update) blocks
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - group["momentum"])  # type: ignore[arg-type]
            update = torch.lerp(p.grad, state["momentum"], group["momentum"])  # type: ignore[arg-type]
            blocks = getattr(p, "num_blocks", 1)
            for weight, block in zip(p.flatten(1).chunk(blocks), update.flatten(1).chunk(blocks), strict=True):
                stacks[block.shape[0], block.shape[1]].append((weight, block))
        for (m, n), items in stacks.items():
            updates = orthogonalize(torch.stack([block for _, block in items]))
            step = group["lr"] * max(1.0, m / n) ** 0.5  # equal change of the outputs' size whatever the shape
            for (weight, _), update in zip(items, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=step)


def parameter_groups(
    model: nn.Module, *, optimizer: str, lr: float, muon_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Split trainable parameters.

    Muon takes the matrices of ``layers`` and the kernels of convolutions between the first and the last one; AdamW takes
    embeddings, heads, first and last layers with weight decay, norms and biases without.

    Args:
        model: module whose parameters are trained.
        optimizer: ``"adamw"`` or ``"muon"``.
        lr: of AdamW groups.
        muon_lr: of the Muon group.
        weight_decay: of every weight with two axes or more; norms and biases get none.
    """
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "plain": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if optimizer == "muon" and _is_hidden(name, p):
            if name.endswith("qkv.weight") and p.shape[0] == 3 * p.shape[1]:
                p.num_blocks = 3  # type: ignore[attr-defined]
            groups["muon"].append(p)
        else:
            groups["decay" if p.ndim >= 2 else "plain"].append(p)
    settings = {
        "muon": {"muon": True, "lr": muon_lr, "weight_decay": weight_decay},
        "decay": {"lr": lr, "weight_decay": weight_decay},
        "plain": {"lr": lr, "weight_decay": 0.0},
    }
    return [{"params": params, **settings[kind]} for kind, params in groups.items() if params]


def _is_hidden(name: str, p: Tensor) -> bool:
    if p.ndim == 5:
        return p.shape[0] > 1 and ".fn." in name  # kernels of residual units over space and time
    if p.ndim == 4 and p.shape[0] > 1:  # one row: a table of factors, not a kernel
        return not any(part in ("conv_in", "conv_out", "quant_conv", "post_quant_conv") for part in name.split("."))
    return p.ndim == 2 and ("layers." in name or "blocks." in name)
