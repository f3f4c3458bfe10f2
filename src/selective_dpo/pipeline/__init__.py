"""A recipe as a run: its folder, its stages, and the verbs that the command line offers.

1. `run_directory`: where everything of a run lies; refuses a recipe that changed.
2. `stages`: pairs -> reference -> scores -> curriculum -> policies -> evaluation -> report; each is
   skipped when a complete folder made from the same inputs is there.
3. `verbs`: the stages as plain functions; `demo` is the whole method on the embedded world.
4. `plan` (with `planning`) and `doctor` (with `checks`) look before anything is spent; `inspect` shows pairs
   of a curriculum.
5. `lock`: who may work on a run at the same time; `verify` (with `verification`) checks one from input rows
   to results.
"""
