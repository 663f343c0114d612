"""A first look, ``make demo``: every kind of Fisher on a small network trained on handwritten digits."""
