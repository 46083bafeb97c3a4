"""Loss and accuracy on the held-out part, exact for any number of processes and any batch size."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from data import IGNORED
from torch.utils.data import DataLoader


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Means over all hidden tokens, or over all samples, of the held-out part. Losses are in nats."""

    token_loss: float
    token_accuracy: float
    next_sentence_loss: float
    next_sentence_accuracy: float

    @property
    def loss(self) -> float:
        """What the model is trained on: the sum of both losses."""
        return self.token_loss + self.next_sentence_loss

    def to_dict(self) -> dict[str, float]:
        """The figures by the names that they have in metrics.jsonl."""
        return {"held_out_loss": self.loss, **{f"held_out_{name}": value for name, value in asdict(self).items()}}

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.3f} (tokens {self.token_loss:.3f}, {self.token_accuracy:.1%} right; "
            f"next sentence {self.next_sentence_loss:.3f}, {self.next_sentence_accuracy:.1%} right)"
        )


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> HeldOut:
    """Evaluates the prepared `model` on a prepared `loader`; every process gets the figures of the whole split.

    Batches differ in how many tokens are hidden, so a mean of their mean losses would be off. Sums over samples are
    gathered instead, without the samples that fill up the last batch.
    """
    model.eval()
    totals = torch.zeros(6, dtype=torch.float64)
    for batch in loader:
        outputs = model(**batch)
        sums = sample_sums(outputs.prediction_logits, outputs.seq_relationship_logits, batch)
        totals += accelerator.gather_for_metrics(sums).double().sum(0).cpu()
    samples, tokens, token_loss, token_hits, pair_loss, pair_hits = totals.tolist()
    return HeldOut(token_loss / tokens, token_hits / tokens, pair_loss / samples, pair_hits / samples)


def sample_sums(token_logits: torch.Tensor, pair_logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Figures of each sample: `token_logits` [B, S, V] and `pair_logits` [B, 2] to [B, 6], float32.

    Columns: 1, hidden tokens, their summed loss, hidden tokens that are right, next sentence loss, 1 if that is right.
    """
    hidden = batch["labels"] != IGNORED
    rows = hidden.nonzero()[:, 0]
    labels, logits = batch["labels"][hidden], token_logits[hidden].float()
    pair_labels = batch["next_sentence_label"]
    sums = torch.zeros(len(pair_labels), 6, device=token_logits.device)
    sums[:, 0] = 1
    sums[:, 1] = hidden.sum(1)
    sums[:, 2].index_add_(0, rows, F.cross_entropy(logits, labels, reduction="none"))
    sums[:, 3].index_add_(0, rows, (logits.argmax(-1) == labels).float())
    sums[:, 4] = F.cross_entropy(pair_logits.float(), pair_labels, reduction="none")
    sums[:, 5] = pair_logits.argmax(-1) == pair_labels
    return sums
