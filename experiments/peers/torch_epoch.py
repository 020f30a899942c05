"""A plain PyTorch training loop; prints the seconds of each epoch. Arguments: arrays.npz epochs learning_rate."""

import json
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

arrays = {name: torch.from_numpy(a) for name, a in np.load(sys.argv[1]).items()}
epochs, learning_rate = int(sys.argv[2]), float(sys.argv[3])
x, y = arrays["x_train"], arrays["y_train"].long()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)


def epoch() -> float:
    start = time.perf_counter()
    for rows in torch.randperm(len(x)).split(128):
        optimizer.zero_grad()
        functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return time.perf_counter() - start


seconds = [epoch() for _ in range(epochs + 1)][1:]
with torch.no_grad():
    correct = model(arrays["x_test"]).argmax(dim=1) == arrays["y_test"].long()
print(json.dumps({"seconds": seconds, "test_accuracy": correct.float().mean().item()}))
