"""Pure functions on arrays: identity, folds, DPO loss, aggregation, agreement, selection, order, win rates.

Nothing here reads a file, trains a model, or imports transformers, trl or datasets (a test proves it).

Shape suffixes used throughout the package:
    P pairs    S seeds    E evaluations    R records    G groups (prompts)    N observations
    B batch    T tokens    V vocabulary
"""
