"""What release_check.py runs in the environment with the installed wheel."""

import re
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any


def entry_point() -> str:
    """Compile with ``backend="vlcache"``, without an import of the package."""
    import torch

    assert not any(name.startswith("vlcache_fx") for name in sys.modules)
    model, values = torch.nn.Linear(4, 4), torch.ones(1, 4)
    compiled = torch.compile(model, backend="vlcache", options={"lowering": "eager"})
    with torch.no_grad():
        assert torch.equal(compiled(values), model(values))  # no attention: it runs unmodified
    package = sys.modules["vlcache_fx"]
    assert Path(str(package.__file__)).is_relative_to(sysconfig.get_path("purelib")), package.__file__
    return f"torch.compile(model, backend='vlcache') finds {package.__name__} {package.__version__} by itself"


def get_started() -> str:
    """Run the code of the manual's first page, with eager kernels: compiling takes a minute."""
    import vlcache_fx

    compile_model: Any = vlcache_fx.compile
    vlcache_fx.compile = partial(compile_model, lowering="eager", dynamic=True)
    page = Path("get-started.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    code = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for block in code:
        exec(compile(block, "get-started.md", "exec"), names)
    assert names["report"].mode == "warm"
    return f"docs/get-started.md: {len(code)} blocks of code ran"


if __name__ == "__main__":
    # The page prints, too; the last line is the result.
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        line = {"entry_point": entry_point, "get_started": get_started}[sys.argv[1]]()
    print(line)
