"""From held-out records to the pairs that are trained on, and in which order.

1. `records`: what scorers measured, and the table of losses that it makes.
2. `build`: records -> difficulty (`criteria`) -> selection and order (`select`) -> the table (`table`).
3. `agreement` and `stability`: how far seeds agree, and how stable the selected set is.
4. `import_` and `export`: curricula from and for other programs.
"""
