"""Wu, Yu, Zhang and Woodland's paper on the improved empirical Fisher, measured anew. Run by ``make paper``."""
