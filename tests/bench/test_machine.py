import torch

from vlcache_fx.bench.machine import describe_machine, faster_dtype, machine_line


def test_faster_dtype() -> None:
    assert faster_dtype(16, 16) in (torch.float32, torch.bfloat16)


def test_describe_machine() -> None:
    machine = describe_machine()
    assert machine.processor
    assert machine.cores >= 1
    assert machine_line(machine).startswith(f"{machine.processor}, {machine.cores} cores")
