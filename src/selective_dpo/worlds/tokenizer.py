"""The world's tokenizer: one token a symbol, each letter with the space before it, as Qwen2's has words.

It has to be a `Qwen2Tokenizer`: beside a Qwen2 model, `AutoTokenizer` makes one out of any tokenizer.json
whatever class it names, and would read a word-level vocabulary wrongly without a word of warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, processors
from transformers import Qwen2Tokenizer

from selective_dpo.worlds.tasks import COLON, EQUALS, LETTERS, OPERATIONS

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
MAX_POSITIONS = 128
_SPACE = "Ġ"
"""How byte-level BPE writes a space."""
_SPACED = (COLON, EQUALS, *LETTERS)

SYMBOL_IDS: Mapping[str, int] = MappingProxyType(
    {symbol: at for at, symbol in enumerate((PAD, BOS, EOS, UNKNOWN, *_SPACED, *OPERATIONS))}
)
"""Token id of each symbol where it stands in a prompt or answer, that is after a space or at the start."""

VOCABULARY_SIZE = len(SYMBOL_IDS) + 1 + len(_SPACED)
"""With the bare space and the bare letters that byte-level merging starts from; no text here uses them."""


def build_tokenizer() -> Qwen2Tokenizer:
    """Encoding puts <bos> in front and nothing behind: "copy : a =" is <bos>, copy, " :", " a", " =".

    An answer brings its own space, " a b": then the tokens of the prompt are a prefix of those of prompt +
    answer, and decoding an answer's tokens gives back its text.
    """
    vocabulary = {
        _SPACE + symbol if symbol in _SPACED else symbol: token_id for symbol, token_id in SYMBOL_IDS.items()
    }
    vocabulary |= {symbol: len(vocabulary) + at for at, symbol in enumerate((_SPACE, *_SPACED))}
    merges: Any = [(_SPACE, symbol) for symbol in _SPACED]  # pairs, though annotated as strings
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
    )
    # As added tokens the operations' names stay whole without merges for their parts.
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in OPERATIONS])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SYMBOL_IDS[BOS])]
    )
    return tokenizer
