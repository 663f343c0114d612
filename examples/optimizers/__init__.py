"""Optimizers of fisherkit against what people use, with nothing tuned but the learning rate."""
