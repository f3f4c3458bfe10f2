"""Preference data: rows of any known shape -> pairs -> token ids, each dropped row with its reason.

1. `sources` finds where rows come from; `readers` reads files row by row; `mixture` says which rows are used.
2. `pairs` turns one row into one pair, or into a `DropReason`.
3. `templates` and `tokenize` turn pairs into the token ids that TRL would make.
4. `sorting` judges each row by its content, `finishing` by its tokens, in `workers` where there are many
   rows; so each gets its one status, which `tally` counts.
5. `prepare` runs the whole way; `store` is the folder it publishes.
"""
