"""Programs that use fisherkit: measurements, experiments and demonstrations. Not part of the package."""
