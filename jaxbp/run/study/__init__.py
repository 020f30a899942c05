"""`jaxbp study` and `jaxbp trace`: per-sample gradients of a whole set, and one sample seen whole."""
