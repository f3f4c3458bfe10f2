"""What a trained policy is worth, measured against the model it started from.

1. `generate`: answers sampled from a policy.
2. `judges`: which of two answers is better.
3. `evaluate`: all arms side by side; `results`: the numbers, in and out of JSON.
"""
