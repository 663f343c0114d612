"""The experiments of the iEF paper, reproduced on tasks that run on one processor core. Run by ``make paper``."""
