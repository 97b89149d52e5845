import pytest
import torch

from vlcache_fx.bench.device import device_name, dtype_name, resolve_device, resolve_dtype, synchronizer
from vlcache_fx.errors import OptionError

CPU = torch.device("cpu")


def test_auto_is_what_this_machine_has() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto", CPU, 8, 8) in (torch.float32, torch.bfloat16)
    assert resolve_dtype("auto", torch.device("cuda"), 8, 8) == torch.bfloat16


def test_names_are_taken() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_dtype("float16", CPU, 8, 8) == torch.float16
    assert dtype_name(torch.float16) == "float16"
    assert device_name(CPU, "a processor") == "a processor"
    synchronizer(CPU)()


@pytest.mark.parametrize("name", ["tpu", "meta", "mps", ""])
def test_other_devices_are_refused_with_the_valid_ones(name: str) -> None:
    with pytest.raises(OptionError, match=r"device='.*' is not valid: it must be 'auto', 'cpu', 'cuda'"):
        resolve_device(name)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match="device='cuda:99' is not there: torch sees"):
        resolve_device("cuda:99")


def test_other_dtypes_are_refused_with_the_valid_ones() -> None:
    with pytest.raises(
        OptionError, match="dtype='int8' is not valid: it must be 'auto', 'float32', 'bfloat16'"
    ):
        resolve_dtype("int8", CPU, 8, 8)
