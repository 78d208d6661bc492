from concurrent.futures import ThreadPoolExecutor

from seekvl.processing.recent import Recent


def test_what_was_used_last_stays() -> None:
    recent = Recent[str, int](10)
    for name, size in (("a", 4), ("b", 4)):
        recent.put(name, size, size=size)
    assert recent.get("a") == 4
    recent.put("c", 3, size=3)
    assert [recent.get(name) for name in "abc"] == [4, None, 3]
    assert recent.nbytes == 7


def test_a_value_that_alone_is_too_large_pushes_nobody_out() -> None:
    recent = Recent[str, int](10)
    recent.put("a", 1, size=10)
    recent.put("b", 2, size=11)
    assert (recent.get("a"), recent.get("b"), recent.nbytes) == (1, None, 10)


def test_a_new_value_takes_the_place_of_the_old_one() -> None:
    recent = Recent[str, int](10)
    recent.put("a", 1, size=8)
    recent.put("a", 2, size=6)
    assert (recent.get("a"), recent.nbytes) == (2, 6)
    recent.clear()
    assert (recent.get("a"), recent.nbytes) == (None, 0)


def test_many_threads_lose_no_bytes() -> None:
    recent = Recent[int, int](500)

    def work(seed: int) -> None:
        for step in range(2000):
            key = (seed * 7919 + step * 31) % 40
            if recent.get(key) is None:
                recent.put(key, key, size=1 + key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    held = [key for key in range(40) if recent.get(key) is not None]
    assert recent.nbytes == sum(1 + key for key in held) <= 500
