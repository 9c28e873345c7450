"""Which rows a forward pass has, which of them see each other, and where a batch's padding goes."""

import copy

import torch


class Rows:
    """Rows of a forward pass: n tokens a sample, and the summaries of the chunks that they complete.

    Samples may go on from different tokens and complete different chunks: a chunk that is not complete in one sample
    but in another has rows there too, which nothing sees and later ones replace.

    Attributes, [batch or 1, ...] where all samples are alike:
        fresh: no sample has earlier tokens.
        token: number of each text row in its sample, [batch or 1, n].
        chunk_token: numbers of the tokens of the completed chunks, [batch or 1, chunks * C].
        summary: numbers of the summary rows, [batch or 1, chunks * S].
        rotation: cosines and sines of all rows.
        room: tokens that the cache is to have room for.
    """

    def __init__(self, config, starts, counts, length, device):
        self.chunk, self.per_chunk = config.summary_chunk_size, config.summary_rows
        self.num_text, self.last_token = length, max(starts) + length - 1
        self.fresh = not any(starts)
        pairs = list(zip(starts, counts, strict=True))
        if len(set(pairs)) == 1:
            pairs = pairs[:1]
        ends = [start + (length if self.fresh else count) for start, count in pairs]
        self.num_chunks = max(e // self.chunk - s // self.chunk for (s, _), e in zip(pairs, ends, strict=True))
        self.num_chunks *= self.per_chunk > 0
        self.num_summaries = self.num_chunks * self.per_chunk
        self.start, count = torch.tensor(pairs, device=device).unbind(1)
        self.end = self.start + count
        self.token = self.start[:, None] + torch.arange(length, device=device)
        first = self.start[:, None] // self.chunk
        self.chunk_token = first * self.chunk + torch.arange(self.num_chunks * self.chunk, device=device)
        self.summary = first * self.per_chunk + torch.arange(self.num_summaries, device=device)
        self._batch, self._samples = len(starts), None
        self._elsewhere, self._visible = {}, {}

    @property
    def samples(self):
        """Numbers of the samples, and tokens that each had before this pass: int64 [batch] both, for all layers."""
        if self._samples is None:
            numbers = torch.arange(self._batch, device=self.start.device)
            self._samples = numbers, self.start.expand(self._batch).contiguous()
        return self._samples

    def to(self, device):
        """The same on a device, for models whose layers are on several."""
        if device == self.start.device:
            return self
        if device not in self._elsewhere:
            moved = copy.copy(self)
            moved._samples, moved._visible = None, {}
            for name in ("start", "end", "token", "chunk_token", "summary"):
                setattr(moved, name, getattr(self, name).to(device))
            moved.rotation = tuple(part.to(device) for part in self.rotation)
            self._elsewhere[device] = moved
        return self._elsewhere[device]

    def split(self, rows):
        """Text rows and summary rows of `rows` [batch, rows, ...]."""
        return rows[:, : self.num_text], rows[:, self.num_text :]

    def newest(self, size):
        """The newest token p of each sample with p % size == r, for r below `size`: [batch or 1, size], -1 for none."""
        end = self.end[:, None]
        return (end - 1 - (end - 1 - torch.arange(size, device=end.device)) % size).clamp(min=-1)

    def positions(self, text, earlier):
        """Positions of all rows: a summary's is that of a token of its chunk.

        Args:
            text: positions of the text rows, [batch or 1, n].
            earlier: those of earlier tokens, token p's in column p % C, or None.
        """
        if not self.num_summaries:
            return text
        s = self.summary % self.per_chunk
        last = ((s + 1) * self.chunk // self.per_chunk - 1).clamp(min=0)
        token = self.summary // self.per_chunk * self.chunk + last
        own = self._positions_of(token, text, earlier)
        return torch.cat([text.expand(len(own), -1), own], dim=1)

    def newest_positions(self, text, earlier):
        """What `positions` needs as `earlier` in the next pass: [batch or 1, C]."""
        return self._positions_of(self.newest(self.chunk).clamp(min=0), text, earlier)

    def _positions_of(self, token, text, earlier):
        batch = max(len(token), len(text), 1 if earlier is None else len(earlier))
        token, text, start = token.expand(batch, -1), text.expand(batch, -1), self.start[:, None]
        here = text.gather(1, (token - start).clamp(0, self.num_text - 1))
        if earlier is None:
            return here
        return torch.where(token >= start, here, earlier.expand(batch, -1).gather(1, token % self.chunk))

    def visible(self, window, text_rows, older):
        """What text queries see of a layer's cache: bool [batch or 1, n, text rows + older], or None for everything.

        Args:
            window: W, or None for all text before.
            text_rows: rows of text in the cache, of which token p has row p % text_rows.
            older: summaries of chunks beyond the window, up to the last query.
        """
        if window is None and self.num_text == 1 and len(self.token) == 1:
            return None
        key = window, text_rows, older
        if key not in self._visible:
            i, device = self.token[:, :, None], self.token.device
            end = self.start[:, None, None] + self.num_text
            row = torch.arange(text_rows if older else min(text_rows, self.last_token + 1), device=device)
            j = end - 1 - (end - 1 - row) % text_rows
            near = (j >= 0) & (j <= i)
            if window is not None:
                chunk = i // self.chunk
                near &= chunk - j // self.chunk <= window
                far = chunk - torch.arange(older, device=device) // max(self.per_chunk, 1) > window
                near = torch.cat([near, far], dim=2)
            self._visible[key] = near
        return self._visible[key]


class Alignment:
    """Moves each sample's tokens to the left of its row, and back.

    Args:
        mask: bool [batch, n], False for padding.
    """

    def __init__(self, mask):
        self.mask, self.counts = mask, mask.sum(1).tolist()
        self.order = (~mask).int().argsort(dim=1, stable=True)
        self.inverse = self.order.argsort(dim=1)

    def pack(self, rows):
        """[batch, n, ...] with tokens first."""
        return torch.take_along_dim(rows, _like(self.order, rows), dim=1)

    def unpack(self, rows):
        """The inverse of `pack`."""
        return torch.take_along_dim(rows, _like(self.inverse, rows), dim=1)

    def last(self, rows, size):
        """The rows of each sample's last `size` tokens, [batch, size, ...]; its first where it has fewer."""
        last = torch.tensor(self.counts, device=rows.device)[:, None]
        place = (last - size + torch.arange(size, device=rows.device)).clamp(min=0)
        return torch.take_along_dim(rows, _like(self.order.to(rows.device).gather(1, place), rows), dim=1)


def _like(index, rows):
    return index.to(rows.device).view(*index.shape, *[1] * (rows.dim() - 2))


def alignment(attention_mask, batch, columns, earlier):
    """The `Alignment` of the newest `columns` columns, or None where nothing is padding.

    Raises:
        ValueError: a mask of another shape.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if shape not in ((batch, columns), (batch, earlier + columns)):
        also = f" or [{batch}, {earlier + columns}]" if earlier else ""
        raise ValueError(f"attention_mask of shape {shape}: [{batch}, {columns}]{also} needed")
    mask = attention_mask[:, -columns:].bool()
    return None if mask.all() else Alignment(mask)
