"""Preference data: rows of any known shape -> pairs -> token ids, each dropped row with its reason.

1. `sources` and `readers` give raw rows; `adapters` make a pair of each, or say why not.
2. `templates` and `tokenize` turn pairs into token ids; `processes` does so on all cores, within limits.
3. `prepare` does all of it for a recipe; `store` is the folder that it publishes.
"""
