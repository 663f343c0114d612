"""The scripts of `examples/` at small sizes: a smoke test of each in `make test`, the rest in `make test-examples`."""
