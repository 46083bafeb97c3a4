"""Fills [MASK] in sentences with a checkpoint of pretrain.py, loaded as plain Transformers does.

python fill_mask.py runs/demo/model "Return the [MASK] of the list."
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def fill_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: str, count: int = 5
) -> list[tuple[str, float]]:
    """The `count` most likely tokens for the [MASK] of `sentence` with their probabilities, best first.

    Raises ValueError unless the sentence has exactly one mask.
    """
    inputs = tokenizer(sentence, return_tensors="pt", truncation=True)
    (positions,) = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero(as_tuple=True)
    if len(positions) != 1:
        raise ValueError(f"{sentence!r}: expected one {tokenizer.mask_token}, found {len(positions)}")
    probabilities = model(**inputs).logits[0, positions[0]].softmax(-1)
    best = probabilities.topk(count)
    return [(tokenizer.convert_ids_to_tokens(int(i)), float(p)) for p, i in zip(best.values, best.indices)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder with a model and its tokenizer")
    parser.add_argument("sentences", nargs="+", metavar="sentence", help="with one [MASK] each")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForMaskedLM.from_pretrained(args.checkpoint).eval()
    for sentence in args.sentences:
        print(sentence)
        for token, probability in fill_mask(model, tokenizer, sentence):
            print(f"  {probability:6.1%}  {token}")


if __name__ == "__main__":
    main()
