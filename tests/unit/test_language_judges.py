"""Judges that are language models: what is read of a reply, and a server that does what servers do."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from selective_dpo.config import EvaluateConfig
from selective_dpo.errors import ConfigError, ModelError
from selective_dpo.evaluation.judges import judge_for
from selective_dpo.evaluation.language_judges import (
    EndpointJudge,
    LanguageModelJudge,
    LocalModelJudge,
    label_probability,
    parse_label,
)
from tests.fixtures.models import tiny_model_folder

LABELS = ("A", "B")
GENERATION = {"prompts": 2, "samples": 1}
Reply = Callable[[str, int], tuple[int, dict[str, Any] | None]]


@pytest.mark.parametrize(
    ("text", "found"),
    [("A", 1.0), (" B.", 0.0), ("The better one is A!", 1.0), ("A or B", None), ("", None), ("Apple", None)],
)
def test_the_label_in_a_reply(text: str, found: float | None) -> None:
    assert parse_label(text, LABELS) == found


def test_the_probability_of_the_first_label() -> None:
    # exp(-1) / (exp(-1) + exp(-2)) = 1 / (1 + exp(-1))
    assert label_probability(-1.0, -2.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert label_probability(-1.0, None) == 1.0 and label_probability(None, -1.0) == 0.0
    assert label_probability(None, None) is None


class Longer(LanguageModelJudge):
    """Prefers the longer answer, and the first place a little; unsure answers are unparsed."""

    def fingerprint(self) -> str:
        return "longer"

    def ask(self, questions: Any) -> list[float | None]:
        found: list[float | None] = []
        for question in questions:
            first = question.split("[Answer A]\n")[1].split("\n")[0]
            second = question.split("[Answer B]\n")[1].split("\n")[0]
            unparsed = "?" in first
            found.append(None if unparsed else 0.9 if len(first) > len(second) else 0.3)
        return found


def judge(options: dict[str, Any] | None = None) -> Longer:
    config = EvaluateConfig(
        judge="local-model", generation=GENERATION, language_judge={"model": "m", **(options or {})}
    )
    assert config.language_judge is not None
    return Longer("longer", config.language_judge)


def test_both_orders_are_asked_and_their_mean_counts() -> None:
    found = judge()
    # a is longer: first 0.9; in the other order the shorter one is first, 0.3, so 0.7 for a: 0.8 in the mean.
    assert found.compare(["p"] * 3, ["long", "b", "same"], ["a", "long", "same"]).tolist() == pytest.approx(
        [0.8, 0.2, 0.5]
    )
    bias = found.bias
    # Four questions: equal answers are not asked about. The first place has (0.9 + 0.3) / 2.
    assert (bias.questions, bias.unparsed) == (4, 0)
    assert bias.first_preferred == pytest.approx(0.6)
    assert bias.consistent == 1.0
    assert "4 questions, 0 unparsed" in found.notes()[0]


def test_an_unparsed_reply_is_no_tie() -> None:
    answers = [f"answer {number}" for number in range(200)]
    # One of 400 questions is unparsed, where "q?" stands first: the other order, 0.9 for the longer, decides.
    found = judge()
    scores = found.compare(["p"] * 201, ["q?", *answers], ["longer", *["x"] * 200])
    assert scores[0] == pytest.approx(0.1)
    assert found.bias.unparsed == 1
    with pytest.raises(ModelError, match="named neither label in 1 of 2 questions"):
        judge().compare(["p"], ["q?"], ["longer"])


def test_braces_in_a_text_are_no_places_to_fill(tmp_path: Path) -> None:
    template = tmp_path / "template.txt"
    template.write_text("[Answer A]\n{answer_a}\n[Answer B]\n{answer_b}\n{prompt}", "utf-8")
    found = judge({"template": str(template)})
    assert found._question("{answer_a}", "x {prompt}", "y").endswith("[Answer B]\ny\n{answer_a}")
    template.write_text("{prompt}", "utf-8")
    with pytest.raises(ConfigError, match=r"no \{answer_a\} and no \{answer_b\}"):
        judge({"template": str(template)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"judge": "endpoint"}, "go together with language_judge"),
        (
            {"judge": "reward-model", "reward_model": "m", "language_judge": {"model": "m"}},
            "go together with",
        ),
        ({"judge": "endpoint", "language_judge": {"model": "m"}}, "base_url go together"),
        ({"judge": "local-model", "language_judge": {"model": "m", "base_url": "http://x"}}, "go together"),
        ({"judge": "local-model", "language_judge": {"model": "m", "threads": 2}}, "threads has no effect"),
        (
            {"judge": "endpoint", "language_judge": {"model": "m", "base_url": "http://x", "max_cost": 1}},
            "needs a price",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig.model_validate({"generation": GENERATION, **given})


# --- a server -----------------------------------------------------------------------------------------------


class Server:
    """Answers chat completions as `reply` says; counts what it was asked."""

    def __init__(self) -> None:
        self.reply: Reply = lambda question, number: (200, said("A"))
        self.questions: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert (asked["temperature"], asked["model"]) == (0.0, "judge")
                server.questions.append(asked["messages"][0]["content"])
                status, content = server.reply(server.questions[-1], len(server.questions))
                if content is None:
                    self.connection.close()
                    return
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("retry-after-ms", "1")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def said(text: str, logprobs: dict[str, float] | None = None) -> dict[str, Any]:
    """A chat completion; `logprobs` of the first token's candidates."""
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in (logprobs or {}).items()]
    content = [{**top[0], "top_logprobs": top}] if top else None
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": content} if content else None,
    }
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("openai", reason="the extra judge is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def endpoint(server: Server, **options: Any) -> EndpointJudge:
    given = {"model": "judge", "base_url": server.url, "threads": 2, **options}
    found = judge_for(
        EvaluateConfig.model_validate(
            {"judge": "endpoint", "generation": GENERATION, "language_judge": given}
        )
    )
    assert isinstance(found, EndpointJudge)
    return found


def by_length(question: str, number: int) -> tuple[int, dict[str, Any]]:
    first = question.split("[Answer A]\n")[1].split("\n")[0]
    second = question.split("[Answer B]\n")[1].split("\n")[0]
    return 200, said("A" if len(first) > len(second) else "B")


def test_log_probs_count_before_the_text(server: Server) -> None:
    # Both spellings of A: log(0.2 + 0.1); B: log(0.1). P(A) = 3/4 in both orders, so a's is (3/4 + 1/4) / 2.
    logprobs = {"A": math.log(0.2), " A": math.log(0.1), "B": math.log(0.1), "C": math.log(0.5)}
    server.reply = lambda question, number: (200, said("B", logprobs))
    found = endpoint(server)
    assert found.compare(["p"], ["x"], ["y"]).tolist() == pytest.approx([0.5])
    assert found.bias.first_preferred == pytest.approx(0.75)
    assert found.bias.consistent == 0.0


def test_a_server_that_is_busy_or_cut_is_asked_again(server: Server) -> None:
    troubles = {1: (429, {"error": {"message": "slow down"}}), 2: (500, {"error": {}}), 3: (0, None)}
    server.reply = lambda question, number: troubles.get(number) or by_length(question, number)
    assert endpoint(server).compare(["p"], ["longer"], ["x"]).tolist() == [1.0]
    assert len(server.questions) == 5  # two questions, and three that came to nothing


def test_a_refusal_ends_in_one_line(server: Server) -> None:
    server.reply = lambda question, number: (404, {"error": {"message": "no such model"}})
    with pytest.raises(ModelError, match=r"no such model.*look at the server"):
        endpoint(server).compare(["p"], ["x"], ["y"])


def test_garbage_is_unparsed_and_fatal(server: Server) -> None:
    server.reply = lambda question, number: (200, said("I cannot say."))
    with pytest.raises(ModelError, match="named neither label in 2 of 2 questions"):
        endpoint(server).compare(["p"], ["x"], ["y"])


def test_verdicts_are_kept_without_the_key(server: Server, tmp_path: Path) -> None:
    server.reply = by_length
    cache = str(tmp_path / "cache")
    for _ in range(2):
        assert endpoint(server, cache=cache).compare(["p"], ["x"], ["longer"]).tolist() == [0.0]
    assert len(server.questions) == 2  # both orders, once
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 2
    assert all("secret-key" not in path.read_text("utf-8") for path in kept)


def test_what_would_cost_too_much_is_not_asked(server: Server) -> None:
    with pytest.raises(
        ConfigError, match=r"2 questions of about .* more than language_judge.max_cost = 0.01"
    ):
        endpoint(server, price=1000.0, max_cost=0.01).compare(["p"], ["x"], ["y"])
    assert server.questions == []


def test_a_fingerprint_is_of_model_server_and_prompt(server: Server, tmp_path: Path) -> None:
    template = tmp_path / "template.txt"
    template.write_text("{prompt} {answer_a} {answer_b}", "utf-8")
    others = [endpoint(server, template=str(template)), endpoint(server, labels=("1", "2"))]
    assert len({each.fingerprint() for each in [endpoint(server), *others]}) == 3
    assert endpoint(server).fingerprint() == endpoint(server, threads=1, cache=str(tmp_path)).fingerprint()


def test_a_model_in_this_process(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model")
    config = EvaluateConfig.model_validate(
        {
            "judge": "local-model",
            "generation": GENERATION,
            "language_judge": {"model": str(model), "labels": ["a", "b"]},
        }
    )
    found = judge_for(config)
    assert isinstance(found, LocalModelJudge)
    (score,) = found.compare(["p"], ["x"], ["y"])
    (mirrored,) = found.compare(["p"], ["y"], ["x"])
    assert 0.0 < score < 1.0
    assert score + mirrored == pytest.approx(1.0)  # the order does not matter, as both are asked
    assert found.bias.questions == 2  # the same two questions
