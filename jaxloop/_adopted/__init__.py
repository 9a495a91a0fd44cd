"""Training steps that exist already, in Flax's convention, as steps of a loop."""
