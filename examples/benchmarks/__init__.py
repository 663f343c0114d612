"""The benchmark suite: fisherkit against its peers, in multiples of one gradient. Run by ``make bench``."""
