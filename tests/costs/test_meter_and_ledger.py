import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedbt_app.costs.ledger import Cause, ClientCosts, Downlink, Ledger
from fedbt_app.costs.meter import FlopMeter, Stopwatch


def product(rows: int) -> torch.Tensor:
    return torch.ones(rows, 3) @ torch.ones(3, 5)


# FlopMeter ----------------------------------------------------------------------------------------


def test_a_product_counts_two_flops_for_each_multiply_add() -> None:
    meter = FlopMeter()
    assert meter.step(4, lambda: product(4)).shape == (4, 5)
    assert meter.total == 2 * 4 * 3 * 5


def test_the_meter_adds_every_step_up_whether_its_shape_is_new_or_known() -> None:
    meter, run = FlopMeter(), []
    for rows in (4, 2, 4, 4, 2):
        meter.step(rows, lambda rows=rows: run.append(product(rows)))
    assert meter.total == 2 * 3 * 5 * (4 + 2 + 4 + 4 + 2)
    assert [len(one) for one in run] == [4, 2, 4, 4, 2]


def test_the_backward_pass_is_counted() -> None:
    weight, inputs = torch.ones(3, 5, requires_grad=True), torch.ones(4, 3)
    meter = FlopMeter()
    meter.step("linear", lambda: (inputs @ weight).sum().backward())
    assert meter.total == 2 * (2 * 4 * 3 * 5)


def test_the_cpus_fused_attention_is_counted_forward_and_backward() -> None:
    query, key, value = (torch.randn(2, 4, 8, 16, requires_grad=True) for _ in range(3))
    attend, one = torch.nn.functional.scaled_dot_product_attention, 2 * (2 * 4) * 8 * 8 * 16
    for mask in (None, torch.ones(2, 1, 1, 8, dtype=torch.bool)):
        forward, both = FlopMeter(), FlopMeter()
        forward.step(
            0,
            lambda mask=mask: attend(query.detach(), key.detach(), value.detach(), attn_mask=mask),
        )
        both.step(0, lambda mask=mask: attend(query, key, value, attn_mask=mask).sum().backward())
        assert forward.total == 2 * one
        assert both.total == (2 + 5) * one


def test_the_meter_counts_what_torchs_own_counter_does() -> None:
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    inputs = torch.randn(3, 8, 16)
    meter = FlopMeter()
    meter.step(0, lambda: block(inputs).sum().backward())
    with FlopCounterMode(display=False) as counter:
        block(inputs).sum().backward()
    assert meter.total == counter.get_total_flops() > 0


def test_the_meter_refuses_to_count_where_it_would_see_too_little() -> None:
    with torch.inference_mode(), pytest.raises(AssertionError, match="use no_grad"):
        FlopMeter().step(0, lambda: product(4))


def test_the_meter_does_not_hide_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        FlopMeter().step(0, lambda: 1 // 0)


# Ledger -------------------------------------------------------------------------------------------


def test_the_work_of_several_clients_is_summed_never_averaged() -> None:
    books = Ledger()
    for flops, seconds, size in ((10, 1.0, 500), (20, 3.0, 900), (30, 2.0, 100)):
        books.book_work(
            ClientCosts(
                train_flops=flops,
                stock_flops=3 * flops,
                same_flops=2 * flops,
                seconds=seconds,
                peak_memory_bytes=size,
                prefix_cache_bytes=2 * size,
                saved_flops=4 * flops,
            )
        )
    assert (books.train_flops, books.saved_flops) == (60, 240)
    assert (books.stock_flops, books.same_flops) == (180, 120)
    assert books.client_seconds == 6.0
    assert books.peak_memory_bytes == 900  # of the one with the most
    assert books.prefix_cache_bytes == 1800


def test_a_message_is_booked_by_cause_and_each_byte_once() -> None:
    books = Ledger()
    sent = Downlink()
    for cause, size in (
        (Cause.ROUND, 250),
        (Cause.FIRST_CONTACT, 200),
        (Cause.CATCH_UP, 100),
        (Cause.ROUND, 50),
    ):
        sent.add(cause, size)
    assert (sent, sent.total) == (Downlink(round=300, first_contact=200, catch_up=100), 600)
    books.book_request(sent, 1000, evaluation=False)
    assert (books.first_contact_bytes, books.catch_up_bytes) == (200, 100)
    assert books.downlink_bytes == 300 + 400
    assert books.downlink_payload_bytes == 300
    books.book_request(Downlink(round=20), 50, evaluation=True)
    assert books.evaluation_bytes == 30
    assert books.downlink_bytes == 720
    causes = ("downlink_bytes", "first_contact_bytes", "catch_up_bytes", "evaluation_bytes")
    assert sum(getattr(books, name) for name in causes) == 1050


def test_a_message_without_parts_is_booked_under_its_own_head() -> None:
    books = Ledger()
    books.book_request(Downlink(), 70, evaluation=True)
    assert books == Ledger(evaluation_bytes=70)


# Stopwatch ----------------------------------------------------------------------------------------


def test_the_stopwatch_counts_up_and_sees_the_memory_of_the_process() -> None:
    watch = Stopwatch(torch.device("cpu"))
    first = watch.seconds
    time.sleep(0.001)
    assert 0 <= first < watch.seconds
    before = watch.peak_memory_bytes
    held = torch.ones(64 * 2**20 // 4)
    assert watch.peak_memory_bytes >= before + 32 * 2**20
    assert held.numel()
