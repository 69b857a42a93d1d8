"""Training without an optimiser: how parameters are read, and one solve for each of them."""
