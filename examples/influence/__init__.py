"""How well influence scores predict what retraining shows, for every kind and structure.

``python -m examples.influence`` retrains (going on where it stopped), scores, and prints tables.
"""
