"""Merging fine-tuned models by their Fishers, measured."""
