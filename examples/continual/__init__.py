"""Elastic weight consolidation measured: every kind of Fisher, in every structure, over twelve decades of strength."""
