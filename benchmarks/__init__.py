"""Measurements, not tests: each script runs our side and its baseline in the same run and prints how they compare."""
