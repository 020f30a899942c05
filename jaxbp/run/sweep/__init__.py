"""A [sweep]: the members of several seeds and learning rates in one compiled program."""
