"""Predictions for whole data sets."""
