"""RanncTrainer in one process: what scripts do with it, against Transformers' own Trainer."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from rannc_hf import RanncModel, RanncTrainer
from tests.integrations.trainers import (
    Regression,
    accuracy,
    classifier,
    history,
    language_model,
    make,
    masked,
    points,
    same,
    same_weights,
    sentences,
    weights,
)

pytestmark = pytest.mark.usefixtures("environment")


def train_both(folder, build, data, kinds=(Trainer, RanncTrainer), **options):
    """Both trainers after training, with the same history and the same weights."""
    trainers = []
    for kind in kinds:
        trainer = make(kind, folder / kind.__name__, build() if build else None, data, **dict(options))
        trainer.train()
        trainers.append((trainer, history(trainer), weights(trainer)))
    (theirs, expected, expected_weights), (ours, actual, actual_weights) = trainers
    assert isinstance(ours.model_wrapped, RanncModel) and ours.model_wrapped.partitioned
    same(actual, expected)
    same_weights(actual_weights, expected_weights)
    return theirs, ours


@pytest.mark.parametrize(
    "build, data, options",
    [
        (classifier, sentences, {"compute_metrics": accuracy}),
        (language_model, masked, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    ],
    ids=["classifier", "masked-lm"],
)
def test_training_evaluation_and_prediction(tmp_path, build, data, options):
    options |= {"eval_dataset": data(6, 2), "eval_strategy": "epoch", "lr_scheduler_type": "cosine"}
    theirs, ours = train_both(tmp_path, build, data(18), **options)
    expected, actual = theirs.predict(data(5, 3)), ours.predict(data(5, 3))
    np.testing.assert_allclose(actual.predictions, expected.predictions, atol=1e-5)
    np.testing.assert_array_equal(actual.label_ids, expected.label_ids)
    assert actual.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"])
def test_optimizers(tmp_path, name):
    train_both(tmp_path, Regression, points(12), optim=name, num_train_epochs=1)


def test_a_scheduler_that_looks_at_metrics(tmp_path):
    options = {"eval_dataset": points(6, 2), "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    options |= {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.2}}
    _, ours = train_both(tmp_path, Regression, points(24), num_train_epochs=1, **options)
    assert len({entry["learning_rate"] for entry in ours.state.log_history if "learning_rate" in entry}) > 1


def test_optimizer_and_scheduler_of_the_script(tmp_path):
    def options(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"optimizers": (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))}

    results = []
    for kind in (Trainer, RanncTrainer):
        model = Regression()
        trainer = make(kind, tmp_path, model, points(12), max_steps=3, **options(model))
        trainer.train()
        results.append(weights(trainer))
    same_weights(results[1], results[0])


class WithOwnLoss:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.l1_loss(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


class StockOwn(WithOwnLoss, Trainer):
    pass


class RanncOwn(WithOwnLoss, RanncTrainer):
    pass


def test_loss_of_a_subclass(tmp_path):
    options = {"gradient_accumulation_steps": 2, "eval_dataset": points(6, 2), "eval_strategy": "epoch"}
    _, ours = train_both(tmp_path, Regression, points(18), kinds=(StockOwn, RanncOwn), **options)
    assert ours.accelerator.rannc.loss == "split"


def scaled_loss(outputs, labels, num_items_in_batch=None):
    return (outputs["logits"] - labels).square().sum() / num_items_in_batch


def test_loss_function_of_the_script(tmp_path):
    train_both(tmp_path, Regression, points(18), compute_loss_func=scaled_loss, gradient_accumulation_steps=2)


def test_label_smoothing(tmp_path):
    train_both(tmp_path, classifier, sentences(8), label_smoothing_factor=0.1, num_train_epochs=1)


def test_evaluation_before_training_and_training_twice(tmp_path):
    results = []
    for kind in (Trainer, RanncTrainer):
        trainer = make(kind, tmp_path, Regression(), points(12), eval_dataset=points(5, 2), num_train_epochs=1)
        losses = [trainer.evaluate()["eval_loss"]]
        for _ in range(2):
            trainer.train()
            losses.append(trainer.evaluate()["eval_loss"])
        results.append((losses, weights(trainer)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    same_weights(results[1][1], results[0][1])


def test_model_init(tmp_path):
    train_both(tmp_path, None, points(12), model_init=Regression)


def test_best_model_at_the_end_is_loaded_by_plain_transformers(tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"metric_for_best_model": "loss", "save_total_limit": 2, "load_best_model_at_end": True}
    # The better it fits, the worse it is on labels that are others.
    others = [sample | {"labels": (sample["labels"] + 1) % 3} for sample in sentences(12)]
    options |= {"callbacks": [EarlyStoppingCallback(1)], "eval_dataset": others}
    theirs, ours = train_both(tmp_path, classifier, sentences(12), **options)
    assert ours.state.best_global_step == theirs.state.best_global_step < ours.state.global_step
    ours.save_model()
    again = AutoModelForSequenceClassification.from_pretrained(ours.args.output_dir)
    same_weights(dict(again.state_dict()), weights(theirs))


@pytest.mark.parametrize("first", [RanncTrainer, Trainer], ids=["own checkpoint", "checkpoint of Trainer"])
def test_resuming(tmp_path, first):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole = make(RanncTrainer, tmp_path / "whole", Regression(), points(12), **options)
    whole.train()
    begun = make(first, tmp_path / "begun", Regression(), points(12), **options)
    begun.train()
    (tmp_path / "begun" / "checkpoint-5" / "trainer_state.json").unlink()
    again = make(RanncTrainer, tmp_path / "begun", Regression(), points(12), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    same(history(again)[:-1], history(whole)[:-1])
    same_weights(weights(again), weights(whole))


def test_figures_are_in_the_logs_and_reach_other_callbacks(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make(RanncTrainer, tmp_path, Regression(), points(24), callbacks=[Tracker()], num_train_epochs=1)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 6
    assert all(entry["rannc/predicted_step_ms"] > 0 for entry in steps)
    assert {"rannc/step_ms", "rannc/tflops_per_device", "rannc/predicted_over_measured"} <= steps[-1].keys()
    assert not any(key.startswith("rannc/") for key in trainer.state.log_history[-1])
    assert [e["rannc/predicted_step_ms"] for e in seen[:-1]] == [e["rannc/predicted_step_ms"] for e in steps]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(tmp_path, precision):
    # The scale of fp16 falls until nothing overflows; these steps are skipped.
    options = {precision: True, "use_cpu": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = make(RanncTrainer, tmp_path, Regression(), points(16), **options)
    trainer.train()
    assert trainer.model_wrapped.compute_dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    exact = make(Trainer, tmp_path, Regression(), points(16), max_steps=1)
    exact.train()
    assert history(trainer)[0]["loss"] == pytest.approx(history(exact)[0]["loss"], rel=1e-2)
    again = make(RanncTrainer, tmp_path, Regression(), points(16), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same_weights(weights(again), weights(trainer))
