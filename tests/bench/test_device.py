import pytest
import torch

from vlcache_fx.bench.device import device_name, dtype_name, resolve_device, resolve_dtype, synchronizer
from vlcache_fx.errors import OptionError

CPU = torch.device("cpu")


def test_resolve_device_auto() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto", CPU, 8, 8) in (torch.float32, torch.bfloat16)
    assert resolve_dtype("auto", torch.device("cuda"), 8, 8) == torch.bfloat16


def test_resolve_device_and_dtype_names() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_dtype("float16", CPU, 8, 8) == torch.float16
    assert dtype_name(torch.float16) == "float16"
    assert device_name(CPU, "a processor") == "a processor"
    synchronizer(CPU)()


@pytest.mark.parametrize("name", ["tpu", "meta", "mps", ""])
def test_resolve_device_unknown_type(name: str) -> None:
    with pytest.raises(OptionError, match=r"device='.*' is not valid: it must be 'auto', 'cpu', 'cuda'"):
        resolve_device(name)


def test_resolve_device_missing_gpu() -> None:
    with pytest.raises(OptionError, match="device='cuda:99' does not exist: torch finds"):
        resolve_device("cuda:99")


def test_resolve_dtype_unknown() -> None:
    with pytest.raises(
        OptionError, match="dtype='int8' is not valid: it must be 'auto', 'float32', 'bfloat16'"
    ):
        resolve_dtype("int8", CPU, 8, 8)
