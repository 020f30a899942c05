"""Where it runs: the other processes, signals, memory."""
