"""Several processes share a training: the same losses as one, the same weights in all, and no silence when one is lost."""

import os
from dataclasses import replace

import pytest
import torch
from test_diffusion import SETTINGS, build_tiny_pipeline, draw_images, fit, read_adapter

from medaug import diffusion, parallel, tuning

CPU = torch.device("cpu")


@pytest.fixture
def pipe(tmp_path):
    return diffusion.load_pipeline(build_tiny_pipeline(tmp_path / "sd"))


def test_alone_nothing_is_shared():
    batch = {"rows": torch.arange(5)}
    assert (parallel.rank(), parallel.count(), parallel.weigh_share(5)) == (0, 1, 1.0)
    assert torch.equal(parallel.take_share(batch)["rows"], batch["rows"])


def test_gradient_and_loss_are_those_of_the_whole_batch():
    weights, rows = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)], torch.arange(7.0)

    def square(rows):
        return (weights[0].sum() * rows - weights[1].prod()).square().mean()

    def work(bucket):
        parallel.BUCKET = bucket
        share = parallel.weigh_share(len(rows))
        loss = square(parallel.take_share({"rows": rows})["rows"])
        loss.backward()
        parallel.sum_gradients(weights, share)
        parallel.check_same([weight - weight.grad for weight in weights])
        return parallel.sum_shares(loss.item(), share), parallel.agree(parallel.rank() == 0)

    whole = square(rows)
    expected = torch.autograd.grad(whole, weights)
    usual = parallel.BUCKET
    with parallel.open_team(work, (3,), 3, CPU):  # 7 rows: shares of 3, 2 and 2; each weight in a bucket of its own
        assert parallel.count() == 3
        assert work(3) == (pytest.approx(whole.item()), True)
    parallel.BUCKET = usual
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
    assert parallel.count() == 1


def test_two_processes_train_what_one_trains_and_resume(pipe, tmp_path):
    settings = replace(SETTINGS, batch_size=7)
    alone, history, _ = fit(pipe, settings, dropout=0.0)
    asked = []

    def kill(unet, step):  # at step 3, after the checkpoint of step 2
        raise KeyboardInterrupt

    shared = replace(settings, processes=2)
    with pytest.raises(KeyboardInterrupt):
        fit(pipe, shared, tmp_path / "checkpoint.pt", kill, dropout=0.0)
    assert parallel.count() == 1 and torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    together, again, timing = fit(pipe, shared, tmp_path / "checkpoint.pt", lambda unet, step: asked.append(step) or {}, dropout=0.0)
    assert asked == [3, 6] and timing["images"] == 42  # process 0 alone validates
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in history], rel=1e-4)
    for name, weight in read_adapter(together).items():  # Adam's first steps have the size of the rate, however small the gradient
        torch.testing.assert_close(weight, read_adapter(alone)[name], atol=0.01, rtol=0)
        assert (weight - read_adapter(alone)[name]).abs().mean() < 1e-3


def test_learned_words_and_an_early_end_are_shared_too(pipe):
    prompts = tuning.add_placeholders(pipe, {"normal": "a chest, normal lungs", "viral": "a chest, viral pneumonia"})
    lesson = tuning.Lesson(diffusion.encode_latents(pipe.vae, draw_images(20)), torch.arange(20) % 2, list(prompts.values()))
    settings = replace(SETTINGS, steps=12, validate_every=2, patience=2, processes=2, learning_rate=0.1)
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    history, _ = tuning.fit_inversion(pipe, lesson, settings, validate=lambda step: {"val_loss": float(step)})
    assert [row["step"] for row in history] == [2, 4, 6]  # the loss never falls: two validations after the first it ends
    assert not torch.equal(pipe.text_encoder.get_input_embeddings().weight, before)


def test_a_lost_process_is_an_error_and_not_a_long_wait():
    def work():
        if parallel.rank():
            raise ValueError("no more memory in this one")
        parallel.sum_shares(1.0, 1.0)

    with pytest.raises(RuntimeError, match="process 1 of the 2 that share.*no more memory in this one"):
        with parallel.open_team(work, (), 2, CPU):
            work()
    assert parallel.count() == 1


def test_weights_that_drift_apart_are_noticed():
    def work():
        parallel.check_same([torch.ones(2) * parallel.rank()])

    with pytest.raises(RuntimeError, match="drifted apart.*from 0 to 2.*processes = 1"):
        with parallel.open_team(work, (), 2, CPU):
            work()


def test_more_processes_than_there_is_work_or_gpus(monkeypatch, pipe):
    with pytest.raises(ValueError, match="batch of 1 cannot be shared by 2"):
        fit(pipe, replace(SETTINGS, batch_size=1, processes=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"processes = 2, but there are 1 GPU\(s\)"):
        with parallel.open_team(os.getpid, (), 2, torch.device("cuda")):
            pass
    with pytest.raises(ValueError, match="needs device cpu or cuda, not mps"):
        with parallel.open_team(os.getpid, (), 2, torch.device("mps")):
            pass
