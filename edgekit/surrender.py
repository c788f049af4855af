"""What a model gives up, in which order, when its budget falls below what it was planned for.

Context beyond need first (only empty cells go), then the precision of the KV cache (little quality
for half its bytes), then depth, and at last everything. A change of the cache's type computes the
conversation anew, so it is made only while that is short.
"""

from dataclasses import replace

from edgekit.catalog import Catalog
from edgekit.expert_plan import plan_any, with_pager
from edgekit.footprint import BATCHES, CELLS, kv_choices, memory_of
from edgekit.plan import Plan, shape_in

SMALLER_KV = "q8_0"  # q4_0 costs too much quality to be taken unasked
RECOMPUTED_TOKENS = 512  # most of a conversation that is computed anew for another cache type


def surrender(
    catalog: Catalog, home: Plan, present: Plan, budget: int, used: int, *, pager: bool = True
) -> Plan:
    """The plan within ``budget`` bytes that keeps most of ``home``.

    Args:
        catalog: Of the artifact.
        home: What was asked for and is given up last to first.
        present: What is loaded, or was last; its cache type stays once the conversation is long.
        budget: Bytes for the whole process.
        used: Tokens that the conversation has or is about to have.
        pager: Experts may be paged where they do not fit.

    Raises:
        DoesNotFitError: Not even the lowest depth fits with the context that is needed.
    """
    shape = shape_in(catalog)
    held = home.held_bytes
    needed = min(home.context, -(-max(used, 1) // CELLS) * CELLS)
    kv_types = [home.kv_type] if used <= RECOMPUTED_TOKENS else [present.kv_type]
    if kv_types == ["f16"] and used <= RECOMPUTED_TOKENS and SMALLER_KV in kv_choices(shape):
        kv_types.append(SMALLER_KV)
    choices = [(home.context, kv_types[0])] + [(needed, kv_type) for kv_type in kv_types]
    for context, kv_type in choices:
        for batch in (n for n in (home.batch, *BATCHES) if n <= home.batch):
            memory = memory_of(shape, context, kv_type, batch, held)
            memory = with_pager(memory, home)
            if home.weights_bytes + memory.total <= budget:
                kept = replace(home, context=context, kv_type=kv_type, batch=batch, memory=memory)
                return replace(kept, budget_bytes=budget, repack=False)
    return plan_any(catalog, budget, needed, kv_types[-1], held, pager=pager)
