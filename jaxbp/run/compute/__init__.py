"""What is computed: a step, an epoch of steps, and the program of one device or of a mesh that runs them."""
