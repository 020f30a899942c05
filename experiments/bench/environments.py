"""The virtual environments of the peers, in .venv/peers, one each; made once, and again when what they hold changes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from jaxbp.run.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv" / "peers"
REQUIREMENTS = ROOT / "experiments" / "peers"

# The arguments of each `pip install`, in order. Files are those of experiments/peers. PyTorch comes first, exactly as
# torch.txt has it, and no later step may bring another: in other forms it is gigabytes.
STEPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "torch": (("-r", "torch.txt"), ("numpy", "safetensors")),
    "opacus": (("-r", "torch.txt"), ("-c", "torch.txt", "-r", "opacus.txt")),
    "backpack": (("-r", "torch.txt"), ("numpy", "packaging"), ("--no-deps", "-r", "backpack.txt")),
    "jax_privacy": (("-r", "jax_privacy.txt"),),
    "optax": (("-r", "optax.txt"),),
}


def make_all(say: Callable[[str], None]) -> dict[str, str]:
    """Peer ↦ its Python.

    Raises:
      UserError: an environment can't be made.
    """
    return {name: make(name, say) for name in STEPS}


def make(name: str, say: Callable[[str], None]) -> str:
    """The Python of one peer; its environment is made if it is not there, or not as experiments/peers has it."""
    folder = FOLDER / name
    stamp, wanted = folder / "installed", _wanted(name)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        say(f"making {folder.relative_to(ROOT)}, once")
        _checked(name, [sys.executable, "-m", "venv", "--clear", str(folder)])
        for step in STEPS[name]:
            _checked(name, [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step])
        stamp.write_text(wanted, encoding="utf-8")  # last, so that an interrupted installation is begun again
    return str(python)


def _wanted(name: str) -> str:
    """All that decides what is installed."""
    files = sorted({word for step in STEPS[name] for word in step if word.endswith(".txt")})
    texts = [(REQUIREMENTS / file).read_text(encoding="utf-8") for file in files]
    return "\n".join([sys.version, repr(STEPS[name]), *texts])


def _checked(name: str, command: list[str]) -> None:
    done = subprocess.run(command, cwd=REQUIREMENTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        reason = [line for line in done.stdout.splitlines() if line.strip()]
        raise UserError(f"--peers: the environment of {name} can't be made: {reason[-1] if reason else command}")
