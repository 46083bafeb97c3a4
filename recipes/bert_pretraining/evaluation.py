"""Loss and accuracy on the held-out part, exact for any number of processes and any batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from masking import IGNORED
from torch.utils.data import DataLoader

PAIR_LABELS = {"next_sentence_label": "seq_relationship_logits", "sentence_order_label": "sop_logits"}
"""Label of a sample's two segments in a batch, and what a model calls its answer."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Means over all hidden tokens, or over all samples, of the held-out part. Losses are in nats.

    What is said of a sample's two segments is None where samples have one.
    """

    token_loss: float
    token_accuracy: float
    next_sentence_loss: float | None = None
    next_sentence_accuracy: float | None = None

    @property
    def loss(self) -> float:
        """What the model is trained on: the sum of both losses."""
        return self.token_loss + (self.next_sentence_loss or 0.0)

    def to_dict(self) -> dict[str, float]:
        """The figures by the names that they have in metrics.jsonl."""
        known = {f"held_out_{name}": value for name, value in asdict(self).items() if value is not None}
        return {"held_out_loss": self.loss, **known}

    def __str__(self) -> str:
        words = f"loss {self.loss:.3f} (tokens {self.token_loss:.3f}, {self.token_accuracy:.1%} right"
        if self.next_sentence_loss is not None:
            words += f"; next sentence {self.next_sentence_loss:.3f}, {self.next_sentence_accuracy:.1%} right"
        return f"{words})"


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> HeldOut:
    """Evaluates the prepared `model` on this process's share of the split; every process gets the figures of the whole.

    Batches differ in how many tokens are hidden, so a mean of their mean losses would be off. Sums over samples are
    added up instead.
    """
    model.eval()
    totals = torch.zeros(6, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        batch = send_to_device(batch, accelerator.device)
        totals += sample_sums(model(**batch), batch).double().sum(0)
    samples, tokens, token_loss, token_hits, pair_loss, pair_hits = accelerator.reduce(totals, "sum").tolist()
    if not samples:
        return HeldOut(token_loss / tokens, token_hits / tokens)
    return HeldOut(token_loss / tokens, token_hits / tokens, pair_loss / samples, pair_hits / samples)


def sample_sums(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Figures of each sample, [B, 6], float32, from what a model gives for a batch of B.

    Columns: 1 where the sample has two segments, hidden tokens, their summed loss, hidden tokens that are right, the
    segments' loss, 1 if that is right. A sample that only fills a batch up, which has no labels, has 0 in all of them.
    """
    logits = outputs["prediction_logits"] if "prediction_logits" in outputs else outputs["logits"]
    hidden = batch["labels"] != IGNORED
    rows = hidden.nonzero()[:, 0]
    labels, hidden_logits = batch["labels"][hidden], logits[hidden].float()
    sums = torch.zeros(len(hidden), 6, device=logits.device)
    sums[:, 1] = hidden.sum(1)
    sums[:, 2].index_add_(0, rows, F.cross_entropy(hidden_logits, labels, reduction="none"))
    sums[:, 3].index_add_(0, rows, (hidden_logits.argmax(-1) == labels).float())
    for name, answer in PAIR_LABELS.items():
        if name in batch:
            pair_labels, pair_logits = batch[name], outputs[answer].float()
            sums[:, 0] = pair_labels != IGNORED
            sums[:, 4] = F.cross_entropy(pair_logits, pair_labels, reduction="none", ignore_index=IGNORED)
            sums[:, 5] = pair_logits.argmax(-1) == pair_labels
    return sums
