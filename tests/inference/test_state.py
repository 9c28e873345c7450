"""Decoding with a state gives the full forward's logits, whoever joins and leaves; its size, and what it copies."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import agree, decode_at_random, full_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from single_process import build_model, random_tokens, transformer_config
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ksa.checkpoint.load import find_checkpoint, load_model
from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.huggingface.importer import import_checkpoint
from megatron_ksa.inference import memory
from megatron_ksa.inference.state import DecodingState, sequence_bytes
from megatron_ksa.kernels import dispatch
from megatron_ksa.kernels.ksa_decode import OP as DECODE
from megatron_ksa.platform import trainer_defaults

GOLDEN = Path(__file__).parents[1] / "golden" / "ksa_hf_tiny"
KSA = KSAConfig(enabled=True, chunk_size=4, window_chunks="[2, 1, 0, 2]", layer_pattern="kklf")
MODELS = {
    "dense": KSAConfig(),
    "hybrid": KSA,
    "two summaries, all of their own": dataclasses.replace(
        KSA, summary_tokens=2, independent_qk_norm=True, independent_layernorm=True
    ),
    "windows without summaries": dataclasses.replace(KSA, layer_pattern="w"),
    "windows beside summaries": dataclasses.replace(KSA, layer_pattern="wkwf"),
    "more summaries than text": dataclasses.replace(KSA, chunk_size=3, summary_tokens=4, layer_pattern="k"),
    "chunks of one token": dataclasses.replace(KSA, chunk_size=1, layer_pattern="kklf"),
    "windows longer than the sequence": dataclasses.replace(KSA, window_chunks="[99, 2, 11, 10]", layer_pattern="k"),
}


@pytest.mark.parametrize("every_slot", [False, True])
@pytest.mark.parametrize("ksa", MODELS.values(), ids=MODELS)
def test_sequences_that_join_and_leave_have_the_full_forwards_logits(ksa, every_slot):
    """Ragged batches; segments within a chunk, that complete one, and over several; windows that are left behind."""
    model = build_model(ksa, bases=(1e4, 5e5)).eval()
    decode_at_random(model, [41, 9, 1, 23, 30, 41], 3, every_slot=every_slot)


@pytest.mark.parametrize(
    "changes", [{"rotary_interleaved": True}, {"num_query_groups": 4}, {"num_query_groups": 1}, {"qk_layernorm": False}]
)
def test_kinds_of_heads(changes):
    model = build_model(KSA, transformer_config(**changes), rotary_percent=0.5).eval()
    decode_at_random(model, [33, 20, 33], 2, seed=1)


@st.composite
def cases(draw):
    """KSA settings, lengths and a seed of the order of steps."""
    ksa = KSAConfig(
        enabled=True,
        chunk_size=draw(st.integers(1, 5)),
        summary_tokens=draw(st.integers(1, 3)),
        window_chunks=f"[{draw(st.integers(0, 3))}, {draw(st.integers(0, 9))}]",
        layer_pattern=draw(st.sampled_from(["kf", "kk", "lk", "wk", "kw"])),
    )
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    return ksa, lengths, draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 99))


@given(cases())
@settings(max_examples=20, deadline=None)
def test_any_geometry(case):
    ksa, lengths, max_batch, segment, seed = case
    model = build_model(ksa, transformer_config(num_layers=2), bases=(1e4, 5e5)).eval()
    decode_at_random(model, lengths, max_batch, segment=segment, seed=seed)


def test_a_full_slot_that_waits_writes_nowhere_else():
    """Every slot runs at each step: summaries of a slot at max_length belonged behind the last row."""
    model = build_model(dataclasses.replace(KSA, layer_pattern="k")).eval()
    tokens = random_tokens(2, 19)
    expected = full_logits(model, tokens[1])
    with DecodingState(model, 2, 19, every_slot=True) as state:
        full, other = state.join(), state.join()
        state.prefill(full, tokens[0])
        state.prefill(other, tokens[1, :3])
        for place in range(3, 19):
            logits = state.decode([other], tokens[1, place : place + 1])
            agree(logits[0], expected[place])


def test_annealed_models_decode():
    model = build_model(KSA).eval()
    model.set_summary_coefficient(0.3)
    decode_at_random(model, [30, 12], 2)


def test_models_that_reset_documents_decode():
    """Every slot is one document: positions restarted at each step, counted from the token before."""
    model = build_model(KSA, reset_documents=True).eval()
    decode_at_random(model, [30, 12], 2)
    assert model.reset_documents


def test_the_model_is_as_before_when_the_state_ends():
    model, tokens = build_model(KSA).eval(), random_tokens(1, 30)[0]
    before = full_logits(model, tokens)
    with DecodingState(model, 1, 30) as state:
        state.prefill(state.join(), tokens[:13])
    assert torch.equal(full_logits(model, tokens), before)


def test_released_implementation_decodes_to_the_same_logits(megatron_flags, tmp_path):
    """The released implementation's full forward, token by token here."""
    import_checkpoint(GOLDEN, tmp_path)
    model = load_model(find_checkpoint(tmp_path), trainer_defaults(), torch.float32)
    tokens, expected = (torch.tensor(np.load(GOLDEN / f"{name}.npy")) for name in ("input_ids", "logits"))
    with DecodingState(model, 1, tokens.shape[1]) as state:
        slot = state.join()
        logits = torch.cat([state.decode([slot], token) for token in tokens[0].split(1)])
    assert (logits - expected[0]).abs().max() < 1e-4


def test_bytes_are_those_of_rings_and_summaries():
    """W + 1 chunks of text and S rows for each complete chunk; every token in a full layer or an endless window."""
    model = build_model(dataclasses.replace(KSA, layer_pattern="klwf")).eval()
    state = DecodingState(model, 3, 1001)
    rows = (3 * 4 + 250) + 1004 + 1 * 4 + 1001
    assert [cache.geometry.rows for cache in state.caches] == [262, 1004, 4, 1001]
    assert state.bytes() == 3 * sequence_bytes(model, 1001) == 3 * rows * 2 * 2 * 8 * 4


def test_bytes_of_the_4b_hybrid_at_128k():
    """Qwen3-4B's shape, 3 KSA layers to 1 full, bf16: rows of rings and summaries against every token's."""
    shape = dict(num_layers=36, num_attention_heads=32, num_query_groups=8, kv_channels=128, hidden_size=2560)
    heads, length = 2 * 8 * 128 * 2, 131072
    found = {}
    for name, pattern in (("hybrid", "kkkf*9"), ("full", "f")):
        ksa = KSAConfig(enabled=True, layer_pattern=pattern)
        with torch.device("meta"):
            model = build_model(
                ksa, transformer_config(**shape, ffn_hidden_size=16, params_dtype=torch.bfloat16), vocab_size=8
            )
        found[name] = sequence_bytes(model.bfloat16(), length)
    assert found["full"] == 36 * length * heads
    assert found["hybrid"] == (9 * length + 27 * (129 * 8 + length // 8)) * heads


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for the device, and what makes a tensor of a number of the host, in a captured step."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "unique2"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels")
def test_steps_with_the_kernels(monkeypatch):
    """Exact, and a step waits for nothing of the device, so that it can be captured in a CUDA graph."""
    monkeypatch.setattr(dispatch, "uses_triton", lambda op, rows: op == DECODE)
    run = DecodingState.step_rows

    def watched(*args):
        with NoWaiting():
            return run(*args)

    monkeypatch.setattr(DecodingState, "step_rows", watched)
    ksa = dataclasses.replace(KSA, layer_pattern="wklf", summary_tokens=2)
    model = build_model(ksa, bases=(1e4, 5e5)).eval()
    decode_at_random(model, [17, 9], 2, every_slot=True)


class Largest(TorchDispatchMode):
    """The most elements that the output of any operation holds which is no view or in-place result."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        owned = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for out in outputs if isinstance(outputs, list | tuple) else [outputs]:
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in owned:
                self.elements = max(self.elements, out.numel())
        return outputs


def test_a_step_copies_no_keys():
    """The cache of a layer grew by doubling, and the exported model's was copied at every token."""
    model = build_model(KSA, transformer_config(kv_channels=16)).eval()
    length = 1600
    with DecodingState(model, 2, length) as state:
        slots = [state.join(), state.join()]
        for slot in slots:
            state.prefill(slot, random_tokens(1, length - 8)[0])
        addresses = [rows.data_ptr() for cache in state.caches for rows in (cache.key, cache.value)]
        with Largest() as largest:
            for token in random_tokens(2, 8).T:
                state.decode(slots, token)
        # The largest is the scores of one sequence's query heads over a full layer; a sequence's keys are 8 times that.
        assert largest.elements <= 4 * length < state.caches[-1].key[0].numel()
        assert addresses == [rows.data_ptr() for cache in state.caches for rows in (cache.key, cache.value)]


def test_a_prompt_forms_one_row_of_logits_and_one_segment():
    """Logits of every prompt token were formed, and the text of the whole prompt was kept until the first new token."""
    model = build_model(dataclasses.replace(KSA, layer_pattern="k"), transformer_config(ffn_hidden_size=16)).eval()
    with DecodingState(model, 1, 600, segment=16) as state, Largest() as largest:
        state.prefill(state.join(), random_tokens(1, 600)[0])
    # The queries of a segment over the segment, its window and all summaries, for 4 heads.
    assert largest.elements <= 4 * 16 * (16 + 12 + 150) < 600 * 64


def test_refused(monkeypatch):
    model = build_model(KSA).eval()
    with DecodingState(model, 1, 8) as state:
        with pytest.raises(UsageError, match="another state"), DecodingState(model, 1, 8):
            pass
        slot = state.join()
        for call, message in (
            (state.join, "all 1 slots are taken"),
            (lambda: state.prefill(slot, []), "no tokens"),
            (lambda: state.prefill(slot, [1] * 9), "9 tokens in a state for 8"),
        ):
            with pytest.raises(UsageError, match=message):
                call()
        state.prefill(slot, [1] * 8)
        with pytest.raises(UsageError, match="9 tokens in a state for 8"):
            state.decode([slot], torch.tensor([1]))
        state.leave(slot)
        with pytest.raises(UsageError, match="slot 0 has no sequence"):
            state.leave(slot)
    with pytest.raises(UsageError, match="max_length 0: at least 1"):
        DecodingState(model, 1, 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * sequence_bytes(model, 100))
    fits = max(length for length in range(100) if 4 * sequence_bytes(model, length) <= 3 * sequence_bytes(model, 100))
    with pytest.raises(UsageError, match=f"at most {fits} tokens fit .*with this length 3 sequences"):
        DecodingState(model, 4, 100)


def test_slots_and_tokens_that_do_not_fit():
    """Slot -1 could leave and was given out again: two sequences wrote into the last slot. A slot that nobody has, or
    twice in a step, one token for two slots, and a state outside of its context gave logits all the same."""
    model = build_model(KSA).eval()
    state, token = DecodingState(model, 2, 8, segment=10**30), torch.tensor([1])
    with pytest.raises(UsageError, match="works in its context"), state:
        slot = state.join()
        state.__exit__(None, None, None)
        state.prefill(slot, [1])
    state = DecodingState(model, 2, 8)
    with state:
        slot = state.join()
        state.prefill(slot, [1, 2])
        for call, message in (
            (lambda: state.leave(-1), "slot -1 has no sequence"),
            (lambda: state.leave(2), "slot 2 has no sequence"),
            (lambda: state.prefill(1 - slot, [1]), f"slot {1 - slot} has no sequence"),
            (lambda: state.decode([1 - slot], token), f"slot {1 - slot} has no sequence"),
            (lambda: state.decode([slot, slot], torch.tensor([1, 2])), "each one once"),
            (lambda: state.decode([slot], torch.tensor([1, 2])), r"tokens of shape \(2,\) for 1 slots"),
            (lambda: state.decode([], token[:0]), "no tokens"),
            (lambda: state.decode([slot], token + 10**6), "ids from 1000001 to 1000001: the model has"),
            (lambda: state.prefill(slot, [-1]), "ids from -1 to -1"),
            (lambda: state.prefill(slot, torch.ones(1, 3)), r"tokens of shape \(1, 3\)"),
        ):
            with pytest.raises(UsageError, match=message):
                call()
        assert state.lengths[slot] == 2
    with pytest.raises(UsageError, match="GiB of keys and values"):
        DecodingState(model, 1, 10**400)
    with pytest.raises(UsageError, match=r"call model.eval\(\)"):
        DecodingState(model.train(), 1, 8)
