"""Structured pruning of a checkpoint into a smaller checkpoint: layers first, then neurons.

After COMP ("Lightweight and Post-Training Structured Pruning for On-Device Large Language Models",
arXiv 2501.15255): coarse to fine, no gradients through weights, no fine-tuning, about one layer in
memory. Its equations are not public; ours are stated where they are computed:

    `solve`    what a removal costs, and the least squares that makes up for it
    `metrics`  the table of metrics
    `cut`      how much is removed of what, and the config of the result
    `weights`  a layer under role names, cut along the axes of `edgekit.arch.table`
    `layers`   single layers run by transformers with weights that are handed in
    `stages`   one layer: select, cut, tune
    `search`   which layers go, and how the ratio is shared out
    `prune`    all of it, streamed and resumable
    `repair`   low-rank repair of a quantized tier as a llama.cpp adapter
"""
