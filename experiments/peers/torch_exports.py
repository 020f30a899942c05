"""The networks of a folder in PyTorch: NAME.safetensors in the nn.Sequential of NAME.code, applied to NAME.x.npy.

It writes NAME.output.npy, and NAME.back.safetensors, its own state_dict.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

for code in sorted(Path(sys.argv[1]).glob("*.code")):
    model = eval(code.read_text(encoding="utf-8"), {"nn": nn})
    model.load_state_dict(load_file(code.with_suffix(".safetensors")))
    with torch.no_grad():
        np.save(code.with_suffix(".output.npy"), model(torch.from_numpy(np.load(code.with_suffix(".x.npy")))).numpy())
    save_file(model.state_dict(), code.with_suffix(".back.safetensors"))
print(torch.__version__)
