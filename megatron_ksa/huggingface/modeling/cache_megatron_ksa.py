"""What a decoder with Kwai Summary Attention keeps of its sequences: buffers that are allocated once."""

import torch

try:
    from megatron_ksa.kernels.ksa_decode import CacheGeometry, decode_attention
except ImportError:
    CacheGeometry = decode_attention = None

# Tokens that go at a time into a cache that is not empty.
SEGMENT = 256


class _LayerCache:
    """Rotated keys and values of one layer, [batch, K/V heads, rows, head_dim] each: text rows, then summaries.

    Text token p stands in row p % text_rows: a ring where the layer has a window, every token elsewhere. Summary s of
    chunk c stands in row text_rows + c * S + s. Tokens that a later segment may still see are never overwritten by
    SEGMENT new ones.
    """

    def __init__(self, window, chunk, per_chunk):
        self.window, self.chunk, self.per_chunk = window, chunk, per_chunk
        # Whole chunks, as the package's kernels take them.
        self.most_text = None if window is None else (window + 1 + -(-SEGMENT // chunk)) * chunk
        self.text_rows = 0
        self.buffers = ()

    def _reserve(self, rows, tokens):
        """Have room for `tokens` tokens, of keys like `rows` [batch, n, K/V heads, head_dim]."""
        text_rows = -(-tokens // self.chunk) * self.chunk
        text_rows = text_rows if self.most_text is None else min(text_rows, self.most_text)
        # One chunk beyond the tokens: padding may complete it.
        summaries = (tokens // self.chunk + 1) * self.per_chunk
        size = text_rows + summaries
        if self.buffers and size <= self.buffers[0].shape[2]:
            return
        shape = (rows.shape[0], rows.shape[2], size, rows.shape[3])
        grown = tuple(torch.zeros(shape, dtype=rows.dtype, device=rows.device) for _ in range(2))
        for new, old in zip(grown, self.buffers, strict=bool(self.buffers)):
            new[:, :, : self.text_rows] = old[:, :, : self.text_rows]
            new[:, :, text_rows : text_rows + old.shape[2] - self.text_rows] = old[:, :, self.text_rows :]
        self.text_rows, self.buffers = text_rows, grown

    def write(self, text, summaries, rows):
        """Keep the keys and values of a forward pass's text and summary rows, [batch, rows, K/V heads, head_dim]."""
        self._reserve(text[0], rows.room)
        for buffer, new, own in zip(self.buffers, text, summaries, strict=True):
            new = new.detach().transpose(1, 2).to(buffer.dtype)
            if not rows.fresh:
                _scatter(buffer, rows.token % self.text_rows, new)
            elif new.shape[2] <= self.text_rows:
                buffer[:, :, : new.shape[2]] = new
            else:
                # The ring's rows hold the last tokens of each sample, padding left out.
                kept = rows.newest(self.text_rows).clamp(min=0)
                buffer[:, :, : self.text_rows] = new.gather(2, _index(kept, new))
            if self.per_chunk and rows.num_summaries:
                _scatter(buffer, self.text_rows + rows.summary, own.detach().transpose(1, 2).to(buffer.dtype))

    def steps(self, query, rows):
        """Whether `step` takes a pass: one token a sample that goes on from others, without gradients."""
        gradients = torch.is_grad_enabled() and query.requires_grad
        return decode_attention is not None and rows.num_text == 1 and not rows.fresh and not gradients

    def step(self, text, summaries, rows):
        """Keep a pass's keys and values and attend to the cache, by the kernels of the package that trained the model.

        Args:
            text, summaries: queries, keys and values, [batch, 1, heads, head_dim] and [batch, 0 or S, heads, head_dim].

        Returns:
            [batch, rows, heads, head_dim].
        """
        self._reserve(text[1], rows.room)
        key, value = self.buffers
        query, *new = (torch.cat(pair, dim=1).transpose(0, 1) for pair in zip(text, summaries, strict=True))
        new = [part.to(key.dtype) for part in new]
        geometry = CacheGeometry(self.chunk, self.per_chunk, self.text_rows, key.shape[2] - self.text_rows, self.window)
        out = decode_attention(query.to(key.dtype), *new, key, value, *rows.samples, geometry)
        return out.transpose(0, 1).to(query.dtype)

    def view(self, length):
        """Keys and values of the first `length` rows, not copied."""
        return tuple(buffer[:, :, :length] for buffer in self.buffers)

    def chunk_text(self, rows):
        """Keys and values of the text of the chunks that a pass completes: [batch, tokens, K/V heads, head_dim]."""
        place = rows.chunk_token % self.text_rows
        return tuple(buffer.gather(2, _index(place, buffer)).transpose(1, 2) for buffer in self.buffers)

    def select(self, samples):
        self.buffers = tuple(buffer.index_select(0, samples.to(buffer.device)) for buffer in self.buffers)


def _index(place, like):
    """Row numbers [batch or 1, rows] as an index of `like` [batch, heads, any, head_dim] along dimension 2."""
    return place[:, None, :, None].expand(like.shape[0], like.shape[1], -1, like.shape[3])


def _scatter(buffer, place, rows):
    buffer.scatter_(2, _index(place, rows), rows)


class KSACache:
    """What decoding keeps: the text of each layer's window, and every summary, in buffers that are allocated once.

    Args:
        config: the model's.
        max_length: text tokens that it has room for; it doubles where more come. `generate` gives its own.

    Attributes:
        tokens: for each sample, tokens so far, without padding.
        columns: columns of input so far, with padding.
    """

    is_compileable = False

    def __init__(self, config, max_length=0):
        self.chunk = config.summary_chunk_size
        self.room = max_length
        per_chunk = config.summary_token_num
        self.layers = []
        for kind, window in zip(config.layer_kinds, config.layer_windows, strict=True):
            self.layers.append(_LayerCache(window, self.chunk, per_chunk if kind == "k" else 0))
        self.reset()

    def reset(self):
        """Empty, for other sequences; buffers are allocated anew."""
        self.tokens, self.columns, self.positions = [], 0, None
        for layer in self.layers:
            layer.buffers = ()

    def get_seq_length(self, layer_idx=0):
        """Columns so far, as attention masks count them."""
        return self.columns

    def reserve(self, tokens):
        """Have room for `tokens` tokens a sample; the layers follow as they write."""
        if tokens > self.room:
            self.room = max(tokens, 2 * self.room) if self.tokens else tokens

    def batch_select_indices(self, indices):
        """Choose samples of the batch."""
        if not self.tokens:
            return
        self.tokens = [self.tokens[i] for i in indices.tolist()]
        if self.positions is not None:
            self.positions = self.positions.index_select(0, indices.to(self.positions.device))
        for layer in self.layers:
            layer.select(indices)

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats):
        """Repeat each sample."""
        self.batch_select_indices(torch.arange(len(self.tokens)).repeat_interleave(repeats))

    def crop(self, *args):
        """Not possible: text that left the windows is gone."""
        raise ValueError("a KSA cache cannot be cut back: generate without assisted decoding")
