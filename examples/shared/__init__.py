"""What several experiments need: figures as they are written, and classification tasks that run anywhere."""
