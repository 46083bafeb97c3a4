"""Loss and accuracy on the held-out part, exact for any number of processes and any batch size."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
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
    """Evaluates the prepared `model` on this process's share of the split; every process gets the figures of the whole.

    Batches differ in how many tokens are hidden, so a mean of their mean losses would be off. Sums over samples are
    added up instead.
    """
    model.eval()
    totals = torch.zeros(6, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        batch = send_to_device(batch, accelerator.device)
        outputs = model(**batch)
        totals += sample_sums(outputs.prediction_logits, outputs.seq_relationship_logits, batch).double().sum(0)
    samples, tokens, token_loss, token_hits, pair_loss, pair_hits = accelerator.reduce(totals, "sum").tolist()
    return HeldOut(token_loss / tokens, token_hits / tokens, pair_loss / samples, pair_hits / samples)


def sample_sums(token_logits: torch.Tensor, pair_logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Figures of each sample: `token_logits` [B, S, V] and `pair_logits` [B, 2] to [B, 6], float32.

    Columns: 1, hidden tokens, their summed loss, hidden tokens that are right, next sentence loss, 1 if that is right.
    A sample that only fills a batch up, which has no labels, has 0 in all of them.
    """
    hidden = batch["labels"] != IGNORED
    rows = hidden.nonzero()[:, 0]
    labels, logits = batch["labels"][hidden], token_logits[hidden].float()
    pair_labels = batch["next_sentence_label"]
    sums = torch.zeros(len(pair_labels), 6, device=token_logits.device)
    sums[:, 0] = pair_labels != IGNORED
    sums[:, 1] = hidden.sum(1)
    sums[:, 2].index_add_(0, rows, F.cross_entropy(logits, labels, reduction="none"))
    sums[:, 3].index_add_(0, rows, (logits.argmax(-1) == labels).float())
    sums[:, 4] = F.cross_entropy(pair_logits.float(), pair_labels, reduction="none", ignore_index=IGNORED)
    sums[:, 5] = pair_logits.argmax(-1) == pair_labels
    return sums
