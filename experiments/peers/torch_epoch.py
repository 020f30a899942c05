"""A plain PyTorch training loop; with --compile the network goes through torch.compile."""

import itertools
import sys
from collections.abc import Callable

import epochs
import torch
from torch import nn
from torch.nn import functional


def build(case: epochs.Case) -> tuple[Callable[[], None], Callable[[], float]]:
    x, y, x_test, y_test = map(torch.from_numpy, (case.x_train, case.y_train, case.x_test, case.y_test))
    torch.manual_seed(0)
    layers = [layer for n, m in itertools.pairwise(case.sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    model: nn.Module = nn.Sequential(*layers[:-1])
    if "--compile" in sys.argv:
        model = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.learning_rate)

    def epoch() -> None:
        for rows in torch.randperm(len(x)).split(case.batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows].long()).backward()
            optimizer.step()

    @torch.no_grad()
    def test_accuracy() -> float:
        return (model(x_test).argmax(dim=1) == y_test).float().mean().item()

    return epoch, test_accuracy


if __name__ == "__main__":
    epochs.main(build)
