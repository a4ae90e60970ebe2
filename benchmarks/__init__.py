"""Measurements. Results lie in benchmarks/results/, with hardware, commit and date."""
