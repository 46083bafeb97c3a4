"""Trains models with Trainer, in the style of transformers' example scripts. Knows nothing of RaNNC.

Masked language modelling with accumulation, clipping, evaluation, a callback and the best model at the end; causal
language modelling with uneven numbers of labels: resumed from a checkpoint, with a loss of the script's, and with
smoothed labels; summarisation by T5 with Seq2SeqTrainer and texts of uneven lengths, which
generates in its evaluations; image classification with metrics.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

# Trainer of transformers 5.17 loads the optimizer onto the "cpu:0" of a process, which `torch.load` does not know.
torch.serialization.register_package(11, lambda obj: None, lambda obj, location: obj if location == "cpu:0" else None)

VOCABULARY = 50
GENERATED = 8


@dataclass
class DataArguments:
    samples: int = field(default=26, metadata={"help": "Samples to train on."})


def common(folder, **options):
    return dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=5e-3,
        # A plain 1e-8 turns the rounding errors of gradients that are zero (key biases) into full steps.
        adam_epsilon=1e-6,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )


def record(trainer):
    noise = ("runtime", "per_second", "preparation_time")
    logs = [{k: v for k, v in entry.items() if not any(n in k for n in noise)} for entry in trainer.state.log_history]
    return {"logs": logs, "wrapped": type(trainer.model_wrapped).__name__}


class StepCounter(TrainerCallback):
    def __init__(self):
        self.calls = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.calls["step"] = state.global_step

    def on_save(self, args, state, control, **kwargs):
        self.calls["save"] = self.calls.get("save", 0) + 1


def masked_language_model(folder, samples):
    def data(count, seed):
        generator = torch.Generator().manual_seed(seed)
        result = []
        for _ in range(count):
            tokens = torch.randint(1, VOCABULARY, (12,), generator=generator)
            labels = torch.full_like(tokens, -100)
            # BERT takes the mean over the labels of a process, so that they must be equally many.
            masked = torch.randperm(12, generator=generator)[:3]
            labels[masked] = tokens[masked]
            tokens[masked] = 0
            result.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
        return result

    set_seed(7)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    options = common(folder, num_train_epochs=2, gradient_accumulation_steps=2, max_grad_norm=0.5, weight_decay=0.01)
    options |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    options |= {"save_total_limit": 1, "load_best_model_at_end": True, "lr_scheduler_type": "cosine", "warmup_steps": 1}
    counter = StepCounter()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=data(samples, 1),
        eval_dataset=data(11, 2),
        callbacks=[counter],
    )
    trainer.train()
    trainer.save_model()
    return record(trainer) | {"calls": counter.calls, "best": trainer.state.best_global_step}


class SmoothedLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        labels = inputs["labels"][:, 1:].flatten()
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


def causal_language_model(
    folder, samples, trainer_class=Trainer, resume_from_checkpoint=None, evaluate=False, **options
):
    def data(count, seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
        texts = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
        return [{"input_ids": text, "labels": text} for text in texts]

    def collate(samples):
        def pad(name, value):
            return torch.nn.utils.rnn.pad_sequence([s[name] for s in samples], True, value)

        inputs = pad("input_ids", 0)
        return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": pad("labels", -100)}

    set_seed(7)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**common(folder, max_steps=3, **options)),
        data_collator=collate,
        train_dataset=data(samples, 9),
        eval_dataset=data(7, 10),
    )
    trainer.train(resume_from_checkpoint)
    trainer.save_model()
    return record(trainer) | ({"loss": trainer.evaluate()["eval_loss"]} if evaluate else {})


def resumed(folder, samples):
    options = {"lr_scheduler_type": "cosine", "save_steps": 2}
    causal_language_model(folder, samples, **options, save_strategy="steps")
    return causal_language_model(folder, samples, **options, resume_from_checkpoint=str(folder / "checkpoint-2"))


def own_loss(folder, samples):
    return causal_language_model(folder, samples, SmoothedLoss)


def label_smoothing(folder, samples):
    options = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    return causal_language_model(folder, samples, evaluate=True, **options)


def summarisation(folder, samples):
    def data(count, seed):
        generator = torch.Generator().manual_seed(seed)
        result = []
        for _ in range(count):
            length = int(torch.randint(6, 13, (), generator=generator))
            text = torch.randint(2, VOCABULARY, (length,), generator=generator)
            result.append({"input_ids": text.tolist(), "labels": text[:4].tolist()})
        return result

    def collate(samples):
        def pad(values, value):
            longest = max(len(v) for v in values)
            return torch.tensor([v + [value] * (longest - len(v)) for v in values])

        inputs = pad([s["input_ids"] for s in samples], 0)
        return {
            "input_ids": inputs,
            "attention_mask": (inputs != 0).long(),
            "labels": pad([s["labels"] for s in samples], -100),
        }

    set_seed(7)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )

    def compute_metrics(prediction):
        tokens, labels = prediction.predictions, prediction.label_ids
        assert tokens.shape[1] == GENERATED, tokens.shape
        same = tokens[:, 1 : labels.shape[1]] == labels[:, : labels.shape[1] - 1]
        return {"same": float(same.mean()), "generated": float(tokens.mean())}

    options = common(folder, max_steps=5, optim="sgd", eval_strategy="steps", eval_steps=2)
    options |= {"predict_with_generate": True, "generation_max_length": GENERATED}
    model.generation_config.max_length = GENERATED
    # A model that has hardly been trained repeats one token.
    model.generation_config.no_repeat_ngram_size = 1
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**options),
        data_collator=collate,
        train_dataset=data(samples, 3),
        eval_dataset=data(9, 4),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    prediction = trainer.predict(data(7, 5), num_beams=2)
    trainer.save_model()
    return record(trainer) | {"predictions": prediction.predictions.tolist()}


def image_classification(folder, samples):
    def data(count, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 3, (count,), generator=generator)
        images = torch.randn(count, 3, 8, 8, generator=generator) + labels.reshape(-1, 1, 1, 1)
        return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels)]

    def compute_metrics(prediction):
        return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}

    set_seed(7)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=3,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**common(folder, num_train_epochs=1, remove_unused_columns=False)),
        train_dataset=data(samples, 5),
        eval_dataset=data(11, 6),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    metrics = trainer.evaluate()
    prediction = trainer.predict(data(7, 8))
    trainer.save_model()
    return record(trainer) | {"accuracy": metrics["eval_accuracy"], "predictions": prediction.predictions.tolist()}


def main():
    parser = HfArgumentParser((TrainingArguments, DataArguments))
    args, data_args = parser.parse_args_into_dataclasses()
    folder = Path(args.output_dir)
    tasks = (masked_language_model, resumed, own_loss, label_smoothing, summarisation)
    tasks += (image_classification,)
    result = {task.__name__: task(folder / task.__name__, data_args.samples) for task in tasks}
    if args.process_index == 0:
        print("RECORD", json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main())
