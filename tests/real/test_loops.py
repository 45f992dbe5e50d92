"""Evaluation loops that others publish, unchanged, with a handle where they expect a model: the figures are the same."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import isohub
from tests.real.installed import user_site
from tests.real.models import MODELS, repo_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]
BY_NAME = {model.name: model for model in MODELS}


class Sentences(Dataset):
    """Rows of tokens, and a label for each token: the next."""

    def __init__(self, count=12, length=8):
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(3, 40, (count, length), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return {"input_ids": self.rows[place], "labels": self.rows[place]}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model as torch.hub gives it in this process and as isohub gives it, by name."""
    known = {}
    with user_site(), isohub.Session(tmp_path_factory.mktemp("cache"), timeout_s=200) as session:

        def of(name):
            if name not in known:
                repo = str(repo_of(BY_NAME[name], tmp_path_factory.mktemp(name)))
                torch.manual_seed(0)
                local = torch.hub.load(repo, "model", source="local")
                known[name] = local, session.load(repo, "model", seed=0)
            return known[name]

        yield of


def without_times(figures):
    return {name: value for name, value in figures.items() if "time" not in name and "per_second" not in name}


def test_the_trainer_of_transformers_evaluates_and_predicts(both, tmp_path):
    from transformers import Trainer, TrainingArguments

    def score(prediction):
        logits, labels = prediction
        logits = logits[0] if isinstance(logits, tuple) else logits  # the hidden states may be there too
        return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:]).mean())}

    found = []
    for model, _ in both("gpt2"):
        arguments = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=5, disable_tqdm=True
        )
        trainer = Trainer(model=model, args=arguments, eval_dataset=Sentences(), compute_metrics=score)
        predicted = trainer.predict(Sentences(7))
        found.append(
            (
                without_times(trainer.evaluate()),
                [part.tolist() for part in torch.utils._pytree.tree_leaves(predicted.predictions)],
                without_times(predicted.metrics),
            )
        )
    local, remote = found
    assert local == remote
    assert {"eval_loss", "eval_accuracy"} <= set(local[0])


def test_a_pipeline_of_transformers_generates(both):
    from transformers import pipeline

    local, remote = (
        pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(
            ["a handle", "the worker answers"], max_new_tokens=5, do_sample=False
        )
        for model, tokenizer in ((both("gpt2")[0][0], both("gpt2")[0][1]), (both("gpt2")[1][0], both("gpt2")[0][1]))
    )
    assert local == remote
    assert len(local) == 2


def test_a_pipeline_of_diffusers_samples(both):
    from diffusers import DDPMPipeline

    images = []
    for (model, _), scheduler in zip(both("diffusion"), [both("diffusion")[0][1]] * 2, strict=True):
        sampled = DDPMPipeline(unet=model, scheduler=scheduler)
        sampled.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        images.append(sampled(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images)
    assert images[0].shape == (2, 16, 16, 1)
    assert (images[0] == images[1]).all()


def test_an_evaluator_of_ignite_scores(both):
    from ignite.engine import create_supervised_evaluator
    from ignite.metrics import Accuracy, Loss

    def shifted(output):
        return output.logits[:, :-1].transpose(1, 2)

    found = []
    for model, _ in both("gpt2"):
        model.train()  # the evaluator's own step calls eval()
        metrics = {"accuracy": Accuracy(), "loss": Loss(torch.nn.functional.cross_entropy)}
        evaluator = create_supervised_evaluator(
            model, metrics, prepare_batch=lambda batch, device, non_blocking: (batch["input_ids"], batch["labels"][:, 1:]),
            model_transform=shifted, output_transform=lambda x, y, y_pred: (y_pred, y),
        )  # fmt: skip
        evaluator.run(DataLoader(Sentences(), batch_size=5))
        found.append(dict(evaluator.state.metrics))
        assert model.training is False
    local, remote = found
    assert local == remote
    assert 0 <= local["accuracy"] <= 1 < local["loss"]


def test_a_loop_of_accelerate_with_metrics_of_torchmetrics(both):
    from accelerate import Accelerator
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
    from torchmetrics.text import Perplexity

    found = []
    for model, _ in both("gpt2"):
        accelerator = Accelerator(cpu=True)
        prepared, loader = accelerator.prepare(model, DataLoader(Sentences(), batch_size=4))
        prepared.eval()
        scores = MetricCollection(
            [
                MulticlassAccuracy(num_classes=len(both("gpt2")[0][1])),
                MulticlassF1Score(num_classes=len(both("gpt2")[0][1])),
            ]
        )
        perplexity = Perplexity()
        for batch in loader:
            with torch.no_grad():
                logits = prepared(input_ids=batch["input_ids"]).logits
            logits, wanted = accelerator.gather_for_metrics((logits[:, :-1], batch["labels"][:, 1:]))
            scores.update(logits.flatten(0, 1).argmax(-1), wanted.flatten())
            perplexity.update(logits, wanted)
        found.append(({name: float(value) for name, value in scores.compute().items()}, float(perplexity.compute())))
    assert found[0] == found[1]


def test_a_timer_of_torch_measures(both):
    from torch.utils.benchmark import Timer

    rows = Sentences().rows
    for model, _ in both("gpt2"):
        assert Timer("model(rows)", globals={"model": model, "rows": rows}).timeit(3).mean > 0
