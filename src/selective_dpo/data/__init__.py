"""Preference data: rows of any known shape -> pairs -> token ids, each dropped row with its reason.

1. `sources` finds where rows come from; `readers` reads files row by row; `mixture` says which rows are used.
2. `pairs` turns one row into one pair, or into a `DropReason`.
3. `templates` and `tokenize` turn pairs into the token ids that TRL would make.
4. `sorting` gives each row its one status; `prepare` runs the whole way; `store` is the folder it publishes.
"""
