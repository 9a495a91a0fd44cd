"""The compiled program: a step and its metrics as one block of iterations."""
