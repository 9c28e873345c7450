"""A PyTorch attention layer with KSA that needs torch, triton and numpy alone: no Megatron, no trainer.

    pip install -e .
    python examples/library/plain_layer.py

`ksa_attention` runs in Triton on a GPU and in plain PyTorch elsewhere. The layer below is what a model of your own
would hold: text comes in, every chunk gets its summary rows, the rows attend, the text goes out. The script trains two
of them to name the token that stood `--distance` tokens ago. Through the text of its window a layer reaches at most 7
tokens back, two layers 14: at a distance of 16 only summaries can carry the token.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ksa.kernels.ksa_attention import KSAGeometry, ksa_attention


class KSALayer(nn.Module):
    """Attention over text and learned summary rows (KSA report, arXiv 2604.24432).

    Args:
        hidden: width of the model, heads * head_dim.
        heads: query and K/V heads.
        geometry: chunk size C, summaries a chunk S, window W in chunks.
    """

    def __init__(self, hidden: int, heads: int, geometry: KSAGeometry) -> None:
        super().__init__()
        self.heads, self.geometry = heads, geometry
        self.summaries = nn.Parameter(torch.randn(geometry.summary_tokens, hidden) * 0.02)
        self.norm = nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def grow(self, text: Tensor) -> Tensor:
        """Append S summary rows for each complete chunk: [batch, n, hidden] -> [batch, n + n // C * S, hidden]."""
        chunks = text.shape[1] // self.geometry.chunk_size
        return torch.cat([text, self.summaries.repeat(chunks, 1).expand(text.shape[0], -1, -1)], dim=1)

    def forward(self, rows: Tensor, text_rows: int) -> Tensor:
        """Rows laid out [text | summaries], [batch, rows, hidden] -> the same shape."""
        # [batch, rows, heads, head_dim] each
        q, k, v = self.qkv(self.norm(rows)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = ksa_attention(q, k, v, self.geometry, text_rows=text_rows)
        return rows + self.out(attended.flatten(2))


class Model(nn.Module):
    """Embeddings of tokens and positions, two KSA layers, an output layer; logits [batch, n, vocabulary]."""

    def __init__(self, vocabulary: int, length: int, hidden: int, geometry: KSAGeometry) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, hidden), nn.Embedding(length, hidden)
        self.layers = nn.ModuleList([KSALayer(hidden, 4, geometry) for _ in range(2)])
        self.logits = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        text = self.tokens(tokens) + self.positions(torch.arange(n, device=tokens.device))
        rows = self.layers[0].grow(text)
        for layer in self.layers:
            rows = layer(rows, n)
        return self.logits(rows[:, :n])


def main() -> None:
    """Train and print the loss."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--distance", type=int, default=16, help="tokens back to the one that is asked for")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    vocabulary, length, geometry = 8, 32, KSAGeometry(chunk_size=4, summary_tokens=1, window_chunks=1)
    model = Model(vocabulary, length, 64, geometry).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        tokens = torch.randint(vocabulary, (16, length), device=device)
        asked, answers = model(tokens)[:, options.distance :], tokens[:, : -options.distance]
        loss = F.cross_entropy(asked.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 50 == 0 or step == options.steps:
            print(f"step {step:4d}/{options.steps} | loss {loss.item():.4f} nats", flush=True)


if __name__ == "__main__":
    main()
