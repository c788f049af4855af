"""What ``edgekit serve`` answers the official client, whole and in streams, at any budget."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from served import EXACT, ROOMY, WORDS, Served, serving, smallest, text_of, wait_for

from edgekit.llama import Sampling

GREEDY = Sampling(temperature=0, ignore_eos=True)


def test_200_streams_8_at_a_time_are_neither_lost_nor_mixed(served: Served, session: Any) -> None:
    client = served.client()
    prompts = [f"{WORDS[i % 15]} {WORDS[i // 15]} " * (1 + i % 5) for i in range(200)]

    def ask(prompt: str) -> tuple[str, str, Any]:
        return text_of(
            client.completions.create(
                model="any",
                prompt=prompt,
                max_tokens=10,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=EXACT,
            )
        )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    assert len({text for text, _, _ in answers}) > 50
    for prompt, (text, reason, usage) in zip(prompts, answers, strict=True):
        generation = session.generate(prompt, 10, GREEDY, chat=False, anew=True)
        assert "".join(generation) == text
        assert (reason, usage.completion_tokens) == ("length", 10)
        assert usage.prompt_tokens == generation.timings.n_prompt


def test_a_conversation_has_the_models_template_and_its_counts(
    served: Served, session: Any
) -> None:
    client = served.client()
    messages: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "def "}, {"type": "text", "text": "f"}],
        },
        {"role": "assistant", "content": "return"},
        {"role": "user", "content": "class"},
    ]
    fields: dict[str, Any] = {"temperature": 0, "max_completion_tokens": 12, "extra_body": EXACT}
    answer = client.chat.completions.create(model="any", messages=messages, **fields)
    prompt = "system: be brief\nuser: def f\nassistant: return\nuser: class\nassistant:"
    told = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "def f"}]
    generation = session.generate([*told, *messages[2:]], 12, GREEDY, anew=True)
    assert answer.choices[0].message.content == "".join(generation)
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"
    ids = session.model.tokenize(prompt, parse_special=True)
    assert answer.usage and answer.usage.prompt_tokens == len(ids) == generation.timings.n_prompt
    assert answer.usage.total_tokens == len(ids) + 12
    stream = client.chat.completions.create(model="any", messages=messages, stream=True, **fields)
    text, reason, usage = text_of(stream)
    assert (text, reason, usage) == (answer.choices[0].message.content, "length", None)


def test_what_the_context_has_of_a_prompt_is_not_computed_again(served: Served) -> None:
    client, first = served.client(), "def add return self import value"
    fields: dict[str, Any] = {"model": "any", "max_tokens": 4, "temperature": 0}
    usages = []
    for prompt in (first, f"{first} key", f"{first} value"):
        answer = client.completions.create(prompt=prompt, **fields)
        assert answer.usage and answer.usage.prompt_tokens_details
        usages.append(
            (answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens)
        )
    assert usages[1][1] >= usages[0][0] - 1 and usages[2][1] >= usages[0][0] - 1
    answer = client.completions.create(prompt=first, extra_body={"cache_prompt": False}, **fields)
    assert answer.usage and answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_seeds_stop_texts_and_limits_do_what_they_say(served: Served) -> None:
    client = served.client()
    fields: dict[str, Any] = {
        "model": "any",
        "prompt": "def",
        "max_tokens": 40,
        "extra_body": EXACT,
    }
    texts = [
        client.completions.create(temperature=1.5, top_p=0.9, seed=seed, **fields).choices[0].text
        for seed in (7, 7, 8, None, None)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 4
    greedy = client.completions.create(temperature=0, **fields).choices[0]
    tiny = client.completions.create(temperature=2, top_p=0, **fields).choices[0]
    assert tiny.text == greedy.text  # the likeliest only
    stop = greedy.text[10:13]
    for stops in (stop, ["never there", stop]):
        cut = client.completions.create(temperature=0, stop=stops, **fields).choices[0]
        assert cut.text == greedy.text[: greedy.text.index(stop)] and cut.finish_reason == "stop"
    fields.pop("max_tokens")
    whole = client.completions.create(temperature=0, **fields)
    assert whole.usage and whole.usage.total_tokens == 513  # the last is told, not computed
    assert whole.choices[0].finish_reason == "length"


def test_the_model_is_listed(served: Served) -> None:
    client = served.client()
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert served.get("/health").json() == {"status": "ok"}


def test_a_lowered_budget_keeps_streams_alive(served: Served) -> None:
    client, least = served.client(), smallest(served)
    fields: dict[str, Any] = {"model": "any", "max_tokens": 150, "temperature": 0, "stream": True}
    resizes = 'edgekit_resizes_total{reason="asked"}'
    before = served.metrics().get(resizes, 0)
    with ThreadPoolExecutor(4) as pool:
        streams = [
            pool.submit(
                lambda p: text_of(client.completions.create(prompt=p, extra_body=EXACT, **fields)),
                word,
            )
            for word in WORDS[:4]
        ]
        sizes = []
        for budget in (least, "1GiB", least + 1, "2GiB"):
            answer = served.resize(budget)
            assert answer.status_code == 200, answer.text
            sizes.append(answer.json()["total_bytes"])
            if isinstance(budget, int):
                assert sizes[-1] <= budget
        assert sizes[0] < sizes[1] > sizes[2] < sizes[3]
        for stream in streams:
            text, reason, _ = stream.result(timeout=300)
            assert reason == "length" and len(text) > 150
    assert served.metrics()[resizes] == before + 4
    assert served.resize(ROOMY).status_code == 200


def gone(served: Served) -> float:
    return served.metrics().get('edgekit_answers_total{end="gone"}', 0)


def is_idle(served: Served) -> bool:
    now = served.metrics()
    return now["edgekit_requests_running"] == now["edgekit_requests_waiting"] == 0


def test_a_client_that_goes_away_stops_the_generation(served: Served) -> None:
    before, tokens = gone(served), served.metrics()["edgekit_generated_tokens_total"]
    fields: dict[str, Any] = {"model": "any", "prompt": "def", "extra_body": EXACT}
    fields |= {"max_tokens": 500}
    stream = served.client().completions.create(stream=True, **fields)
    next(iter(stream))
    with pytest.raises(openai.APITimeoutError):  # waits in line, in one piece
        served.client(timeout=0.05).completions.create(**fields)
    stream.close()
    wait_for(lambda: gone(served) == before + 2 and is_idle(served))
    assert served.metrics()["edgekit_generated_tokens_total"] < tokens + 900
    with pytest.raises(openai.APITimeoutError):  # while it is generated
        served.client(timeout=0.05).completions.create(**fields)
    wait_for(lambda: gone(served) == before + 3 and is_idle(served))


def test_metrics_are_prometheus_text(served: Served) -> None:
    answer = served.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    sample = re.compile(r'edgekit_\w+(\{\w+="[\w ]+"\})? -?[\d.e+]+')
    names = []
    for line in answer.text.splitlines():
        assert line.startswith(("# HELP edgekit_", "# TYPE edgekit_")) or sample.fullmatch(line)
        names += re.findall(r"^# TYPE (\w+) (?:gauge|counter)$", line)
    assert len(names) == len(set(names)) == answer.text.count("# HELP ")
    now = served.metrics()
    assert now["edgekit_resident_bytes"] <= now["edgekit_budget_bytes"]
    assert now["edgekit_tokens_per_second"] > 0 < now["edgekit_depth_bits_per_weight"]


def test_a_model_without_a_template_gets_the_texts(llama_artifact: Path) -> None:
    with serving(llama_artifact, "--budget", ROOMY, "--context", "512") as served:
        fields: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 8}
        messages: Any = [{"role": "user", "content": word} for word in ("def", "add")]
        client = served.client()
        chat = client.chat.completions.create(messages=messages, extra_body=EXACT, **fields)
        text = client.completions.create(prompt="def\nadd", extra_body=EXACT, **fields)
        assert chat.choices[0].message.content == text.choices[0].text
