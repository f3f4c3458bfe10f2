"""What `verify` checks, a module a stage. A check adds to a `Check` what it counted and what is wrong.

1. `check`: one check, and comparisons of ids that name some of them.
2. `files`: manifests and digests, and that every result has one.
3. `pairs`: input rows -> kept and dropped -> tokens -> reference.
4. `scores`: each scorer's records -> the pairs that it held out.
5. `curricula`: records -> difficulty, selection, order.
6. `policies`: order -> what was trained on; the keys that all of it was made under.
7. `evaluation`: answers and verdicts -> results.
"""
