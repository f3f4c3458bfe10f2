"""The embedded world: a small instruction world whose gold reward is a program.

1. `tasks` - what a prompt asks for, the correct answer and the gold reward.
2. `tokenizer`; `demonstrations` - right and hasty answers to learn from; `model` - the SFT model.
3. `sampling` - answers of a model; `pairs` - two of them, labelled by a noisy annotator.
4. `build` - all of it as one published folder; `judge` - who wins on the gold reward.

What the method reads (`pairs.jsonl`, the model) never says which pair is hard or labelled wrongly; that
stands only in `truth.parquet`, for the evaluation.
"""
