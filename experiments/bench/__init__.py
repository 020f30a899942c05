"""`python -m experiments.bench`: jaxbp measured against what one would use instead, a module for each group of rows."""
