"""Stand-ins for torch.cuda's functions: streams, events, random state and memory of a CPU process."""

import time

import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the platform is for machines without a GPU")


def test_streams_keep_their_place():
    """`record_stream` took no stand-in for a stream: torch checks the argument itself."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream) as entered:
        assert entered is stream
        torch.ones(2).record_stream(stream)
    with torch.cuda.stream(None):
        pass
    event = stream.record_event()
    torch.cuda.current_stream().wait_event(event)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert stream.query() and event.query()


def test_events_measure_milliseconds():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    before = time.perf_counter()
    time.sleep(0.02)
    elapsed = (time.perf_counter() - before) * 1e3
    end.record()
    assert elapsed <= start.elapsed_time(end) < elapsed + 500


def test_random_state_is_the_cpu_generators():
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.manual_seed(7)
    first = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(4), first)


def test_megatrons_tracker_forks_it():
    """A fork draws its own numbers, goes on where it stopped, and gives the outer state back."""
    tracker = CudaRNGStatesTracker()
    tracker.add("model", 11)
    torch.manual_seed(3)
    outer = torch.rand(4)
    torch.manual_seed(3)
    with tracker.fork("model"):
        first = torch.rand(2)
    with tracker.fork("model"):
        second = torch.rand(2)
    assert torch.equal(torch.rand(4), outer)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(2), first) and torch.equal(torch.rand(2), second)


def test_memory_is_that_of_the_process():
    before = torch.cuda.memory_allocated()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = torch.cuda.memory_allocated()
    assert 60 * 2**20 < after - before < 100 * 2**20
    del block
    # The kernel counts pages in batches, so that its record of the peak may lack a few.
    assert torch.cuda.memory_allocated() < torch.cuda.max_memory_allocated() > after - 2**20
    stats = torch.cuda.memory_stats()
    assert stats["allocated_bytes.all.peak"] >= stats["allocated_bytes.all.current"] > 0
    assert stats["num_alloc_retries"] == 0
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total == torch.cuda.get_device_properties(0).total_memory


def test_one_device_without_capabilities():
    """Features that ask for a GPU generation stay off; model parallelism is set up where a device is counted."""
    assert (torch.cuda.device_count(), torch.cuda.current_device()) == (1, 0)
    assert torch.cuda.get_device_capability() == (0, 0)
    assert torch.cuda.get_device_name() == torch.cuda.get_device_properties(0).name == "cpu"
    assert not torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def test_profiler_ranges_are_nothing():
    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.range_pop()
    with torch.cuda.nvtx.range("step"):
        pass
