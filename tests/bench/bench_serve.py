"""What serving costs: memory of web frameworks beside ours, and time beside the bare session.

    python tests/bench/bench_serve.py [ARTIFACT] [--budget 1GiB] [--requests 64] [--tokens 32]

Memory: resident bytes that an import adds to a process that has what ``edgekit run`` imports; those
that are not installed are left out. Time: the same greedy answers from the session in this process,
from the server with one client, and with eight; alternating, the answers compared. Prints a JSON
line last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from artifacts import sample_artifact

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from served import Served, serving

import edgekit
from edgekit.llama import Sampling
from edgekit.llama.context import default_threads
from edgekit.sizes import parse_size

MIB = 1 << 20
CONTEXT = 1024
FRAMEWORKS = {
    "http.server (standard library)": "http.server",
    "uvicorn": "uvicorn uvicorn.protocols.http.h11_impl",
    "uvicorn, starlette (ours)": "uvicorn uvicorn.protocols.http.h11_impl starlette.applications "
    "starlette.responses starlette.routing",
    "aiohttp": "aiohttp.web",
    "uvicorn, fastapi": "uvicorn uvicorn.protocols.http.h11_impl fastapi",
    "llama-cpp-python's server": "uvicorn.protocols.http.h11_impl llama_cpp.server.app",
}
IMPORTS = """
import importlib, sys, edgekit.cli, edgekit.loader
from edgekit.devices.memory import held_bytes
from edgekit.llama import system_info
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
system_info()
before = held_bytes()
for name in sys.argv[1:]:
    importlib.import_module(name)
print(held_bytes() - before)
"""
WORDS = ["def", "class", "return", "self", "import", "value", "key", "for"]
WORDS += ["in", "while", "if", "else", "try", "print", "open"]


def memory() -> dict[str, float]:
    """MiB that each framework adds, the least of three runs."""
    found = {}
    for name, modules in FRAMEWORKS.items():
        command = [sys.executable, "-c", IMPORTS, *modules.split()]
        runs = [subprocess.run(command, capture_output=True, text=True) for _ in range(3)]
        if not any(run.returncode for run in runs):
            found[name] = round(min(int(run.stdout) for run in runs) / MIB, 1)
    return found


def timed(
    answer: Callable[[str], str], prompts: list[str], at_once: int
) -> tuple[float, list[str]]:
    """Seconds for all prompts, and the answers."""
    started = time.perf_counter()
    if at_once == 1:
        texts = [answer(prompt) for prompt in prompts]
    else:
        with ThreadPoolExecutor(at_once) as pool:
            texts = list(pool.map(answer, prompts))
    return time.perf_counter() - started, texts


def through(served: Served, n_tokens: int) -> Callable[[str], str]:
    """Answers of the server, streamed."""
    client = served.client()
    extra = {"ignore_eos": True, "cache_prompt": False}

    def answer(prompt: str) -> str:
        stream = client.completions.create(
            model="any",
            prompt=prompt,
            max_tokens=n_tokens,
            temperature=0,
            stream=True,
            extra_body=extra,
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    return answer


def main() -> None:
    """Run, print, and the JSON line last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path, nargs="?", help="default: samples/tiny-llama")
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    artifact = options.artifact or Path(sample_artifact("tiny-llama"))
    threads = ["--threads", str(default_threads())]
    words = [*threads, "--budget", options.budget, "--context", str(CONTEXT), "--no-follow"]
    prompts = [f"{WORDS[i % 15]} {WORDS[i // 15 % 15]} " * 4 for i in range(options.requests)]
    greedy = Sampling(temperature=0, ignore_eos=True)
    budget = parse_size(options.budget)
    with (
        edgekit.load(artifact, budget, CONTEXT, follow=False) as session,
        serving(artifact, *words) as served,
    ):

        def bare(prompt: str) -> str:
            return "".join(session.generate(prompt, options.tokens, greedy, chat=False, anew=True))

        kinds = {
            "session": (bare, 1),
            "server, 1 client": (through(served, options.tokens), 1),
            "server, 8 clients": (through(served, options.tokens), 8),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.times):
            answers = []
            for kind, (answer, at_once) in kinds.items():
                taken, texts = timed(answer, prompts, at_once)
                seconds[kind].append(taken)
                answers.append(texts)
            assert answers[0] == answers[1] == answers[2]  # time no wrong answer
        resident = served.metrics()["edgekit_peak_resident_bytes"]
    n_tokens = options.requests * options.tokens
    rates = {k: round(n_tokens / statistics.median(s), 1) for k, s in seconds.items()}
    frameworks = memory()
    for name, value in {**frameworks, **rates}.items():
        print(f"{name:32} {value}")
    print(
        json.dumps(
            {
                "import_mib": frameworks,
                "tokens_per_second": rates,
                "seconds": {k: [round(x, 3) for x in s] for k, s in seconds.items()},
                "server_peak_mib": round(resident / MIB, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
