"""The embedded world: a small instruction world whose gold reward is a program. The demo runs on it.

1. `tasks`: what a prompt asks for, the correct answer and the gold reward.
2. `model`: the tokenizer, and a small language model that learns from right and hasty answers.
3. `world`: two answers of the model make a pair, a noisy annotator labels it, a folder holds it all.
4. `recipe`: the settings of a run on a world.

What the method reads (`pairs.jsonl`, the model) never says which pair is hard or labelled wrongly. Only
`truth.parquet` says that, for the evaluation.
"""
