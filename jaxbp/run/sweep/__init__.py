"""A [sweep]: the same run for several seeds, learning rates and values of other keys."""
