from vlcache_fx.bench.answers import Asked, score


def asked(answer: str, full: str, starts: tuple[int, ...], fraction: float = 1.0, hit: bool = True) -> Asked:
    mode = "warm" if hit else "cold"
    return Asked("cell", "", "?", "7", answer, full, mode, hit, hit, fraction, 100, starts)


def test_score_cold_and_warm() -> None:
    results = [
        [asked("7", "7", (9,), hit=False), asked("7", "7", (20,), 0.01), asked("1", "7", (9,), 0.03)],
        [asked("2", "7", (9,), hit=False), asked("3", "3", (30,), 0.02), asked("7", "7", (31,), 0.02)],
    ]
    (found,) = score(results)
    assert (found.cold, found.cold_right) == (2, 1)
    assert (found.warm, found.warm_right, found.full_right, found.agree) == (4, 2, 3, 3)
    assert (found.encoder_hits, found.moved) == (4, 3)
    assert found.fraction == 0.02
