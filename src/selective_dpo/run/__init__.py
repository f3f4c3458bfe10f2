"""A recipe as a run: its folder, its stages, and the commands as functions.

1. `run`: the commands. `stages`: what each one makes. `keys`: what a result depends on.
   `folder`: where it lies.
2. `plan`, `doctor` and `verify`: before and after a run.
"""
