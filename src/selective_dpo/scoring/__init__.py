"""Difficulty scoring by cross-fitting: train on one half, measure the other.

1. `plan` lists the scorers of a protocol and says which pairs each trains on and which it scores.
2. `held_out` measures the other half at evenly spaced steps while TRL trains.
3. `scorer` runs one scorer and publishes its records.
4. `score` runs those that are missing, here or in worker processes, and collects all records.
"""
