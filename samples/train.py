"""Train a sample model on the standard library, from nothing to a Hugging Face folder.

The learning rate follows the clock or the step count, whichever is asked for: a warm-up, a
plateau, and a linear decay to zero over the second half. With ``--steps`` a run is reproducible
from its seed; with ``--minutes`` its length in steps depends on the machine.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .card import Training, write_card
from .corpus import Document, training_documents
from .export import export
from .models import SAMPLES, Sample
from .muon import optimizers
from .packing import batch, pack
from .vocabulary import train_tokenizer

WARMUP, DECAY = 0.02, 0.5  # shares of the run


@dataclass(frozen=True)
class Settings:
    """One run; ``minutes`` of training or, if that is None, ``steps`` of ``batch_tokens``."""

    minutes: float | None = None
    steps: int = 2000
    batch_tokens: int = 4096
    lr: float = 3e-3
    seed: int = 0
    is_bf16: bool = False
    save_minutes: float = 10.0


@dataclass
class Run:
    """A training run in memory; ``state_file`` keeps all of it between processes."""

    sample: Sample
    settings: Settings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    documents: list[Document]
    stream: np.ndarray
    state_file: Path
    step: int = 0
    seconds: float = 0.0
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.optimizers = optimizers(self.model, self.settings.lr)

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        if self.settings.minutes is None:
            return min(1.0, self.step / self.settings.steps)
        return min(1.0, self.seconds / 60 / self.settings.minutes)

    def save(self) -> None:
        """Write the state under a temporary name, then rename."""
        parts = {"model": self.model.state_dict(), "step": self.step, "seconds": self.seconds}
        parts["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        temporary = self.state_file.with_suffix(".tmp")
        torch.save(parts, temporary)
        os.replace(temporary, self.state_file)

    def load(self) -> None:
        """Continue from the last `save`."""
        parts = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(parts["model"])
        for optimizer, state in zip(self.optimizers, parts["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds = parts["step"], parts["seconds"]


def learning_rate(progress: float) -> float:
    """The share of the peak learning rate at ``progress`` in 0 to 1."""
    return min(1.0, (progress + 1e-3) / WARMUP, (1 - progress) / DECAY)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """The load-balancing loss of Switch Transformers (arXiv:2101.03961, eq. 4), mean over layers.

    It is 1 where every expert gets the same share of ``[tokens, experts]``, and more elsewhere.
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        chosen = torch.zeros_like(probability).scatter_(1, probability.topk(top_k).indices, 1.0)
        losses.append((chosen.mean(0) / top_k * probability.mean(0)).sum() * logits.shape[1])
    return torch.stack(losses).mean()


def losses(run: Run, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats per token over ``rows`` ``[B, T + 1]``, and the balance loss."""
    options = {"output_router_logits": True} if run.sample.balance else {}
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=run.settings.is_bf16):
        out = run.model(input_ids=rows[:, :-1], use_cache=False, **options)
    loss = F.cross_entropy(out.logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    if not run.sample.balance:
        return loss, torch.zeros(())
    return loss, balance_loss(out.router_logits, run.sample.config.num_experts_per_tok)


def train_step(run: Run) -> tuple[float, float]:
    """Take one step; return its two losses."""
    settings, bos = run.settings, run.sample.config.bos_token_id
    rows = batch(run.stream, run.step, settings.batch_tokens, settings.seed, bos)
    loss, balance = losses(run, rows.to(run.model.device))
    (loss + run.sample.balance * balance).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate(run.progress)
        optimizer.step()
        optimizer.zero_grad()
    run.step += 1
    return loss.item(), balance.item()


def train(run: Run) -> Iterator[dict[str, float]]:
    """Train to the end; yield a line of the log per step. The last step's rate is about zero."""
    while run.progress < 1:
        started = time.perf_counter()
        loss, balance = train_step(run)
        run.seconds += time.perf_counter() - started
        yield {"step": run.step, "seconds": run.seconds, "loss": loss, "balance": balance}


def prepare(sample: Sample, settings: Settings, folder: Path, extra: tuple[Path, ...]) -> Run:
    """Read the corpus, train the tokenizer and initialize the weights."""
    documents = training_documents(extra)
    tokenizer = train_tokenizer(sample, documents)
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(sample.config, dtype=torch.float32)
    if sample.balance:
        model.set_experts_implementation("eager")  # 2.2 times the fused one's speed on a CPU
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    folder.mkdir(parents=True, exist_ok=True)
    stream, state_file = pack(tokenizer, documents), folder / f"{sample.name}.pt"
    return Run(sample, settings, model, tokenizer, documents, stream, state_file)


def finish(run: Run, output: Path) -> float:
    """Write the folder and its card; return the held-out bits per byte of the written weights."""
    export(run.sample, run.model, run.tokenizer, output)
    settings, written = run.settings, AutoModelForCausalLM.from_pretrained(output)
    training = Training(
        steps=run.step,
        batch_tokens=settings.batch_tokens,
        seconds=run.seconds,
        lr=settings.lr,
        seed=settings.seed,
        threads=torch.get_num_threads(),
        stream_tokens=len(run.stream),
    )
    card = output / "README.md"
    return write_card(run.sample, training, written, run.tokenizer, run.documents, card)


@click.command()
@click.argument("name", type=click.Choice(sorted(SAMPLES)))
@click.option("--state", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--extra", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--minutes", type=float, help="Train this long instead of --steps.")
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch-tokens", default=4096, show_default=True, help="A multiple of 1024.")
@click.option("--lr", default=3e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--bf16", "is_bf16", is_flag=True, help="Multiply in bfloat16.")
@click.option("--save-minutes", default=10.0, show_default=True)
@click.option("--resume", is_flag=True, help="Continue the run that --state holds.")
def main(
    name: str,
    state: Path,
    output: Path,
    extra: tuple[Path, ...],
    threads: int,
    resume: bool,
    **options: Any,
) -> None:
    """Train the sample model NAME and write it to --output.

    \b
        python -m samples.train tiny-llama --state runs --output samples/tiny-llama --steps 20
    """
    torch.set_num_threads(threads)
    run = prepare(SAMPLES[name](), Settings(**options), state, extra)
    if resume:
        run.load()
    saved = run.seconds
    for line in train(run):
        click.echo(json.dumps(line))
        if run.seconds - saved > 60 * run.settings.save_minutes:
            saved = run.seconds
            run.save()
            export(run.sample, run.model, run.tokenizer, output)
    run.save()
    click.echo(json.dumps({"heldout_bits_per_byte": finish(run, output)}))


if __name__ == "__main__":
    main()
