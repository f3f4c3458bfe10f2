"""From a run's files to something a person reads. How it fits together:

1. `content` reads a run folder into one typed `ReportContent`; `results` and `training_logs` are its parts.
2. `length` and `narrative` compute what is shown: a correlation with its interval, sentences with numbers.
3. `figures`, in the look of `style`, draws each picture and returns it as inline SVG text.
4. `tables` says the same in plain text, for the terminal.
5. `report` puts all of it through `report.html.j2` into one file that needs no network and runs no script.

Nothing here computes a difficulty, a selection or a win rate: it shows what the stages have published.
"""
