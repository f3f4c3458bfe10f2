"""The core is pure: importing all of it loads no training or data library."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = ("transformers", "trl", "datasets", "torch", "peft", "accelerate", "pydantic", "pyarrow")

PROGRAM = f"""
import importlib, pkgutil, sys
import selective_dpo.core as core
names = [module.name for module in pkgutil.walk_packages(core.__path__, "selective_dpo.core.")]
for name in names:
    importlib.import_module(name)
loaded = [name for name in {FORBIDDEN!r} if name in sys.modules]
print(len(names), loaded)
"""


def test_core_imports_no_training_library() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    count, loaded = done.stdout.split(maxsplit=1)
    assert int(count) >= 8
    assert loaded.strip() == "[]"
