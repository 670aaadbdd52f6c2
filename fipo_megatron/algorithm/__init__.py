"""FIPO itself: advantages, influence weights, the loss and its metrics. Pure functions of tensors."""
