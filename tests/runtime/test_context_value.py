"""Values of threads and tasks."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

from vlcache_fx.runtime import context_value
from vlcache_fx.runtime.context_value import ContextValue


def test_threads_have_values_of_their_own() -> None:
    value: ContextValue[str] = ContextValue()
    value.set("main")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(value.get).result() is None
        assert pool.submit(contextvars.copy_context().run, value.get).result() == "main"
        pool.submit(value.set, "pool").result()
        assert pool.submit(value.get).result() == "pool"
    assert value.get() == "main"


def test_tasks_begin_with_the_value_of_their_creator() -> None:
    value: ContextValue[int] = ContextValue()
    value.set(0)

    async def task(number: int) -> tuple[int | None, ...]:
        before = value.get()
        with value.using(number):
            await asyncio.sleep(0)
            inside = await asyncio.to_thread(value.get)
        return before, inside, value.get()

    async def serve() -> list[tuple[int | None, ...]]:
        return await asyncio.gather(*(task(number) for number in range(1, 5)))

    assert asyncio.run(serve()) == [(0, number, 0) for number in range(1, 5)]


def test_body_may_end_in_another_context() -> None:
    value: ContextValue[str] = ContextValue()
    body = value.using("inside")
    contextvars.copy_context().run(body.__enter__)
    body.__exit__(None, None, None)
    assert value.get() is None


def test_owners_in_any_order() -> None:
    one, other = ContextValue[str](), ContextValue[str]()
    first, second = one.using("one"), other.using("other")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (one.get(), other.get()) == (None, "other")
    second.__exit__(None, None, None)
    assert (one.get(), other.get()) == (None, None)


def test_values_of_freed_owners_are_dropped() -> None:
    class Held:
        pass

    owner, held = ContextValue[Held](), Held()
    owner.set(held)
    gone = weakref.ref(held)
    del owner, held
    gc.collect()
    kept = ContextValue[str]()
    kept.set("kept")  # drops what is left
    assert gone() is None
    assert all(own() is not None for own in context_value._values.get())
