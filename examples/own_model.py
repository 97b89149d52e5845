"""A vision-language model in plain torch with ``torch.compile(backend="vlcache")``.

    python examples/own_model.py

vlcache_fx needs no library and no names of modules. Two ways to insert an image into a prompt:

- ``masked_scatter`` fills placeholders: analysis finds the merge in the traced graph;
- the caller concatenates embeddings, and marks the rows of an image with ``mark_spans``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vlcache_fx
from vlcache_fx.backend import engine_for

PLACEHOLDER, VOCABULARY, WIDTH, HEADS = 99, 100, 64, 4
OPTIONS = {"lowering": "eager", "budget": 0.1}


class Block(nn.Module):
    """Parallel attention with rotary positions and MLP, with a shared norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """[1, tokens, width] -> [1, tokens, width]."""
        normed = self.norm(x)
        parts = self.project(normed).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        query, key = (rotate(part, turn) for part in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2)) + self.mlp(normed)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Apply rotary embedding with complex numbers: [1, heads, tokens, dim] by [tokens, dim / 2]."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(turned).flatten(-2)


class Decoder(nn.Module):
    """Embeddings [1, tokens, width] -> logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, embeds: Tensor) -> Tensor:
        """[1, tokens, width] -> [1, 1, vocabulary]."""
        steps = torch.arange(embeds.shape[1], device=embeds.device)
        speeds = 100.0 ** -torch.linspace(0, 1, WIDTH // HEADS // 2, device=embeds.device)
        turn = torch.polar(torch.ones(()), steps[:, None] * speeds)
        for block in self.blocks:
            embeds = block(embeds, turn)
        return self.head(embeds[:, -1:])


class Vlm(nn.Module):
    """Encodes pixels [1, 3, 32, 32] to 64 rows of features, which fill the placeholders of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.decoder = Decoder()

    def features(self, pixels: Tensor) -> Tensor:
        """Encode pixels to features [rows, width]."""
        return self.see(pixels).flatten(2).transpose(1, 2)[0]

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """Logits of the next token."""
        embeds = self.embed(ids)
        mask = (ids == PLACEHOLDER)[..., None].expand_as(embeds)
        return self.decoder(embeds.masked_scatter(mask, self.features(pixels)))


def report_line(name: str, report: dict[str, object] | None) -> str:
    """Format the report of the last call."""
    assert report is not None
    hits = [span["hit"] for span in report["spans"]]  # type: ignore[attr-defined]
    rows = report["rows_per_layer"]
    return f"{name}: {report['mode']}, hits {hits}, {rows[0]} of {report['num_tokens']} rows"  # type: ignore[index]


def merged_in_the_graph(model: Vlm, image: Tensor) -> list[str]:
    """Run one image after two prompts; the graph contains the merge."""
    compiled = torch.compile(model, backend="vlcache", options=OPTIONS, dynamic=True)
    lines = []
    for name, before, after in (("new image", 5, 7), ("same image, moved", 12, 6)):
        text = torch.randint(0, PLACEHOLDER, (1, before + after))
        image_ids = torch.full((1, 64), PLACEHOLDER)
        compiled(torch.cat([text[:, :before], image_ids, text[:, before:]], 1), image)
        lines.append(report_line(name, engine_for(OPTIONS).last_report))
    return lines


def marked_by_the_caller(model: Vlm, image: Tensor) -> list[str]:
    """Run the decoder with embeddings; the caller marks the image's rows."""
    options = OPTIONS | {"salt": "marked"}
    compiled = torch.compile(model.decoder, backend="vlcache", options=options, dynamic=True)
    features = model.features(image)[None]
    lines = []
    for name, before, after in (("new image", 5, 7), ("same image, moved", 12, 6)):
        text = model.embed(torch.randint(0, PLACEHOLDER, (1, before + after)))
        embeds = torch.cat([text[:, :before], features, text[:, before:]], 1)
        compiled(vlcache_fx.mark_spans(embeds, [(0, before, 64)]))
        lines.append(report_line(f"marked, {name}", engine_for(options).last_report))
    return lines


def main() -> list[str]:
    """Run both; print and return the reports."""
    torch.manual_seed(0)
    model, image = Vlm().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        lines = [*merged_in_the_graph(model, image), *marked_by_the_caller(model, image)]
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
