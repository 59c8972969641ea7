"""Rates and remaining time, with a clock of the test's own."""

import time

import pytest
import torch

from rmoe_megatron.data.batch import Batch, ClassConditions
from rmoe_megatron.model.flops import training_flops_per_sample
from rmoe_megatron.training.throughput import Throughput
from tests.support.configurations import one_rank, tiny_config


def test_pauses_count_in_the_remaining_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    null = ClassConditions(torch.zeros(4, dtype=torch.int64))
    batch = Batch(torch.zeros(4, 3, 4, 8), null, torch.zeros(4, dtype=torch.int64))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with one_rank(tiny_config()):
        throughput = Throughput(tiny_config(), torch.device("cpu"))
        assert throughput.remaining(10) is None
        for _ in range(5):
            now[0] += 2.0
            throughput.count([batch, batch], waited=0.25)
        rates = throughput.rates()
        assert rates["samples_per_second"] == 4.0
        assert rates["data_wait_seconds"] == 0.25
        assert rates["tokens_per_step"] == 8 * (5 + 2 * 4)  # text, and patches of 2 x 2
        assert rates["model_tflops"] == pytest.approx(4 * training_flops_per_sample(tiny_config(), 8) / 1e12)
        assert throughput.remaining(10) == 20.0
        for _ in range(2):  # a second save of the same length changes nothing
            with throughput.paused("saving", every=5):
                now[0] += 10.0
            assert throughput.remaining(10) == 20.0 + 10 * 2.0
        now[0] += 2.0
        throughput.count([batch, batch], waited=1.0)
        rates = throughput.rates()
        assert rates["samples_per_second"] == 4.0
        assert rates["data_wait_seconds"] == 1.0
