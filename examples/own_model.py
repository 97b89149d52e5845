"""A vision-language model in plain torch, through ``torch.compile(backend="vlcache")`` alone.

    python examples/own_model.py

Nothing here is known to vlcache_fx: no library, no names. Two ways to bring an image into a prompt:

- placeholders that ``masked_scatter`` fills: the merge is found in the traced graph;
- embeddings that the caller joins himself: he says which rows are an image, with ``mark_spans``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vlcache_fx
from vlcache_fx.backend import engine_for

PLACEHOLDER, VOCABULARY, WIDTH, HEADS = 99, 100, 64, 4
OPTIONS = {"lowering": "eager", "budget": 0.1}


class Block(nn.Module):
    """Attention with rotary positions and an MLP, in parallel on one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """[1, tokens, width] -> the same."""
        normed = self.norm(x)
        parts = self.project(normed).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        query, key = (rotate(part, turn) for part in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2)) + self.mlp(normed)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding with complex numbers: [1, heads, tokens, dim] by [tokens, dim / 2]."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn
    return torch.view_as_real(turned).flatten(-2)


class Decoder(nn.Module):
    """Embeddings [1, tokens, width] -> logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, embeds: Tensor) -> Tensor:
        """See the class."""
        steps = torch.arange(embeds.shape[1], device=embeds.device)
        speeds = 100.0 ** -torch.linspace(0, 1, WIDTH // HEADS // 2, device=embeds.device)
        turn = torch.polar(torch.ones(()), steps[:, None] * speeds)
        for block in self.blocks:
            embeds = block(embeds, turn)
        return self.head(embeds[:, -1:])


class Vlm(nn.Module):
    """Pixels [1, 3, 32, 32] become 64 rows of features, which fill the placeholders of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.decoder = Decoder()

    def features(self, pixels: Tensor) -> Tensor:
        """[rows, width]."""
        return self.see(pixels).flatten(2).transpose(1, 2)[0]

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """Logits of the next token."""
        embeds = self.embed(ids)
        places = (ids == PLACEHOLDER)[..., None].expand_as(embeds)
        return self.decoder(embeds.masked_scatter(places, self.features(pixels)))


def report_line(what: str, report: dict[str, object] | None) -> str:
    """What the last call did."""
    assert report is not None
    hits = [span["hit"] for span in report["spans"]]  # type: ignore[attr-defined]
    rows = report["rows_per_layer"]
    return f"{what}: {report['mode']}, hits {hits}, {rows[0]} of {report['num_tokens']} rows"  # type: ignore[index]


def merged_in_the_graph(model: Vlm, image: Tensor) -> list[str]:
    """The same image behind two prompts: the graph says where it enters."""
    compiled = torch.compile(model, backend="vlcache", options=OPTIONS, dynamic=True)
    lines = []
    for what, before, after in (("new image", 5, 7), ("same image, moved", 12, 6)):
        text = torch.randint(0, PLACEHOLDER, (1, before + after))
        image_run = torch.full((1, 64), PLACEHOLDER)
        compiled(torch.cat([text[:, :before], image_run, text[:, before:]], 1), image)
        lines.append(report_line(what, engine_for(OPTIONS).last_report))
    return lines


def marked_by_the_caller(model: Vlm, image: Tensor) -> list[str]:
    """The decoder alone, given embeddings: the caller marks the image's rows."""
    options = OPTIONS | {"salt": "marked"}
    compiled = torch.compile(model.decoder, backend="vlcache", options=options, dynamic=True)
    features = model.features(image)[None]
    lines = []
    for what, before, after in (("new image", 5, 7), ("same image, moved", 12, 6)):
        text = model.embed(torch.randint(0, PLACEHOLDER, (1, before + after)))
        embeds = torch.cat([text[:, :before], features, text[:, before:]], 1)
        compiled(vlcache_fx.mark_spans(embeds, [(0, before, 64)]))
        lines.append(report_line(f"marked, {what}", engine_for(options).last_report))
    return lines


def main() -> list[str]:
    """Run both; the lines that it prints."""
    torch.manual_seed(0)
    model, image = Vlm().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        lines = [*merged_in_the_graph(model, image), *marked_by_the_caller(model, image)]
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
