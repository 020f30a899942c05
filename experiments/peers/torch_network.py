"""The benchmark's network in PyTorch, for the peers that are built on it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from protocol import Case
from torch import nn
from torch_gpt import gpt

THREADS = 2
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu_tanh": lambda: nn.GELU("tanh")}


def network(case: Case) -> nn.Sequential:
    """The layers with σ between them; `parameters()` is w, b, w, b, …"""
    torch.set_num_threads(THREADS)
    sigma = ACTIVATIONS[case.hidden]
    if case.tokens:
        return gpt(case.layers, sigma)
    modules: list[nn.Module] = []
    for w, b in case.layers:
        layer = _convolution(w) if w.ndim == 4 else nn.Linear(w.shape[1], w.shape[0])
        layer.load_state_dict({"weight": torch.from_numpy(w), "bias": torch.from_numpy(b)})
        if w.ndim == 2 and any(isinstance(module, nn.Conv2d) for module in modules[-3:]):
            modules.append(nn.Flatten())
        modules += [layer, sigma(), *([nn.AvgPool2d(2)] if w.ndim == 4 else [])]
    return nn.Sequential(*modules[:-1])


def _convolution(w: np.ndarray) -> nn.Conv2d:
    """One of LeNet-5: the first, of one channel, keeps height and width."""
    return nn.Conv2d(w.shape[1], w.shape[0], w.shape[2:], padding=w.shape[2] // 2 if w.shape[1] == 1 else 0)


def arrays(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and y as the network's outputs are: those of all positions one below the other."""
    x, y = torch.from_numpy(case.x), torch.from_numpy(case.y).long().flatten()
    return x.long() if case.tokens else x, y


def batch_gradient(case: Case) -> Callable[[], list[torch.Tensor]]:
    """Plain PyTorch's gradient of the mean cross-entropy, without any hook."""
    model, loss = network(case), nn.CrossEntropyLoss()
    x, y = arrays(case)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        loss(model(x), y).backward()
        return [p.grad for p in model.parameters()]

    return run


def peak(run: Callable[[], Any]) -> int:
    """The greatest number of bytes that PyTorch allocates in a call beyond the fewest that it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = fewest = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        fewest = min(fewest, level)
        most = max(most, level - fewest)
    return most
