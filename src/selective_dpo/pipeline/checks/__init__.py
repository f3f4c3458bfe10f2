"""What `doctor` looks at, a function a check; each says `ok`, `warn` or `FAIL`, and what to do.

1. `check` is the form of an answer.
2. `environment`: Python, packages, device, disk. 3. `model`: model, tokenizer, adapters, judge.
4. `data`: sources, template, lengths.
"""
