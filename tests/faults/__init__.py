"""Faults put into real runs: kills, failing file operations, and what must be there afterwards."""
