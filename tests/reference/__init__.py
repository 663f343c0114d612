"""The independent truth: Fisher matrices by brute force, sharing no code with the package.

``outputs`` says what each kind is in output space, ``fisher`` makes rows and dense matrices with one autograd call per
row, ``kronecker`` makes KFAC and EKFAC, ``models`` is the zoo of model families that all of it runs on.
"""
