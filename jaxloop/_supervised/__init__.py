"""Supervised steps: a model, a loss and an optimizer as a step function."""
