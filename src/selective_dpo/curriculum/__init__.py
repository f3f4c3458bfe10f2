"""From held-out records to the pairs that are trained on, and in which order.

1. `records_io` writes and reads the scorers' records, `records_table` reads only their losses, into the table
   that all else is made from; `importing` reads those of the original repository, by `number_files`.
2. `build` turns them into a `Curriculum`, with the pure functions of `core`: `aggregation`, `selection`,
   `order` and `agreement`.
3. `outside` makes one from difficulties that come from elsewhere: a file, another run, or those records.
4. `table` is the curriculum and its two files.
5. `apply` picks and orders the rows of a data set by it; `exporting` writes it for other programs, with the
   `texts` of the selected pairs where they are wanted.
"""
