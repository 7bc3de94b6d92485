"""Scripts as strangers write them: an ordinary module, and at most three lines of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from helpers import make_trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset

from lightning_noise import AdaptiveLevel, EmbeddingNoise, InputNoise, ReplayMonitor, RobustnessMonitor, noise, tasks

N = 96


class Samples(Dataset):
    """Rows of a dict, or of a tuple of tensors."""

    def __init__(self, *columns: Tensor, **named: Tensor):
        self.columns, self.named = columns, named

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return {name: column[i] for name, column in self.named.items()} or tuple(column[i] for column in self.columns)


class Module(pl.LightningModule):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))  # type: ignore[arg-type]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(module: pl.LightningModule, data: Dataset, callbacks: list[pl.Callback], epochs: int = 6) -> dict[str, float]:
    trainer = make_trainer(callbacks, max_epochs=epochs)
    trainer.fit(module, DataLoader(data, batch_size=32), DataLoader(data, batch_size=32))
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


@pytest.fixture(autouse=True)
def seed():
    pl.seed_everything(0, verbose=False)


def numbers(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(0))


# --- the three scripts


class ImageClassifier(Module):
    """Images in a dictionary; the loss is in the training step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["image"]), batch["label"])


def test_images_in_a_dictionary():
    images = numbers(1, 8, 8).sigmoid()
    data = Samples(image=images, label=(images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long())
    module = ImageClassifier()
    found = train(module, data, [InputNoise(noise.Gaussian(), 0.1), RobustnessMonitor()], epochs=20)
    right = module.eval()(images).argmax(1) == data.named["label"]
    assert found["robustness/accuracy_clean"] == pytest.approx(right.float().mean().item())
    assert found["robustness/accuracy_clean"] > 0.8
    assert found["robustness_levels/gaussian/0.38/accuracy"] < found["robustness_levels/gaussian/0.08/accuracy"]


class Forecaster(Module):
    """Series (B, T, C), with or without lengths, whose next value is to be predicted."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x, lengths):
        states, _ = self.rnn(x)
        return self.head(states[torch.arange(len(x)), lengths - 1])

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        return mse_loss(self(x, lengths).squeeze(1), y)


class WholeForecaster(Forecaster):
    def forward(self, x):  # type: ignore[override]
        return super().forward(x, torch.full((len(x),), x.shape[1]))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return mse_loss(self(x).squeeze(1), y)


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.filterwarnings("ignore:.*is 0 wherever '1' marks padding")
def test_series_with_a_number_to_predict(is_padded):
    lengths = torch.randint(3, 9, (N,), generator=torch.Generator().manual_seed(0)) if is_padded else torch.full((N,), 8)
    x = numbers(8, 2) * (torch.arange(8) < lengths[:, None])[..., None]
    y = x[torch.arange(N), lengths - 1, 0]
    module = Forecaster() if is_padded else WholeForecaster()
    data = Samples(x, lengths, y) if is_padded else Samples(x, y)
    monitor = RobustnessMonitor([noise.Gaussian(), noise.Drift(dim=-2)], task=tasks.Regression())
    found = train(module, data, [InputNoise(noise.Gaussian(), 0.1), monitor])
    outputs = module.eval()(x, lengths) if is_padded else module.eval()(x)
    assert found["robustness/mse_clean"] == pytest.approx(mse_loss(outputs[:, 0], y).item(), rel=1e-4)
    assert found["robustness/mse_noisy"] > found["robustness/mse_clean"]
    assert found["robustness/r2_retention"] < 1


@dataclass
class Output:
    """Like the outputs of Hugging Face."""

    logits: Tensor
    hidden_states: Tensor


class TextClassifier(Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        states = (self.embedding(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return Output(self.head(states), states)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["input_ids"], batch["attention_mask"]).logits, batch["label"])


def test_token_ids_with_a_mask():
    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(1, 20, (N, 6), generator=generator), torch.randint(2, 7, (N,), generator=generator)
    mask = (torch.arange(6) < lengths[:, None]).long()
    data = Samples(input_ids=ids * mask, attention_mask=mask, label=(ids[:, 0] > 9).long())
    module = TextClassifier()
    callbacks = [EmbeddingNoise(5.0, mask="attention_mask"), RobustnessMonitor(EmbeddingNoise(mask="attention_mask"))]
    found = train(module, data, callbacks)
    right = module.eval()(ids * mask, mask).logits.argmax(1) == data.named["label"]
    assert found["robustness/accuracy_clean"] == pytest.approx(right.float().mean().item())
    assert found["robustness/accuracy_worst"] < found["robustness/accuracy_clean"]


def test_noise_in_token_ids_is_refused_with_the_line_for_their_embeddings():
    ids = torch.ones(N, 6, dtype=torch.long)
    data = Samples(input_ids=ids, attention_mask=ids, label=ids[:, 0])
    with pytest.raises(ValueError, match=r"type EmbeddingNoise\(mask='attention_mask'\) in place of a noise"):
        train(TextClassifier(), data, [RobustnessMonitor()])


# --- other modules


class Segmenter(Module):
    """A class for each pixel."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image):
        return {"logits": self.net(image)}

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["image"])["logits"], batch["mask"])


class Table(Module):
    """Numbers and categories."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(7, 1)

    def forward(self, numeric, category):
        return self.head(torch.cat([numeric, self.embedding(category)], 1))

    def training_step(self, batch, batch_idx):
        return mse_loss(self(batch["numeric"], batch["category"])[:, 0], batch["price"])


class Adversarial(Module):
    """Manual optimization with two optimizers; the class is what one wants to know."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.head, self.critic = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        main, critic = self.optimizers()  # type: ignore[misc]
        for optimizer, loss in (
            (main, lambda: cross_entropy(self(x), y)),
            (critic, lambda: self.critic(self.encoder(x)).square().mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters()), torch.optim.Adam(self.critic.parameters())


class Autoencoder(Module):
    """Without labels: the metric is the module's own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 6)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return mse_loss(self(x), x)


class Wrapper(Module):
    """Hands a whole batch to the wrapped model, which computes the loss."""

    def __init__(self):
        super().__init__()
        self.model = TextClassifier()

    def forward(self, **inputs):
        labels = inputs.pop("labels", None)
        output = self.model(**inputs)
        loss = None if labels is None else cross_entropy(output.logits, labels)
        return {"loss": loss, "logits": output.logits}

    def training_step(self, batch, batch_idx):
        return self(**batch)["loss"]


INTEGERS = torch.arange(N) % 3
OTHERS: dict[str, tuple[type[Module], Samples, list[Any]]] = {
    "segmentation": (
        Segmenter,
        Samples(image=numbers(3, 8, 8).sigmoid(), mask=INTEGERS[:, None, None].expand(N, 8, 8)),
        [InputNoise(noise.Gaussian(), AdaptiveLevel()), RobustnessMonitor(target="mask")],
    ),
    "table": (
        Table,
        Samples(numeric=numbers(3), category=INTEGERS, price=numbers(1)[:, 0]),
        [RobustnessMonitor(noise.Gaussian(), inputs="numeric", target="price", task=tasks.Regression())],
    ),
    "manual optimization": (
        Adversarial,
        Samples(numbers(6), INTEGERS),
        [InputNoise(noise.Gaussian(), 0.1), RobustnessMonitor()],
    ),
    "autoencoder": (Autoencoder, Samples(numbers(6)), [InputNoise(noise.Gaussian(), 0.1), ReplayMonitor()]),
    "wrapped model": (
        Wrapper,
        Samples(input_ids=INTEGERS[:, None].expand(N, 4), attention_mask=torch.ones(N, 4).long(), labels=INTEGERS % 2),
        [RobustnessMonitor(EmbeddingNoise(mask="attention_mask"))],
    ),
}


@pytest.mark.filterwarnings("ignore:.*the input is also the target of the loss")
@pytest.mark.parametrize(("module", "data", "callbacks"), OTHERS.values(), ids=OTHERS)
def test_a_module_that_was_never_seen_runs_at_the_first_attempt(module, data, callbacks):
    found = train(module(), data, callbacks, epochs=1)
    assert any(key.startswith(("robustness/score", "replay/")) for key in found)
