"""What a trained policy is worth, measured against the model it started from.

0. `preflight`: whether what is asked for can be done, before anything is trained.
1. `generation`: each model answers the same held-out prompts (`prompt_tokens` makes their tokens).
2. `judges`, `reward_model`: which of two answers to a prompt is better.
3. `held_out`: loss, accuracy and margin on preference pairs kept apart.
4. `results`, `tables`, `alpaca_eval`: the numbers with their intervals, and the answers behind them.
5. `evaluate`: all of it, for several models, one in memory at a time.
"""
