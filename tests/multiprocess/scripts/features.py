"""Goes through what `accelerate.Accelerator` offers to a training loop, feature by feature. Knows nothing of RaNNC."""

import json
import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, gather_object, set_seed
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

SAMPLES, LENGTH, CLASSES = 40, 8, 3


class Classifier(nn.Module):
    """Small, so that many of them can be trained one after another; returns what models of Transformers return."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16)) for _ in range(3))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input_ids, labels=None):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits = self.head(hidden.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def make_model(seed=11):
    set_seed(seed)
    return Classifier()


def make_loader(batch_size=4, shuffle=True, samples=SAMPLES):
    generator = torch.Generator().manual_seed(3)
    data = [
        {
            "input_ids": torch.randint(1, 50, (LENGTH,), generator=generator),
            "labels": torch.tensor(i % CLASSES),
        }
        for i in range(samples)
    ]
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, collate_fn=default_data_collator)


def make_optimizer(parameters, lr=5e-3):
    return torch.optim.AdamW(parameters, lr=lr, eps=1e-6)


def mean(accelerator, loss):
    return accelerator.reduce(loss.detach(), "mean").item()


def accumulate(accelerator):
    """Three batches a step, and what is left at the end of the loader; the norm is clipped when gradients are whole."""
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model.parameters()), make_loader())
    record = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    record.append(accelerator.clip_grad_norm_(model.parameters(), 0.7).item())
                optimizer.step()
                optimizer.zero_grad()
            record += [mean(accelerator, loss), accelerator.sync_gradients]
    return model, record


def no_sync(accelerator):
    """Accumulation by hand, and gradients clipped by value."""
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model.parameters()), make_loader())
    record = []
    for index, batch in enumerate(loader):
        if index % 2 == 0:
            with accelerator.no_sync(model):
                accelerator.backward(model(**batch).loss / 2)
            continue
        with accelerator.autocast():
            loss = model(**batch).loss
        accelerator.backward(loss / 2)
        accelerator.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        record.append(mean(accelerator, loss))
    return model, record


def several_optimizers(accelerator):
    """One optimizer and scheduler for the embedding, another pair for the rest."""
    model = make_model()
    embeddings = list(model.embedding.parameters())
    rest = [p for n, p in model.named_parameters() if not n.startswith("embedding.")]
    optimizers = [make_optimizer(embeddings, 1e-2), torch.optim.SGD(rest, lr=0.05, momentum=0.9)]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 1 / (1 + step)),
        torch.optim.lr_scheduler.OneCycleLR(optimizers[1], max_lr=0.1, total_steps=10),
    ]
    model, loader, *prepared = accelerator.prepare(model, make_loader(), *optimizers, *schedulers)
    record = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        for item in prepared:
            item.step()
        for optimizer in prepared[:2]:
            optimizer.zero_grad()
        record += [mean(accelerator, loss), *[rate for s in prepared[2:] for rate in s.get_last_lr()]]
    return model, record


def frozen_parameters(accelerator):
    """The embedding and a layer in the middle are not trained; the optimizer is told of all parameters."""
    model = make_model()
    model.embedding.requires_grad_(False)
    model.layers[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, eps=1e-6, weight_decay=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    record = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        record.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
        assert all(p.requires_grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        record.append(mean(accelerator, loss))
    return model, record


def skip_first_batches(accelerator):
    """An epoch that goes on in its middle."""
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model.parameters()), make_loader())
    accelerator.register_for_checkpointing(Counter())
    record = []
    for batch in accelerator.skip_first_batches(loader, 3):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        record.append(mean(accelerator, loss))
    return model, [*record, len(record)]


class Counter:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def evaluation(accelerator):
    """Metrics over a set that does not divide evenly, between steps of training."""
    model = make_model()
    model, optimizer, train, test = accelerator.prepare(
        model, make_optimizer(model.parameters()), make_loader(), make_loader(shuffle=False, samples=21)
    )
    record = []
    for step, batch in enumerate(train):
        model.train()
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            continue
        model.eval()
        for samples in test:
            with torch.no_grad():
                outputs = model(**samples)
            logits, labels = accelerator.gather_for_metrics((outputs.logits, samples["labels"]))
            record += logits.flatten().tolist() + labels.tolist()
            names = accelerator.gather_for_metrics([f"label {n}" for n in samples["labels"].tolist()])
            record.append(sorted(names))
    return model, record


def communication(accelerator):
    """Collectives of scripts between those of the model."""
    model = make_model()
    model, loader = accelerator.prepare(model, make_loader())
    record = []
    for index, batch in enumerate(loader):
        loss = model(**batch).loss
        accelerator.backward(loss)
        own = torch.full((accelerator.process_index + 1, 2), float(index), device=accelerator.device)
        record.append(accelerator.gather(accelerator.pad_across_processes(own, dim=0, pad_index=-1)).tolist())
        record.append(accelerator.reduce(own.sum(), "sum").item())
        record.append(gather_object([accelerator.process_index]))
        record += broadcast_object_list([f"from {accelerator.process_index}"])
        if accelerator.process_index == 1 and index == 2:
            accelerator.set_trigger()
        if accelerator.check_trigger():
            record.append(index)
            break
    with accelerator.main_process_first():
        record.append(accelerator.num_processes)
    return model, record


def second_model(accelerator):
    """One training after another with the same accelerator."""
    record = []
    for seed in (1, 2):
        model = make_model(seed)
        optimizer, loader = make_optimizer(model.parameters()), make_loader()
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            record.append(mean(accelerator, loss))
        if seed == 1:
            model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
            assert model is None and optimizer is None and loader is None
    return model, record


def plain_loop(accelerator):
    """For other ways of loading data."""
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model.parameters()), make_loader(8))
    record = [len(loader)]
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        record += [mean(accelerator, loss), len(batch["labels"])]
    return model, record


FEATURES = [
    (accumulate, {"gradient_accumulation_steps": 3}),
    (no_sync, {}),
    (several_optimizers, {}),
    (frozen_parameters, {}),
    (skip_first_batches, {}),
    (evaluation, {}),
    (communication, {}),
    (second_model, {}),
    ("split_batches", {"dataloader_config": DataLoaderConfiguration(split_batches=True)}),
    ("dispatch_batches", {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)}),
]


def main():
    folder, record = sys.argv[1], {}
    for feature, options in FEATURES:
        accelerator = Accelerator(**options)
        function, name = (plain_loop, feature) if isinstance(feature, str) else (feature, feature.__name__)
        model, values = function(accelerator)
        record[name] = values
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            save_file({k: v.contiguous() for k, v in state.items()}, os.path.join(folder, f"{name}.safetensors"))
        accelerator.wait_for_everyone()
        wrapper = type(model).__name__
        (model,) = accelerator.clear(model)
    accelerator.print("RECORD", json.dumps({**record, "model": wrapper}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
