"""Traces of routers, and what caches of experts would do with them."""

import json
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.cli.experts import print_experts
from edgekit.errors import EdgekitError, RefusedError, UnknownNameError, UsageError
from edgekit.paging.prefetch import table_guess
from edgekit.routing.consistency import sch, srp
from edgekit.routing.eviction import RANKS, Uses, victims
from edgekit.routing.facts import check_experts, hit_rate
from edgekit.routing.replay import LAYER_POLICIES, POLICIES, hit_rates
from edgekit.routing.summary import layer_transitions, summarize, token_transitions
from edgekit.routing.trace import Trace, read_trace, trace_of, write_trace


def random_trace(seed: int = 0, n: int = 300, layers: int = 3, experts: int = 8, used: int = 2):
    """Skewed routing that persists from token to token."""
    random = np.random.default_rng(seed)
    skew, state, ids = random.normal(size=(layers, experts)), 0.0, []
    for _ in range(n):
        state = 0.6 * state + random.normal(size=(layers, experts))
        ids.append(np.argsort(-(skew + state), axis=1)[:, :used])
    weights = np.sort(random.random((n, layers, used)))[:, :, ::-1]
    return trace_of(np.array(ids), experts, (0, n // 2), None, weights, {"model": "random"})


def test_a_trace_comes_back_from_its_file_as_it_was(tmp_path):
    trace = random_trace()
    write_trace(trace, tmp_path / "t.npz")
    back = read_trace(tmp_path / "t.npz")
    assert np.array_equal(back.experts, trace.experts)
    assert np.array_equal(back.weights, trace.weights)
    assert (back.starts, back.layers, back.n_experts) == ((0, 150), (0, 1, 2), 8)
    assert back.provenance == {"model": "random"}
    assert (tmp_path / "t.npz").stat().st_size < trace.experts.nbytes + 2 * trace.weights.nbytes


def test_a_part_of_a_trace_is_taken_from_all_of_it():
    ids = np.arange(10)[:, None, None]
    trace = trace_of(ids, 10, (0, 2, 4, 7), weights=ids / 10)
    part = trace.spread(5)
    assert part.experts.ravel().tolist() == [0, 1, 4, 5, 6] and part.starts == (0, 2)
    assert part.weights is not None
    np.testing.assert_allclose(part.weights, part.experts / 10, atol=1e-3)
    assert trace.spread(4).experts.ravel().tolist() == [0, 1, 7, 8]
    assert trace.spread(4).starts == (0, 2)
    assert trace.spread(10).starts == trace.starts
    assert trace_of(ids, 10).spread(3).experts.ravel().tolist() == [0, 1, 2]


def test_published_lines_of_json_are_read_in_any_order(tmp_path):
    rows = [
        {"dataset": "a", "problem_id": p, "layer": layer, "token_idx": t,
         "experts": [(t + layer) % 8, (t + layer + 3) % 8], "gating_probs": [0.75, 0.25]}
        for p in (1, 0) for t in (2, 0, 1) for layer in (1, 0)
    ]  # fmt: skip
    incomplete = {"dataset": "b", "problem_id": 0, "layer": 0, "token_idx": 0, "experts": [0, 7]}
    path = tmp_path / "r.jsonl"
    lines = [*rows, incomplete | {"gating_probs": [1, 0]}]
    path.write_text("\n".join(json.dumps(row) for row in lines))
    trace = read_trace(path)
    assert trace.experts[:3, 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert trace.experts[:3, 1].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert (trace.n_experts, trace.starts, trace.n_tokens) == (8, (0, 3), 6)
    assert trace.weights is not None and trace.weights[0, 0].tolist() == [0.75, 0.25]
    assert trace.provenance["n_incomplete"] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"[]",
        b"[" * 100_000,
        b'{"layer": 0}',
        b'{"layer":0,"token_idx":0,"experts":"x"}',
        b'{"layer":0,"token_idx":0,"experts":[%d]}' % 2**80,
        b'{"layer":0,"token_idx":0,"experts":[0.5]}',
        b'{"layer":1e999,"token_idx":0,"experts":[0]}',
        b'{"layer":0,"token_idx":0,"experts":[0],"gating_probs":[1e9]}',
    ],
)
def test_what_is_no_trace_is_refused(content, tmp_path):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(RefusedError, match="t"):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("experts", np.full((4, 2, 2), 9, np.uint8)),
        ("experts", np.zeros((4, 2, 2), np.uint8)),  # one expert twice
        ("experts", np.zeros((4, 2, 2), np.float32)),
        ("starts", np.array([1])),
        ("starts", np.array([0, 9])),
        ("layers", np.array([0])),
        ("n_experts", np.array(0)),
        ("weights", np.zeros((1, 2, 2), np.float16)),
        ("provenance", np.frombuffer(b"[1]", np.uint8)),
    ],
)
def test_a_trace_with_a_lie_in_it_is_refused(name, value, tmp_path):
    path = tmp_path / "t.npz"
    write_trace(random_trace(n=4, layers=2), path)
    with np.load(path) as data:
        arrays = dict(data)
    np.savez(path, **(arrays | {name: value}))
    with pytest.raises(RefusedError):
        read_trace(path)


def test_a_trace_with_wrong_bytes_is_read_or_refused(tmp_path):
    path, random = tmp_path / "t.npz", np.random.default_rng(0)
    write_trace(random_trace(), path)
    whole, n_refused = path.read_bytes(), 0
    for _ in range(400):
        broken = bytearray(whole)
        broken[random.integers(len(broken))] = random.integers(256)
        path.write_bytes(broken)
        try:
            read_trace(path)
        except RefusedError:
            n_refused += 1
    assert n_refused > 200


def test_a_trace_that_claims_more_than_memory_is_refused(tmp_path):
    path = tmp_path / "t.npz"
    write_trace(random_trace(), path)
    with zipfile.ZipFile(path) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    head, claim = b"(300, 3, 2), }" + b" " * 12, b"(300" + b"0" * 12 + b", 3, 2), }"
    assert head in members["experts.npy"] and len(head) == len(claim)
    members["experts.npy"] = members["experts.npy"].replace(head, claim)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(RefusedError, match="no trace"):
        read_trace(path)


def test_a_trace_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "t.npz"
    write_trace(random_trace(), path)
    monkeypatch.setattr("edgekit.routing.trace.MAX_BYTES", 100)
    with pytest.raises(RefusedError, match="unpacks"):
        read_trace(path)
    assert zipfile.is_zipfile(path)


def test_a_missing_trace_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match="edgekit trace"):
        read_trace(tmp_path / "none")


def lru_by_hand(ids: np.ndarray, capacity: int) -> int:
    """Hits of one layer, token by token, in Python's own ordered dictionary."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for token in ids.tolist():
        hits += sum(expert in held for expert in token)
        for expert in reversed(token):  # the heaviest is the most recent
            held[expert] = None
            held.move_to_end(expert)
        while len(held) > capacity:
            held.popitem(last=False)
    return hits


def belady_by_hand(ids: np.ndarray, capacity: int) -> int:
    tokens, held, hits = ids.tolist(), set[int](), 0
    for t, token in enumerate(tokens):
        hits += sum(expert in held for expert in token)
        held |= set(token)

        def next_use(expert: int, now: int = t) -> int:
            later = (i for i in range(now + 1, len(tokens)) if expert in tokens[i])
            return next(later, len(tokens))

        while len(held) > capacity:
            held.remove(max(held - set(token), key=next_use))
    return hits


@pytest.mark.parametrize("capacity", [2, 3, 5, 8])
def test_hit_rates_are_those_of_a_cache_run_by_hand(capacity):
    trace = random_trace(n=120)
    for policy, by_hand in (("lru", lru_by_hand), ("belady", belady_by_hand)):
        rates = hit_rates(trace, policy, [capacity])[0]
        want = [by_hand(trace.experts[:, layer], capacity) / 240 for layer in range(3)]
        assert rates.tolist() == pytest.approx(want), policy


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(4, 10), st.integers(1, 3))
def test_belady_is_never_worse_than_any_other_cache_of_a_layer(seed, experts, used):
    trace = random_trace(seed, 80, 2, experts, used)
    sizes = list(range(used, experts + 1))
    rates = {policy: hit_rates(trace, policy, sizes) for policy in LAYER_POLICIES}
    for policy in LAYER_POLICIES:
        assert (rates["belady"] >= rates[policy] - 1e-12).all(), policy
    for policy in ("lru", "belady"):  # larger is never worse
        assert (np.diff(rates[policy], axis=0) >= -1e-12).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_of_everything_misses_only_what_it_never_saw(policy):
    trace = random_trace()
    distinct = [len(np.unique(trace.experts[:, layer])) for layer in range(3)]
    want = [1 - n / (2 * trace.n_tokens) for n in distinct]
    assert hit_rates(trace, policy, [8])[0].tolist() == pytest.approx(want)


def test_a_policy_or_size_that_makes_no_sense_is_told():
    with pytest.raises(UnknownNameError, match="lru"):
        hit_rates(random_trace(), "lrv", [4])
    with pytest.raises(UsageError, match="2 experts"):
        hit_rates(random_trace(), "lru", [1])


def test_the_pool_evicts_who_will_be_most_stale_when_their_turn_comes():
    uses = Uses.empty(3, 4)
    uses.resident[:] = True
    uses.last[:] = RANKS * np.array([[5, 3, 5, 5], [4, 4, 4, 3], [4, 4, 4, 4]])
    uses.last[0, 2] += 7
    stays = np.zeros_like(uses.resident)
    stays[1, :2] = True
    # layer 1 is computed by token 5: layer 0 comes again with token 6, layer 2 with this one
    order = list(victims(uses, 1, stays, 12))
    assert order[:2] == [(1, 3), (0, 1)]  # 3 tokens old by then; the turn of layer 1 is farthest
    assert order[2] == (1, 2)  # 2 tokens old
    assert order[-5:-1] != order[-1:] and order[-1] == (0, 2)  # the freshest, by its weight
    assert not {(1, 0), (1, 1)} & set(order)
    assert list(victims(uses, 1, stays, 2)) == order[:2]


def srp_by_hand(trace: Trace, m: int) -> tuple[float, float]:
    """The best router that keeps what ``t`` of the ``m`` tokens use, by counting."""
    windows = [
        (ids[i : i + m, layer] == expert).any(axis=1).sum()
        for ids in trace.sequences()
        for i in range(len(ids) - m + 1)
        for layer in range(ids.shape[1])
        for expert in range(trace.n_experts)
    ]
    used = sum(windows)
    found = []
    for t in range(m + 1):
        matched, kept = sum(f for f in windows if f >= t), m * sum(f >= t for f in windows)
        precision, recall = matched / max(kept, 1), matched / used
        f1 = 2 * precision * recall / (precision + recall) if matched else 0.0
        found.append((f1, -t, kept / used))
    best = max(found)
    return best[0], best[2]


def test_srp_is_the_best_f1_over_thresholds():
    trace = random_trace(n=60)
    for m in (1, 4, 9):
        value = srp(trace, m)
        assert (value.model, value.cache_ratio) == pytest.approx(srp_by_hand(trace, m))


def test_routing_that_never_changes_is_perfectly_local():
    trace = trace_of(np.tile([[[0, 1]], [[0, 1]]], (32, 1, 1)), 8)
    assert srp(trace, 16).model == 1.0 and srp(trace, 16).cache_ratio == 1.0
    assert sch(trace, 16, 2) == (1.0,)


def test_sch_with_an_endless_look_ahead_beats_lru_and_is_one_with_room_for_all():
    trace = random_trace()
    lru = hit_rates(trace, "lru", [3])[0]
    assert np.mean(sch(trace, 64, 3)) > np.mean(lru)
    assert sch(trace, 4, 8) == (1.0, 1.0, 1.0)


def test_transitions_count_pairs_within_sequences_only():
    trace = trace_of(np.array([[[0], [1]], [[2], [1]], [[2], [0]]]), 3, (0, 2))
    tokens, layers = token_transitions(trace), layer_transitions(trace)
    assert tokens[0].tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert tokens[1].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert layers[0].tolist() == [[0, 1, 0], [0, 0, 0], [1, 1, 0]]


def test_random_routing_gets_the_verdict_that_it_brings_nothing():
    random = np.random.default_rng(0)
    ids = np.argsort(random.random((600, 2, 16)), axis=2)[:, :, :2]
    assert summarize(trace_of(ids, 16))["verdict"].startswith("no benefit: ")
    told = summarize(random_trace())
    assert told["verdict"].startswith("benefit: ")
    assert told["recommended"]["experts_per_layer"] < 8
    assert sum(told["histogram"][0]) == 600


def test_hit_rates_are_interpolated_between_measured_sizes():
    facts = summarize(random_trace())
    curve = next(row for row in facts["hit_curves"] if row["policy"] == "pool")
    sizes, rates = curve["experts_per_layer"], curve["hit_rate"]
    assert hit_rate(facts, sizes[1]) == rates[1]
    assert hit_rate(facts, (sizes[0] + sizes[1]) / 2) == pytest.approx((rates[0] + rates[1]) / 2)
    assert hit_rate({}, 4) is None


@pytest.mark.parametrize(
    "lie",
    [
        {"n_experts": 0},
        {"n_used": 9},
        {"hit_curves": [{"policy": "pool", "experts_per_layer": [4, 2], "hit_rate": [0.1, 0.2]}]},
        {"hit_curves": [{"policy": "pool", "experts_per_layer": [2], "hit_rate": [1.5]}]},
        {"hit_curves": "x"},
        {"recommended": {"experts_per_layer": 99}},
        {"srp": [{"segment": 4}]},
        {"sch": [{"segment": 4, "rho": 1, "model": "x"}]},
        {"trace": []},
        {"verdict": 1},
        {"top_share": None},
        {"layers": None},
        {"layers": [0]},
        {"next_layer": [[[[8, 1]]] * 8] * 2},
        {"next_layer": [[[[0, -1]]] * 8] * 2},
        {"next_layer": [[[[0, 1]]] * 7] * 2},
    ],
)
def test_expert_facts_that_cannot_be_are_refused(lie):
    with pytest.raises(EdgekitError):
        check_experts(summarize(random_trace()) | lie)


def test_facts_that_only_planning_needs_can_be_shown(capsys):
    facts = summarize(random_trace())
    keys = ("n_experts", "n_used", "recommended", "verdict")
    least = {key: facts[key] for key in keys} | {"hit_curves": []}
    print_experts(check_experts(least))
    assert "How local routing is" in capsys.readouterr().out


def test_transitions_of_another_model_are_refused():
    facts = summarize(random_trace())
    guess = table_guess(facts, 3, 8, 2)
    assert [table is None for table in guess.tables] == [False, False, True]
    with pytest.raises(RefusedError, match="the model has 16"):
        table_guess(facts, 3, 16, 2)
    with pytest.raises(UsageError, match="--prefetch gate"):
        table_guess({}, 3, 8, 2)


def test_a_text_of_a_trace_is_named_in_it(tmp_path: Path):
    facts = summarize(random_trace())
    assert facts["trace"] == {"model": "random", "n_tokens": 300, "n_sequences": 2}
