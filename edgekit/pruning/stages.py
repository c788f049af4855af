"""One layer: choose what stays, cut, and tune what is left to give the dense model's output.

Mask tuning, our form. A mask with a value per neuron scales columns of the map behind it (Kwon et
al., arXiv 2204.09656, fit such scales by least squares on the layer's output). A full refit of
these columns contains every such scale and folds into the same weights, so we solve for it:

    W' = argmin E|t - W' x|^2 + damp |W' - W|^2        (`solve.refit`)

``x`` are the features of the pruned model, so that later layers see the errors of earlier ones.
``t`` is what takes the pruned model's residual stream to the dense model's: behind attention to
where the dense layer is, behind the feed-forward block to the input of the next layer that stays.
So the block in front of a removed layer learns what of it is linear in its features (ReplaceMe,
arXiv 2505.02819, folds such a map in the same place). Where a norm follows the block (Gemma,
OLMo 2) that is not linear, and ``t`` is the dense block's own output.

Experts: a token's output is the sum over its k experts, weighed by the router, so each expert is
refitted to what is still missing, on the tokens that it gets, and takes 1/k of the step. For k
experts per token that never raises the error (Jensen); `SWEEPS` repeats it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from edgekit.arch import Mapping
from edgekit.pruning.cut import Cut, roles
from edgekit.pruning.layers import Flow, Layers
from edgekit.pruning.metrics import Metric, Site, highest
from edgekit.pruning.moments import Moments, as_moment
from edgekit.pruning.solve import refit
from edgekit.pruning.weights import SHIFT, Layer, attention_kept, cut_layer, neurons_kept

Tensor = Any
Batches = Sequence[Tensor]  # hidden states, float32 [B, T, hidden] each

SWEEPS = 4  # over the experts
OUT, DOWN = "attn_output.weight", "ffn_down.weight"
EXPERT_DOWN = "ffn_down_exps.weight"
MAKERS = {OUT: ("attn_v.weight",), DOWN: ("ffn_gate.weight", "ffn_up.weight")}


@dataclass(frozen=True)
class Recipe:
    """How a layer is pruned.

    Attributes:
        metric: Chooses what stays.
        tunes: Refit what is left to the dense model's output.
        shifts: Without tuning, add what the removed features gave on average: FLAP's bias. No file
            of these architectures holds it without other biases beside it, so it is only measured.
    """

    metric: Metric
    tunes: bool = True
    shifts: bool = False


@dataclass(frozen=True, eq=False)
class Goal:
    """Where the dense model is, batch by batch, tokens one after another.

    Attributes:
        attention: Residual stream behind attention, ``[N, hidden]``, or the output of attention
            where a norm follows it.
        feed_forward: The same behind the feed-forward block.
        is_residual: The former.
    """

    attention: Batches
    feed_forward: Batches
    is_residual: bool

    @classmethod
    def of(
        cls, layers: Layers, layer: Layer, index: int, dense: Batches
    ) -> tuple["Goal", list[Tensor]]:
        """Run layer ``index`` on the dense stream; also give the stream behind it."""
        flows = [layers.run(index, layer, hidden) for hidden in dense]
        behind = [flow.out for flow in flows]
        if "ATTN_POST_NORM.weight" in layers.mapping.arch.tensors:
            own = ([f.attention for f in flows], [f.feed_forward for f in flows])
            return cls(*own, is_residual=False), behind
        middle = [_flat(h) + f.attention for h, f in zip(dense, flows, strict=True)]
        return cls(middle, [_flat(out) for out in behind], is_residual=True), behind


def prune_layer(
    layers: tuple[Layers, Layers],
    places: tuple[int, int],
    weights: Layer,
    goal: Goal,
    stream: Batches,
    cut: Cut,
    recipe: Recipe,
    effects: dict[str, Any] | None = None,
) -> Layer:
    """Prune one layer and tune what is left.

    Args:
        layers: Of the dense and of the pruned configuration.
        places: Index of the layer in each.
        weights: Of the dense layer.
        goal: Of the dense layer, or of the removed ones behind it.
        stream: Its input in the pruned model.
        cut: What stays.
        recipe: How to choose and tune.
        effects: For Taylor: GGUF suffix -> effect of each feature.

    Returns:
        The layer's new weights.
    """
    work = _Work(layers, places, goal, stream, cut, recipe, effects or {})
    pruned = work.attention(weights)
    if work.mapping.hyper.n_experts:
        return work.experts(pruned)
    return work.feed_forward(pruned)


@dataclass(frozen=True, eq=False)
class _Work:
    layers: tuple[Layers, Layers]
    places: tuple[int, int]
    goal: Goal
    stream: Batches
    cut: Cut
    recipe: Recipe
    effects: dict[str, Any]

    @property
    def mapping(self) -> Mapping:
        return self.layers[0].mapping

    def attention(self, weights: Layer) -> Layer:
        """Cut query groups and refit the output projection."""
        hyper = self.mapping.hyper
        is_cut = self.cut.kv_heads != hyper.n_kv_heads
        if not is_cut and not self.recipe.tunes:
            return weights
        moments = Moments.like(weights[OUT])
        for i, (hidden, flow, goal) in enumerate(self._dense(weights, self.goal.attention)):
            moments.add(i, flow.inputs[OUT], goal - _flat(hidden) * self.goal.is_residual)
        group = hyper.sizes["q"] // hyper.n_kv_heads
        groups = torch.arange(hyper.n_kv_heads)
        if is_cut:
            site = self._site(weights, OUT, moments)
            groups = self.recipe.metric.kept(site, self.cut.kv_heads, group)
        kept = attention_kept(groups, hyper.sizes["head"], hyper.n_heads, hyper.n_kv_heads)
        pruned = cut_layer(weights, roles(self.mapping), kept)
        return self._tuned(weights[OUT], pruned, OUT, moments, kept["q"])

    def feed_forward(self, weights: Layer) -> Layer:
        """Cut neurons of a dense block and refit the down projection."""
        width = self.mapping.hyper.sizes["ff"]
        if self.cut.ff == width and not self.recipe.tunes:
            return weights
        moments = Moments.like(weights[DOWN])
        for i, (hidden, flow, goal) in enumerate(self._dense(weights, self.goal.feed_forward)):
            moments.add(i, flow.inputs[DOWN], goal - self._middle(hidden, flow))
        neurons = torch.arange(width)
        if self.cut.ff != width:
            neurons = self.recipe.metric.kept(self._site(weights, DOWN, moments), self.cut.ff)
        pruned = cut_layer(weights, roles(self.mapping), neurons_kept(neurons, width))
        return self._tuned(weights[DOWN], pruned, DOWN, moments, neurons)

    def experts(self, weights: Layer) -> Layer:
        """Cut experts and neurons inside them and refit the experts that stay."""
        hyper, cut = self.mapping.hyper, self.cut
        if (cut.experts, cut.ffe) != (hyper.n_experts, hyper.sizes["ffe"]):
            moments = [Moments.like(w) for w in weights[EXPERT_DOWN]]
            for i, (_, flow, _) in enumerate(self._dense(weights, self.goal.feed_forward)):
                for expert, x in enumerate(_expert_features(flow)):
                    moments[expert].add(i, x)
            weights = self._cut_experts(weights, moments)
        for _ in range(SWEEPS if self.recipe.tunes else 0):
            weights = self._sweep(weights)
        return weights

    def _cut_experts(self, weights: Layer, moments: list[Moments]) -> Layer:
        n_tokens = sum(len(_flat(hidden)) for hidden in self.stream)
        sites = [self._expert_site(weights, e, m, n_tokens) for e, m in enumerate(moments)]
        metric = self.recipe.metric
        chosen = highest(torch.tensor([metric.total(site) for site in sites]), self.cut.experts)
        kept: dict[str, Tensor] = {"experts": chosen}
        pruned = cut_layer(weights, roles(self.mapping), kept)
        if self.cut.ffe == self.mapping.hyper.sizes["ffe"]:
            return pruned
        inside = torch.stack([metric.kept(sites[e], self.cut.ffe) for e in chosen.tolist()])
        pruned = cut_layer(pruned, roles(self.mapping), {"ffe": inside})
        if not self.recipe.tunes:
            return pruned
        own = [_own_output(sites[e], kept) for e, kept in zip(chosen.tolist(), inside, strict=True)]
        return pruned | {EXPERT_DOWN: torch.stack(own).float()}

    def _sweep(self, weights: Layer) -> Layer:
        """One step of every expert towards what the block's output lacks."""
        down = weights[EXPERT_DOWN].clone()
        n_active = min(self.mapping.hyper.n_experts_used, self.cut.experts)
        n_active += "ffn_down_shexp.weight" in weights
        moments = [Moments.like(w) for w in down]
        for i, (hidden, goal) in enumerate(zip(self.stream, self.goal.feed_forward, strict=True)):
            flow = self.layers[1].run(self.places[1], weights, hidden, wants=True)
            missing = goal - self._middle(hidden, flow) - flow.feed_forward
            for expert, x in enumerate(_expert_features(flow)):
                moments[expert].add(i, x, missing[flow.rows[expert]])
        every = torch.arange(down.shape[-1])
        for expert, seen in enumerate(moments):
            down[expert] += seen.refit(torch.zeros_like(down[expert]), every) / n_active
        return weights | {EXPERT_DOWN: down}

    def _dense(self, weights: Layer, goals: Batches) -> Iterator[tuple[Tensor, Flow, Tensor]]:
        """Batches of the pruned stream through the layer with weights not all cut yet."""
        for hidden, goal in zip(self.stream, goals, strict=True):
            yield hidden, self.layers[0].run(self.places[0], weights, hidden, wants=True), goal

    def _middle(self, hidden: Tensor, flow: Flow) -> Tensor:
        """The residual stream in front of the feed-forward block, where it counts."""
        return (_flat(hidden) + flow.attention) * self.goal.is_residual

    def _tuned(
        self, before: Tensor, pruned: Layer, suffix: str, moments: Moments, kept: Tensor
    ) -> Layer:
        if self.recipe.tunes:
            return pruned | {suffix: moments.refit(pruned[suffix], kept)}
        if self.recipe.shifts:
            mean = as_moment(moments.total, sum(moments.n)).index_fill(0, kept, 0)
            return pruned | {suffix.replace("weight", SHIFT): before @ mean.float()}
        return pruned

    def _site(self, weights: Layer, suffix: str, moments: Moments) -> Site:
        return Site(
            weight=weights[suffix],
            gram=lambda: as_moment(moments.gram(), sum(moments.n)),
            mean=as_moment(moments.total, sum(moments.n)),
            makers=self._makers(weights, suffix),
            effect=self.effects.get(suffix),
        )

    def _makers(self, weights: Layer, suffix: str) -> Tensor:
        """Squared norms of what makes each feature; a value serves all query heads of its group."""
        n, head = weights[suffix].shape[1], self.mapping.hyper.sizes["head"]
        total = torch.zeros(n)
        for name in MAKERS[suffix]:
            if name in weights:
                norms = weights[name].square().sum(1)
                heads = norms.view(-1, 1, head).expand(-1, max(n // len(norms), 1), head)
                total += (norms if suffix == DOWN else heads).reshape(-1, n).sum(0)
        return total

    def _expert_site(self, weights: Layer, expert: int, moments: Moments, n: int) -> Site:
        both = (weights[f"ffn_{role}_exps.weight"][expert] for role in ("gate", "up"))
        effects = self.effects.get(EXPERT_DOWN)
        return Site(
            weight=weights[EXPERT_DOWN][expert],
            gram=lambda: as_moment(moments.gram(), n),
            mean=as_moment(moments.total, n),
            makers=sum(part.square().sum(1) for part in both),
            effect=None if effects is None else effects[expert],
        )


def _own_output(site: Site, kept: Tensor) -> Tensor:
    """Columns of the kept neurons, refitted to what the whole expert gave."""
    weight, gram = site.weight.double(), site.gram()
    return refit(weight[:, kept], gram[kept[:, None], kept], weight @ gram[:, kept])


def _expert_features(flow: Flow) -> Iterator[Tensor]:
    """Features of each expert weighed by the router, ``[tokens, ffe]``."""
    for x, share in zip(flow.inputs[EXPERT_DOWN], flow.shares, strict=True):
        yield x * share[:, None]


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])
