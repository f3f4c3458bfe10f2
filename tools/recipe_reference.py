"""Write what is generated from the recipe's types: docs/recipe.md and recipe.schema.json.

python tools/recipe_reference.py            write both
python tools/recipe_reference.py --check    exit with 1 and name the file if one is not current
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from selective_dpo.config.load import recipe_schema

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "recipe.md"
SCHEMA = ROOT / "src" / "selective_dpo" / "recipe.schema.json"

HEAD = """\
# Recipe keys

Generated from `src/selective_dpo/config/` by `python tools/recipe_reference.py`; change it there.

A recipe is one YAML file. `name`, `model.path` and `data.train` are required, everything else has the
default given here. Unknown keys are errors, and so are options that would have no effect. Flags override
keys, with YAML values: `--select.fraction 0.6`, `--score.seeds '[41, 42]'`, `--data.train.0.split train`.

`score.trainer` and `train.trainer` take TRL's `DPOConfig` keys, `score.lora` and `train.lora` PEFT's
`LoraConfig` keys; those that this package decides are refused with the key to set instead. Their defaults
are the libraries' own, except that `trainer` starts from the original method's `beta: 0.01`,
`num_train_epochs: 1`, `lr_scheduler_type: cosine` and `warmup_steps: 0.1` (a tenth of all steps). Giving
`lora` in a recipe replaces its default as a whole; a flag such as `--score.lora.r 8` changes one setting.

A relative path of a file or model means the one beside the recipe if it exists there, else it is taken as
it is: from the current folder, or a hub name.
"""


def generated() -> dict[Path, str]:
    """Each generated file and what belongs in it."""
    schema = recipe_schema()
    return {DOCS: render(schema), SCHEMA: json.dumps(schema, indent=2) + "\n"}


def render(schema: dict[str, Any]) -> str:
    """The reference of all keys as Markdown: a table a block, in the order of a recipe."""
    blocks = schema["$defs"]
    parts = [HEAD, _section("Top level", schema, schema)]
    order = ["ModelConfig", "DataConfig", "SourceConfig", "ScoreConfig", "SelectConfig", "TrainConfig"]
    order += ["EvaluateConfig", "GenerationConfig", "BenchmarkConfig", "StudyConfig", "LaunchConfig"]
    titles = {
        "SourceConfig": "`data.train`, `data.test`: each entry",
        "SelectConfig": "`select`, and each of `evaluate.controls`",
        "GenerationConfig": "`evaluate.generation`",
        "BenchmarkConfig": "each of `evaluate.benchmarks`",
    }
    for name in [*order, *sorted(set(blocks) - set(order))]:
        title = titles.get(name, f"`{name.removesuffix('Config').lower()}`")
        parts.append(_section(title, blocks[name], schema))
    return "\n".join(parts)


def _section(title: str, block: dict[str, Any], schema: dict[str, Any]) -> str:
    lead = [] if block is schema else [_prose(block.get("description", "")), ""]
    rows = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    required = block.get("required", [])
    for key, field in block["properties"].items():
        default = "required" if key in required else _default(field)
        meaning = _prose(field.get("description", "")).replace("|", "\\|")
        rows.append(f"| `{key}` | {_values(field)} | {default} | {meaning} |")
    return "\n".join([f"## {title}", "", *lead, *rows, ""])


def _values(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_values(option) for option in field["anyOf"])
    if "$ref" in field:
        return "block"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "examples" in field:
        return " or ".join(f"`{example}`" for example in field["examples"])
    if field["type"] == "array":
        entries = field.get("prefixItems", [field.get("items", {})])
        number = f"{field['maxItems']} " if "maxItems" in field else ""
        word, sign, limits = _values(entries[0]).partition(" ≥")
        return f"list of {number}{word}s{sign}{limits}"
    words = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}
    words |= {"null": "null", "object": "mapping"}
    return words[field["type"]] + _limits(field)


def _limits(field: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {field[limit]:.10g}" for limit, sign in signs.items() if limit in field]
    return " " + ", ".join(limits) if limits else ""


def _default(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "its defaults"
    return "empty" if field["default"] == "" else f"`{json.dumps(field['default'])}`"


def _prose(text: str) -> str:
    return " ".join(text.split())


def main(arguments: list[str]) -> int:
    """Write the files, or check them; returns the exit status."""
    stale = []
    for path, content in generated().items():
        if arguments == ["--check"]:
            current = path.read_text("utf-8") if path.exists() else ""
            stale += [path] if current != content else []
        else:
            path.write_text(content, encoding="utf-8")
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)} is not current: run python tools/recipe_reference.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
