"""What is kept: the run folder with its lock, the checkpoints, the trained model, and how a file is replaced."""
