"""``/metrics``: what Prometheus reads, in its text format."""

from collections import Counter
from collections.abc import Iterator, Mapping

from edgekit.devices.memory import held_bytes, peak_rss_bytes
from edgekit.server.worker import Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Value = float | Mapping[str, float]  # one, or one for each value of a label


def render(worker: Worker) -> str:
    """All metrics."""
    return "".join(
        line
        for name, (kind, text, value, label) in _families(worker).items()
        for line in _lines(f"edgekit_{name}", kind, text, value, label)
    )


def _families(worker: Worker) -> dict[str, tuple[str, str, Value, str]]:
    """Kind, help, value and label of every metric."""
    plan, totals, session = worker.session.plan, worker.totals, worker.session
    resizes: Mapping[str, float] = Counter(change.reason for change in session.changes)
    last = totals.last
    return {
        "budget_bytes": ("gauge", "The budget.", plan.budget_bytes or 0, ""),
        "planned_bytes": ("gauge", "What the plan takes.", plan.total_bytes, ""),
        "weights_bytes": ("gauge", "Weights at their depths.", plan.depths.weights_bytes, ""),
        "depth_bits_per_weight": ("gauge", "Depth.", plan.bits_per_weight, ""),
        "context_tokens": ("gauge", "The context.", plan.context, ""),
        "loaded": ("gauge", "1 while a depth is loaded.", not session.is_given_up, ""),
        "resident_bytes": ("gauge", "Resident memory.", held_bytes(), ""),
        "peak_resident_bytes": ("gauge", "The most there was.", peak_rss_bytes(), ""),
        "resizes_total": ("counter", "Changes of depth, by reason.", resizes, "reason"),
        "requests_running": ("gauge", "Requests being answered.", worker.is_busy, ""),
        "requests_waiting": ("gauge", "Requests in line.", worker.n_waiting, ""),
        "answers_total": ("counter", "Answers, by their end.", dict(totals.answers), "end"),
        "held_prompt_tokens_total": ("counter", "Not computed again.", totals.held_tokens, ""),
        "prompt_tokens_total": ("counter", "Computed.", totals.prompt_tokens, ""),
        "prompt_seconds_total": ("counter", "Spent on prompts.", totals.prompt_seconds, ""),
        "generated_tokens_total": ("counter", "Generated.", totals.gen_tokens, ""),
        "generated_seconds_total": ("counter", "Spent generating.", totals.gen_seconds, ""),
        "prompt_tokens_per_second": (
            "gauge",
            "Of the last answer.",
            last.prompt_tokens_per_second,
            "",
        ),
        "tokens_per_second": ("gauge", "Of the last answer.", last.gen_tokens_per_second, ""),
    }


def _lines(name: str, kind: str, text: str, value: Value, label: str) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    if isinstance(value, Mapping):
        for key, number in sorted(value.items()):
            yield f'{name}{{{label}="{key}"}} {float(number)!r}\n'
    else:
        yield f"{name} {float(value)!r}\n"
