"""The benchmark's network in PyTorch, for the peers that are built on it."""

from collections.abc import Callable

import torch
from protocol import Case
from torch import nn

THREADS = 2


def network(case: Case) -> nn.Sequential:
    """The layers with relu between them; `parameters()` is w, b, w, b, …"""
    torch.set_num_threads(THREADS)
    modules: list[nn.Module] = []
    for w, b in case.layers:
        linear = nn.Linear(w.shape[1], w.shape[0])
        linear.load_state_dict({"weight": torch.from_numpy(w), "bias": torch.from_numpy(b)})
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def batch_gradient(case: Case) -> Callable[[], list[torch.Tensor]]:
    """Plain PyTorch's gradient of the mean cross-entropy, without any hook."""
    model, loss = network(case), nn.CrossEntropyLoss()
    x, y = torch.from_numpy(case.x), torch.from_numpy(case.y).long()

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        loss(model(x), y).backward()
        return [p.grad for p in model.parameters()]

    return run
