"""Stub."""

import torch

SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta=None, Tensor? state=None, Tensor? jump_at=None, Tensor? jump_map=None, Tensor? map_a=None, Tensor? map_b=None, Tensor? start=None, Tensor? end=None, Tensor? num_rows=None, *, float? scale=None, bool l2norm=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
torch.library.define("vlcache::recur", SCHEMA)


@torch.library.register_fake("vlcache::recur")
def _(
    q,
    k,
    v,
    g,
    beta=None,
    state=None,
    jump_at=None,
    jump_map=None,
    map_a=None,
    map_b=None,
    start=None,
    end=None,
    num_rows=None,
    *,
    scale=None,
    l2norm=False,
):
    B, T, H, dv = v.shape
    dk = q.shape[-1]
    n = 0 if end is None else end.shape[1]
    f = torch.float32
    return (
        v.new_empty(B, T, H, dv, dtype=q.dtype),
        v.new_empty(B, H, dk, dv, dtype=f),
        v.new_empty(B, n, H, dk, dv, dtype=f),
        v.new_empty(B, n, H, dk, dk, dtype=f),
        v.new_empty(B, n, H, dk, dv, dtype=f),
    )


@torch.library.impl("vlcache::recur", "CPU")
def _(
    q,
    k,
    v,
    g,
    beta=None,
    state=None,
    jump_at=None,
    jump_map=None,
    map_a=None,
    map_b=None,
    start=None,
    end=None,
    num_rows=None,
    *,
    scale=None,
    l2norm=False,
):
    B, T, H, dv = v.shape
    dk = q.shape[-1]
    r = H // q.shape[2]
    od = q.dtype
    q, k, v, g = (x.float() for x in (q, k, v, g))
    if l2norm:
        q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6)
        k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    q = q.repeat_interleave(r, 2)
    k = k.repeat_interleave(r, 2)
    sc = dk**-0.5 if scale is None else scale
    S = torch.zeros(B, H, dk, dv) if state is None else state.float().clone()
    if g.dim() == 3:
        g = g[..., None].expand(B, T, H, dk)
    n = 0 if end is None else end.shape[1]
    states = torch.zeros(B, n, H, dk, dv)
    A_ = torch.zeros(B, n, H, dk, dk)
    B_ = torch.zeros(B, n, H, dk, dv)
    out = torch.zeros(B, T, H, dv)
    for b in range(B):
        s = S[b]
        rec = [(int(end[b, j]), int(start[b, j]), j) for j in range(n)] if n else []
        jumps = (
            [(int(jump_at[b, j]), int(jump_map[b, j])) for j in range(jump_at.shape[1])]
            if jump_at is not None
            else []
        )
        maps = {j: [torch.eye(dk).expand(H, dk, dk).clone(), torch.zeros(H, dk, dv)] for _, _, j in rec}
        N = T if num_rows is None else int(num_rows[b])

        def hook(t, s):
            for e, st, j in rec:
                if e == t:
                    states[b, j] = s
                    A_[b, j], B_[b, j] = maps[j]
            for at, m in jumps:
                if at == t and m >= 0:
                    s = map_a[m].float() @ s + map_b[m].float()
            return s

        for t in range(N):
            s = hook(t, s)
            D = g[b, t].exp()[..., None]
            kk = k[b, t][..., None]

            def step(s, v):
                s = s * D
                if beta is None:
                    return s + kk * v[:, None]
                bt = beta[b, t].float()[:, None, None]
                return s + bt * kk * (v[:, None] - (s * kk).sum(1, keepdim=True))

            s = step(s, v[b, t])
            for e, st, j in rec:
                if st <= t < e:
                    maps[j][0] = step(maps[j][0], torch.zeros(H, dk))
                    maps[j][1] = step(maps[j][1], v[b, t])
            out[b, t] = sc * (s * q[b, t][..., None]).sum(1)
        s = hook(N, s)
        S[b] = s
    return out.to(od), S, states, A_, B_
