"""Influence of training examples on a model's predictions."""
