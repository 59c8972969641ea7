"""Rates and remaining time, with a clock of the test's own."""

import time

import pytest
import torch

from rmoe_megatron.training.throughput import Throughput
from tests.support.configurations import one_rank, tiny_config


def test_pauses_count_in_the_remaining_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with one_rank(tiny_config()):
        throughput = Throughput(tiny_config(), torch.device("cpu"))
        assert throughput.remaining(10) is None
        for _ in range(5):
            now[0] += 2.0
            throughput.count(8, waited=0.25)
        rates = throughput.rates()
        assert rates["samples_per_second"] == 4.0
        assert rates["data_wait_seconds"] == 0.25
        assert throughput.remaining(10) == 20.0
        for _ in range(2):  # a second save of the same length changes nothing
            with throughput.paused("saving", every=5):
                now[0] += 10.0
            assert throughput.remaining(10) == 20.0 + 10 * 2.0
        now[0] += 2.0
        throughput.count(8, waited=1.0)
        rates = throughput.rates()
        assert rates["samples_per_second"] == 4.0
        assert rates["data_wait_seconds"] == 1.0
