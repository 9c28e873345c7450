"""The whole model in one process: what sees what, annealing, recompute, independent parameters."""

import dataclasses

import pytest
import torch
from compare import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from single_process import build_model, random_tokens, transformer_config

from megatron_ksa.config.ksa import KSAConfig
from megatron_ksa.errors import UsageError
from megatron_ksa.inference.state import DecodingState

HYBRID = KSAConfig(enabled=True, chunk_size=4, window_chunks="[1]*4", layer_pattern="kklf")


def positions(lengths):
    """int64 [1, n], counting from 0 in each document."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


@st.composite
def packed(draw):
    """KSA settings, document lengths, and the place of a token to change."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    ksa = KSAConfig(
        enabled=True,
        chunk_size=draw(st.integers(1, 6)),
        summary_tokens=draw(st.integers(1, 2)),
        window_chunks=f"[{draw(st.integers(0, 3))}]*4",
        layer_pattern=draw(st.sampled_from(["kkkf", "klkf", "k", "w", "wkwf"])),
    )
    return ksa, lengths, draw(st.integers(0, sum(lengths) - 1))


@given(packed())
@settings(max_examples=40, deadline=None)
def test_a_token_changes_no_earlier_logit_and_no_other_document(case):
    ksa, lengths, place = case
    model = build_model(ksa, reset_documents=True).eval()
    tokens, position_ids = random_tokens(1, sum(lengths)), positions(lengths)
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % 64
    with torch.no_grad():
        before, after = (model(t, position_ids) for t in (tokens, changed))
    document = (position_ids == 0).cumsum(-1)[0]
    same = torch.arange(sum(lengths)) < place
    same |= document != document[place]
    assert torch.equal(before[0, same], after[0, same])
    assert not torch.equal(before[0, place], after[0, place])


@pytest.mark.parametrize("summary_tokens", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences_have_the_logits_of_reset_documents(summary_tokens, padded):
    """With packed_seq_params attention masked documents, but positions did not restart.

    Positions are relative, so that text alone does not show it; summaries of a chunk with a document boundary do, whose
    positions are never before their document's first token.
    """
    ksa = dataclasses.replace(HYBRID, summary_tokens=summary_tokens, window_chunks="[0]*4", layer_pattern="kkkk")
    tokens, lengths = random_tokens(1, 40), [15, 6, 19]
    starts = torch.tensor([0, 15, 21, 40], dtype=torch.int32)
    model = build_model(ksa, reset_documents=True).eval()
    # Of the middle document four tokens are real and two are padding.
    real = {"cu_seqlens_q": torch.tensor([0, 15, 19, 38], dtype=torch.int32), "cu_seqlens_q_padded": starts}
    packed_params = PackedSeqParams(qkv_format="thd", **(real if padded else {"cu_seqlens_q": starts}))
    with torch.no_grad():
        expected = model(tokens, positions(lengths))
        model.reset_documents = False
        given_starts = model(tokens, torch.arange(40)[None], packed_seq_params=packed_params)
        assert not torch.equal(given_starts, model(tokens, torch.arange(40)[None]))
    assert torch.equal(given_starts, expected)


def test_documents_of_another_length_are_refused():
    """Positions were gathered beyond the documents' table: on a GPU, a device assertion."""
    model = build_model(HYBRID).eval()
    packed_params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 15, 39], dtype=torch.int32))
    with pytest.raises(UsageError, match="told for 1 x 39 tokens .*given 1 x 40"):
        model(random_tokens(1, 40), None, packed_seq_params=packed_params)


def test_full_layers_see_their_whole_document():
    """Where documents were reset, full layers took over the window of KSA layers; in dense models, 128 tokens."""
    ksa = dataclasses.replace(HYBRID, window_chunks="1", layer_pattern="f")
    tokens = random_tokens(1, 40)
    with torch.no_grad():
        packed_logits, whole = (
            build_model(ksa, reset_documents=reset).eval()(tokens, positions([40])) for reset in (True, False)
        )
    assert_close("logits", packed_logits, whole)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_window_layer_reaches_no_further_than_its_window(window):
    """One window layer: logits depend on the token's own chunk and the window's, and there are no summary rows."""
    ksa = KSAConfig(enabled=True, chunk_size=4, window_chunks=str(window), layer_pattern="w")
    model = build_model(ksa, transformer_config(num_layers=1)).eval()
    assert not any("summary" in name for name, _ in model.named_parameters())
    tokens, place = random_tokens(1, 40), 9
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % 64
    with torch.no_grad():
        before, after = (model(t, None)[0] for t in (tokens, changed))
    moved = (before != after).any(-1)
    sees = torch.arange(40)
    sees = (sees >= place) & (sees // 4 - place // 4 <= window)
    assert torch.equal(moved, sees)


def test_documents_give_the_logits_they_have_alone():
    """With chunk boundaries at document boundaries, a packed document is a sequence of its own."""
    model = build_model(HYBRID, reset_documents=True).eval()
    tokens = random_tokens(1, 40)
    with torch.no_grad():
        packed_logits = model(tokens, positions([16, 24]))
        alone = torch.cat([model(tokens[:, :16], positions([16])), model(tokens[:, 16:], positions([24]))], dim=1)
    assert_close("logits", packed_logits, alone)


def test_windows_over_the_sequence_equal_full_attention_on_text():
    """KSA, large-window and full layers agree where the window covers everything, given the same weights."""
    ksa = KSAConfig(enabled=True, chunk_size=4, window_chunks="16", layer_pattern="kl+kl")
    model = build_model(ksa).eval()
    full = build_model(dataclasses.replace(ksa, layer_pattern="f"), seed=1).eval()
    full.load_state_dict({k: v for k, v in model.state_dict().items() if "summary" not in k})
    tokens = random_tokens(2, 64)
    with torch.no_grad():
        assert_close("logits", model(tokens, None), full(tokens, None))


def test_kind_l_means_the_whole_sequence_at_any_length():
    """Beyond the length that the model was built for, kind l kept the window of that length."""
    ksa = KSAConfig(enabled=True, chunk_size=4, window_chunks="1", layer_pattern="l")
    model = build_model(ksa, text_length=16).eval()
    full = build_model(dataclasses.replace(ksa, layer_pattern="f"), seed=1).eval()
    full.load_state_dict({k: v for k, v in model.state_dict().items() if "summary" not in k})
    tokens = random_tokens(2, 64)
    with torch.no_grad():
        assert_close("logits", model(tokens, None), full(tokens, None))
        with DecodingState(model, 2, 64) as state:
            slots = [state.join(), state.join()]
            for slot in slots:
                state.prefill(slot, tokens[slot, :30])
            parts = torch.stack([state.decode(slots, token) for token in tokens[:, 30:].T], dim=1)
    assert_close("decoded", parts, full(tokens, None)[:, 30:])


def test_share_of_attention_on_summaries():
    """Against an explicit softmax over what each text query sees; a layer of kind l sees no summary."""
    model = build_model(dataclasses.replace(HYBRID, window_chunks="1", layer_pattern="k")).eval()
    chunk, length = HYBRID.chunk_size, 32
    model.measure_attention_share(True)
    expected = []

    def explicit(core, args, out):
        query, key = (heads[:, 0].double() for heads in args[:2])  # [rows, heads, head_dim]
        i, j = torch.arange(length)[:, None], torch.arange(length)
        seen = (j <= i) & (i // chunk - j // chunk <= 1)
        summaries = torch.arange(key.shape[0] - length) // HYBRID.summary_tokens
        seen = torch.cat([seen, i // chunk - summaries > 1], dim=1)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = torch.einsum("ihd,jhd->hij", query[:length], key) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        expected.append(weights[..., length:].sum(-1).mean().item())

    for core in model.summary_cores():
        core.register_forward_hook(explicit)
    with torch.no_grad():
        model(random_tokens(1, length), None)
    got = [share.item() for core in model.summary_cores() for share in core.shares]
    assert len(got) == 4 and min(got) > 0.05
    assert got == pytest.approx(expected, rel=1e-5)
    model.measure_attention_share(False)
    assert all(core.shares is None for core in model.summary_cores())


def test_summaries_carry_what_is_outside_the_window():
    """A window of 0 chunks: a distant token still changes the last logit, through its summary alone."""
    model = build_model(dataclasses.replace(HYBRID, window_chunks="0", layer_pattern="k")).eval()
    tokens = random_tokens(1, 32)
    changed = tokens.clone()
    changed[0, 1] = (changed[0, 1] + 1) % 64
    with torch.no_grad():
        assert not torch.equal(model(tokens, None)[0, -1], model(changed, None)[0, -1])


def test_annealed_to_zero_is_the_model_without_summary_projections():
    model = build_model(HYBRID).eval()
    without = build_model(dataclasses.replace(HYBRID, independent_projections=False), seed=1).eval()
    without.load_state_dict({k: v for k, v in model.state_dict().items() if "qkv_summary" not in k})
    tokens = random_tokens(1, 32)
    with torch.no_grad():
        expected = without(tokens, None)
        assert not torch.equal(model(tokens, None), expected)
        model.set_summary_coefficient(0.0)
        assert torch.equal(model(tokens, None), expected)
    model.set_summary_coefficient(0.5)
    half = model(tokens, None)
    assert not torch.equal(half, expected)
    half.sum().backward()
    # Nothing reads the summaries of the last two of these layers: a large-window layer, and a layer below it.
    assert model.decoder.layers[0].self_attention.linear_qkv_summary.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    ],
)
@pytest.mark.parametrize("lengths", [[40], [13, 20, 7]])
def test_recompute_gives_the_same_gradients(recompute, lengths):
    tokens, labels, position_ids = random_tokens(1, 40), random_tokens(1, 40, seed=1), positions(lengths)
    gradients = []
    for changes in ({}, recompute):
        model = build_model(HYBRID, transformer_config(**changes), bases=(1e4, 5e5), reset_documents=True).train()
        model(tokens, position_ids, labels=labels).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


def test_every_parameter_gets_a_gradient():
    """But the queries of the last KSA layer's summary rows, whose output nobody reads."""
    ksa = dataclasses.replace(HYBRID, layer_pattern="kkkf", independent_qk_norm=True, independent_layernorm=True)
    model = build_model(ksa).train()
    model(random_tokens(1, 32), None, labels=random_tokens(1, 32, seed=1)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert without == ["decoder.layers.2.self_attention.q_layernorm_summary.weight"]


def test_full_layers_are_identity_for_summary_rows():
    model = build_model(HYBRID).eval()
    layer, hidden = model.decoder.layers[3], torch.randn(20, 1, 32)
    with torch.no_grad():
        out, _ = layer(hidden_states=hidden, attention_mask=None)
    assert torch.equal(out[16:], hidden[16:]) and not torch.equal(out[:16], hidden[:16])
