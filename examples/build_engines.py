"""Build TensorRT engines of the reference model; ``tensorrt_rtx`` needs no GPU."""

import sys
import tempfile
from pathlib import Path

import vlcache_fx
from vlcache_fx.testing import reference_vlm


def main(directory: Path, package: str | None = None) -> list[str]:
    """Build into ``directory``; return one line per engine."""
    model, processor = reference_vlm.load_model(), reference_vlm.load_processor()
    example = dict(reference_vlm.prepare(processor, reference_vlm.make_questions(count=1)))
    report = vlcache_fx.export(
        model,
        example,
        directory,
        format="tensorrt",
        engine=vlcache_fx.EngineOptions(
            package=package, compute_capabilities=("sm86", "sm89"), sizes={"tokens": (2, 256, 2048)}
        ),
    )
    return [
        f"{name}: {built['size_bytes'] / 1e6:.1f} MB in {built['build_seconds']:.1f} s"
        for name, built in report.engines.items()
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "engines"
        print("\n".join(main(target)))
