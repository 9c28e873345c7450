"""Batches of an exported model: samples of any lengths, padded anywhere, whole and in steps, against single rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import randomise
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ksa.huggingface.modeling import attention_megatron_ksa as attention
from megatron_ksa.huggingface.modeling import cache_megatron_ksa as cache_module
from megatron_ksa.huggingface.modeling import modeling_megatron_ksa as modeling
from megatron_ksa.huggingface.modeling.configuration_megatron_ksa import MegatronKSAConfig

TOLERANCE = 1e-5
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
HYBRID = dict(kinds="kwlfk", windows=[2, 1, 2**30, 1, 0], chunk=4, summaries=2, rotary_bases=[1e3, 123456.7])
FULL = dict(kinds="fff", windows=[1, 1, 1], chunk=4, summaries=1)


def make_model(kinds, windows, chunk, summaries, seed=0, **extra) -> modeling.MegatronKSAForCausalLM:
    """A model with random weights in eval mode; float64, so that only what differs in kind is beyond the tolerance."""
    text = 60
    config = MegatronKSAConfig(
        **{**SIZES, **extra}, num_hidden_layers=len(kinds), vocab_size=text + summaries * any(k in "kl" for k in kinds),
        truncate_predict_nums=text, use_summary_attention=True, summary_chunk_size=chunk, summary_token_num=summaries,
        summary_layer_kinds=list(kinds), summary_windows=windows,
    )  # fmt: skip
    model = modeling.MegatronKSAForCausalLM(config).eval().double()
    randomise(model, seed)
    return model


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [batch, longest]."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


@pytest.fixture
def small_segments(monkeypatch):
    """Rings wrap within the few tokens of a test."""
    for module in (cache_module, modeling):
        monkeypatch.setattr(module, "SEGMENT", 5)


@pytest.fixture(scope="module")
def hybrid():
    return make_model(**HYBRID)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_single_rows(hybrid, side):
    """Right-padded rows came out wrong for their next token, and left-padded ones were refused."""
    rows = [random_tokens(n, seed=n) for n in (37, 5, 1, 28)]
    ids, mask = padded(rows, side)
    output = hybrid(ids, attention_mask=mask, output_hidden_states=True)
    last = hybrid(ids, attention_mask=mask, logits_to_keep=1).logits
    for index, row in enumerate(rows):
        alone = hybrid(row[None], output_hidden_states=True)
        here = mask[index].bool()
        assert (output.logits[index][here] - alone.logits[0]).abs().max() < TOLERANCE
        assert (last[index, -1] - alone.logits[0, -1]).abs().max() < TOLERANCE
        assert len(output.hidden_states) == len(hybrid.model.layers) + 1
        for mine, theirs in zip(output.hidden_states, alone.hidden_states, strict=True):
            assert (mine[index][here] - theirs[0]).abs().max() < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.text("klfw", min_size=1, max_size=4),
    window=st.integers(0, 4),
    chunk=st.integers(1, 5),
    summaries=st.integers(1, 3),
    segment=st.integers(1, 7),
    steps=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_ragged_steps_equal_the_full_forward(kinds, window, chunk, summaries, segment, steps, side, seed):
    """Three samples that go on by their own numbers of tokens, rings that wrap, chunks that end at different steps."""
    before = cache_module.SEGMENT
    cache_module.SEGMENT = modeling.SEGMENT = segment
    try:
        model = make_model(kinds, [window] * len(kinds), chunk, summaries, seed)
        steps = [[max(n, i == 0) for n in step] for i, step in enumerate(steps)]
        totals = [sum(column) for column in zip(*steps, strict=True)]
        rows = [random_tokens(total, seed=seed + i) for i, total in enumerate(totals)]
        found, done, cache = [[], [], []], [0, 0, 0], None
        for step in steps:
            if not max(step):
                continue
            ids, mask = padded([rows[i][done[i] : done[i] + n] for i, n in enumerate(step)], side)
            output = model(ids, attention_mask=mask, past_key_values=cache)
            cache = output.past_key_values
            for i, n in enumerate(step):
                found[i].append(output.logits[i][mask[i].bool()])
                done[i] += n
        for row, parts in zip(rows, found, strict=True):
            assert (torch.cat(parts) - model(row[None], use_cache=False).logits[0]).abs().max() < TOLERANCE
    finally:
        cache_module.SEGMENT = modeling.SEGMENT = before


@pytest.mark.parametrize(("side", "beams"), [("left", 1), ("right", 1), ("right", 3)])
def test_generate_from_padded_prompts(hybrid, side, beams, small_segments):
    rows = [random_tokens(n, seed=n) for n in (21, 5, 14)]
    ids, mask = padded(rows, side)
    settings = dict(max_new_tokens=11, do_sample=False, num_beams=beams)
    made = hybrid.generate(ids, attention_mask=mask, **settings)
    for row, new in zip(rows, made[:, ids.shape[1] :], strict=True):
        alone = hybrid.generate(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **settings)
        assert torch.equal(new, alone[0, len(row) :])


def test_sampling_takes_the_same_tokens_with_and_without_cache(hybrid, small_segments):
    ids, mask = padded([random_tokens(n, seed=n) for n in (21, 5)], "left")
    made = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        made.append(hybrid.generate(ids, attention_mask=mask, max_new_tokens=11, do_sample=True, top_k=20,
                                    num_return_sequences=2, use_cache=use_cache))  # fmt: skip
    assert torch.equal(*made) and made[0].shape == (4, 32)


@torch.no_grad()
def test_generation_goes_on_from_a_cache(hybrid, small_segments):
    """A second turn of a conversation: `generate` with all tokens and the cache of the first ones."""
    ids = random_tokens(2, 30)
    first = hybrid.generate(ids[:, :12], max_new_tokens=6, return_dict_in_generate=True)
    both = torch.cat([first.sequences, ids[:, 12:]], dim=1)
    settings = dict(max_new_tokens=9, do_sample=False)
    again = hybrid.generate(both, past_key_values=first.past_key_values, **settings)
    assert torch.equal(again, hybrid.generate(both, **settings))


@torch.no_grad()
def test_embeddings_in_place_of_tokens(hybrid, small_segments):
    ids, mask = padded([random_tokens(n, seed=n) for n in (21, 5)], "left")
    embeds = hybrid.get_input_embeddings()(ids)
    logits = hybrid(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(logits, hybrid(ids, attention_mask=mask).logits)
    made = hybrid.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(made, hybrid.generate(ids, attention_mask=mask, max_new_tokens=12)[:, 21:])


@torch.no_grad()
def test_position_ids(hybrid, small_segments):
    """Shifted positions change nothing (rotations are relative), stretched ones do, in summaries of later steps too."""
    ids = random_tokens(2, 30)
    plain = hybrid(ids).logits
    count = torch.arange(30)[None]
    assert (hybrid(ids, position_ids=count + 7).logits - plain).abs().max() < TOLERANCE
    stretched = hybrid(ids, position_ids=3 * count).logits
    assert (stretched - plain).abs().max() > 0.1
    cache, parts = modeling.KSACache(hybrid.config), []
    for part in count.split([9, 1, 1, 4, 15], dim=1):
        parts.append(hybrid(ids[:, part[0]], position_ids=3 * part, past_key_values=cache).logits)
    assert (torch.cat(parts, dim=1) - stretched).abs().max() < TOLERANCE


def test_loss_of_a_padded_batch(hybrid):
    """That of the single rows; divided by `num_items_in_batch` where Trainer gives it."""
    rows = [random_tokens(n, seed=n) for n in (37, 5, 28)]
    alone = [hybrid(row[None], labels=row[None]).loss.item() * (len(row) - 1) for row in rows]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        labels = ids.masked_fill(mask == 0, -100)
        given = dict(attention_mask=mask, labels=labels)
        assert hybrid(ids, **given).loss.item() == pytest.approx(sum(alone) / (37 + 5 + 28 - 3), rel=1e-5)
        assert hybrid(ids, num_items_in_batch=torch.tensor(50), **given).loss.item() == pytest.approx(
            sum(alone) / 50, rel=1e-5
        )


class LargestNew(TorchDispatchMode):
    """The most elements of a tensor that an operation made anew (views left out)."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in storages:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("case", [HYBRID, FULL], ids=["hybrid", "full"])
@torch.no_grad()
def test_a_step_copies_nothing_as_large_as_the_cache(case):
    """Each token copied the keys and values of all tokens, and repeated them for the query heads of a group."""
    tokens, largest = 3000, {}
    model = make_model(**case)
    cache = modeling.KSACache(model.config, tokens + 8)
    model(random_tokens(2, tokens), past_key_values=cache, logits_to_keep=1)
    places = [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers]
    for step in range(8):  # two chunks end among them
        with LargestNew() as seen:
            model(random_tokens(2, 1, seed=step), past_key_values=cache)
        largest[step] = seen.elements
    assert places == [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers]
    # Masks have an element a row and query head, a sixteenth of keys and values with 8 channels.
    rows = max(layer.buffers[0].shape[2] for layer in cache.layers)
    assert max(largest.values()) <= 2 * 2 * 2 * rows < cache.layers[-2].buffers[0].numel() / 3


@torch.no_grad()
def test_the_cache_of_generate_is_allocated_once(hybrid, monkeypatch):
    sizes, zeros = [], torch.zeros
    monkeypatch.setattr(cache_module.torch, "zeros", lambda *a, **k: sizes.append(a[0]) or zeros(*a, **k))
    hybrid.generate(random_tokens(2, 30), max_new_tokens=30)
    assert len(sizes) == 2 * len(hybrid.model.layers)


@torch.no_grad()
def test_a_cache_without_a_length_doubles(hybrid, small_segments):
    ids, cache, sizes, parts = random_tokens(2, 100), modeling.KSACache(hybrid.config), set(), []
    for token in ids.split(1, dim=1):
        parts.append(hybrid(token, past_key_values=cache).logits)
        sizes.add(cache.room)
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 128}
    assert (torch.cat(parts, dim=1) - hybrid(ids).logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("kinds", ["kwlfk", "kkkk"])
@torch.no_grad()
def test_kernels_give_the_same(kinds, monkeypatch):
    """Where this package is installed and on a GPU its kernels take whole sequences; here its reference."""
    model = make_model(kinds, [2, 1, 2, 1, 0][: len(kinds)], 4, 2)
    ids, mask = padded([random_tokens(n, seed=n) for n in (37, 5, 28)], "left")
    expected, calls = model(ids, attention_mask=mask).logits, []
    kernel = attention.ksa_attention
    monkeypatch.setattr(attention, "ksa_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    monkeypatch.setattr(attention, "_takes_kernels", lambda query: True)
    assert (model(ids, attention_mask=mask).logits - expected)[mask.bool()].abs().max() < TOLERANCE
    assert len(calls) == sum(kind in "kw" for kind in kinds)


@pytest.mark.parametrize("kinds", ["kwlfk", "kkkk"])
@pytest.mark.parametrize("small", [False, True], ids=["ring with room", "ring that turns"])
@torch.no_grad()
def test_decode_kernels_give_the_same(kinds, small, monkeypatch, request):
    """Each step of one token goes to the decode op: ragged batches, chunks that complete, a piece of several tokens."""
    if small:
        request.getfixturevalue("small_segments")
    model = make_model(kinds, [2, 1, 2, 1, 0][: len(kinds)], 4, 2)
    ids, mask = padded([random_tokens(n, seed=n) for n in (37, 5, 28)], "left")
    more = random_tokens(3, 30, seed=9)
    whole = torch.cat([mask, torch.ones_like(more)], dim=1)
    expected, calls = model(torch.cat([ids, more], dim=1), attention_mask=whole).logits[:, ids.shape[1] :], []
    kernel = cache_module.decode_attention
    monkeypatch.setattr(cache_module, "decode_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    monkeypatch.setattr(attention, "_takes_kernels", lambda query: True)
    cache = modeling.KSACache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    parts, seen = [], ids.shape[1]
    for piece in more.split([1] * 9 + [7] + [1] * 14, dim=1):
        seen += piece.shape[1]
        parts.append(model(piece, attention_mask=whole[:, :seen], past_key_values=cache).logits)
    assert (torch.cat(parts, dim=1) - expected).abs().max() < TOLERANCE
    assert len(calls) == 23 * len(kinds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu(dtype, monkeypatch):
    """Logits, gradients and padded greedy texts with the Triton kernels and with plain PyTorch."""
    model = make_model(**HYBRID, head_dim=32).cuda().to(dtype)
    ids, mask = (part.cuda() for part in padded([random_tokens(n, seed=n) for n in (150, 40, 99)], "left"))
    found = []
    for kernel in (attention.ksa_attention, None):
        monkeypatch.setattr(attention, "ksa_attention", kernel)
        model.zero_grad()
        output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        output.loss.backward()
        found.append((output.logits[mask.bool()].float(), model.model.layers[0].self_attn.k_proj.weight.grad.float()))
    (logits, gradient), (plain_logits, plain_gradient) = found
    bound = 0.01 if dtype == torch.float32 else 0.1  # relative, of five layers with large random weights
    assert (logits - plain_logits).norm() < bound * plain_logits.norm()
    assert (gradient - plain_gradient).norm() < bound * plain_gradient.norm()
    assert model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False).shape == (3, 170)


REFUSED = {
    "packed documents": (dict(position_ids=torch.arange(10)[None] % 5), "start again within a row"),
    "attention weights": (dict(output_attentions=True), "attention weights are never formed"),
    "mask of another length": (dict(attention_mask=torch.ones(2, 7)), r"attention_mask of shape \(2, 7\)"),
    "mask of four dimensions": (dict(attention_mask=torch.ones(2, 1, 10, 10)), "attention_mask of shape"),
    "another cache": (dict(past_key_values=object()), "takes a KSACache"),
    "both": (dict(inputs_embeds=torch.zeros(2, 10, 32).double()), "either input_ids or inputs_embeds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(hybrid, name):
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        hybrid(random_tokens(2, 10), **arguments)


def test_generate_refuses(hybrid):
    ids = random_tokens(2, 10)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        hybrid.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="positions from attention_mask"):
        hybrid.generate(ids, max_new_tokens=2, position_ids=3 * torch.arange(10).expand(2, -1))
    with pytest.raises(ValueError, match="stateful"):
        hybrid.generate(ids[:1], max_new_tokens=2, assistant_model=hybrid)
