"""``vlcache serve``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import examples, print_json, stdout_for_json
from vlcache_fx.cli.progress import showing_progress
from vlcache_fx.cli.values import bytes_of
from vlcache_fx.errors import OptionError

EPILOG = examples(
    "vlcache serve reference --port 8000",
    "vlcache serve /models/qwen --capacity 8GiB --api-key-file keys.txt",
    "vlcache serve /models/qwen --store memory:// --store file:///cache",
)

NOTHING_REUSED = {"min_span_tokens": 1 << 30, "capacity_bytes": 1}
"""No span is that long, and no features of an encoder fit."""


def serve(
    model: Annotated[
        list[str],
        typer.Argument(help="reference, photo, hybrid, a folder of a transformers model, or NAME=FOLDER"),
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 lets the system choose")] = 8000,
    store: Annotated[
        list[str] | None, typer.Option(help="store URL, fastest first (default: memory://)")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="share of a picture's rows to recompute")] = None,
    policy: Annotated[str | None, typer.Option(help="which rows to recompute; see vlcache policies")] = None,
    profile: Annotated[Path | None, typer.Option(help="profile of vlcache calibrate")] = None,
    capacity: Annotated[str | None, typer.Option(help="bound of each tier, such as 4GiB")] = None,
    salt: Annotated[str | None, typer.Option(help="requests of other salts share no donors")] = None,
    no_reuse: Annotated[
        bool, typer.Option("--no-reuse", help="compute every request in full, to compare with")
    ] = False,
    shadow: Annotated[float | None, typer.Option(help="share of requests computed in full as well")] = None,
    donor_contexts: Annotated[
        int | None, typer.Option(help="contexts from which a picture's donor learns")
    ] = None,
    donor_rank: Annotated[
        int | None, typer.Option(help="rank of the differences between them that it keeps; 0 for none")
    ] = None,
    exact_returns: Annotated[
        int | None, typer.Option(help="first returns of a picture that are computed in full")
    ] = None,
    idle_refinement: Annotated[
        float | None, typer.Option(help="share of idle time in which donors learn")
    ] = None,
    lowering: Annotated[str, typer.Option(help="inductor, eager, tensorrt")] = "inductor",
    device: Annotated[str, typer.Option(help="device of the models")] = "auto",
    dtype: Annotated[str, typer.Option(help="dtype of models from folders")] = "auto",
    batch_size: Annotated[int, typer.Option(help="requests that run together; 1 turns batching off")] = 8,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="tokens that they compute together (default: 2048 on a CPU, 8192 on a GPU)"),
    ] = None,
    batch_wait_ms: Annotated[float, typer.Option(help="how long a request waits for others")] = 0.0,
    max_waiting: Annotated[int, typer.Option(help="requests that wait; more are refused (429)")] = 64,
    max_body: Annotated[str, typer.Option(help="largest request")] = "64MiB",
    max_images: Annotated[int, typer.Option(help="pictures of a request")] = 16,
    max_image: Annotated[str, typer.Option(help="largest picture, as it is sent")] = "20MiB",
    max_image_pixels: Annotated[int, typer.Option(help="largest picture, decoded")] = 50_000_000,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="longest prompt (default: the model's context)")
    ] = None,
    max_output_tokens: Annotated[int, typer.Option(help="longest answer")] = 4096,
    allow_media_host: Annotated[
        list[str] | None, typer.Option(help="host whose pictures requests may name")
    ] = None,
    allow_media_folder: Annotated[
        list[Path] | None, typer.Option(help="folder whose pictures requests may name, as file:// URLs")
    ] = None,
    media_timeout: Annotated[float, typer.Option(help="seconds for loading a remote picture")] = 10.0,
    api_key_file: Annotated[Path | None, typer.Option(help="file of the valid API keys, one a line")] = None,
    salt_from_api_key: Annotated[
        bool, typer.Option("--salt-from-api-key", help="each API key is a tenant of its own")
    ] = False,
    shutdown_timeout: Annotated[float, typer.Option(help="seconds for running requests at the end")] = 30.0,
    artifacts: Annotated[
        Path | None, typer.Option(help="folder of vlcache warm-up, whose programs are not compiled again")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="copies of the server, on Ray Serve (default: none, and no Ray)")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="start more replicas as load grows, up to so many")
    ] = None,
    cpus_per_replica: Annotated[float, typer.Option(help="cores that Ray sets aside for a replica")] = 1.0,
    gpus_per_replica: Annotated[
        float | None, typer.Option(help="GPUs for a replica, or a share (default: all GPUs, divided)")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="torch's threads in a replica (default: the cores, divided)")
    ] = None,
    imbalance: Annotated[
        int | None,
        typer.Option(
            help="requests by which a replica with the picture may be busier (default: half a batch)"
        ),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="a Ray cluster that runs, or auto (default: one on this machine)")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object to stdout when the server is ready")
    ] = False,
) -> None:
    """Serve models with the OpenAI API: chat completions and responses, with pictures."""
    json_to = sys.stdout if as_json else None
    with readable_errors(), stdout_for_json(as_json):
        # deferred: importing torch takes a second
        from vlcache_fx.serve.extra import require_serve

        require_serve()
        from vlcache_fx.serve.options import ServeOptions

        engine = {
            "store": tuple(store) if store else None,
            "budget": budget,
            "policy": policy,
            "profile": profile,
            "capacity_bytes": None if capacity is None else bytes_of("--capacity", capacity),
            "salt": salt,
            "shadow": shadow,
            "donor_contexts": donor_contexts,
            "donor_rank": donor_rank,
            "exact_returns": exact_returns,
            "idle_refinement": idle_refinement,
            "lowering": lowering,
        }
        if no_reuse:
            if store or capacity:
                raise OptionError("--no-reuse stores nothing: pass it without --store and --capacity")
            engine |= NOTHING_REUSED
        options = ServeOptions(
            models=tuple(model),
            host=host,
            port=port,
            engine={name: value for name, value in engine.items() if value is not None},
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            batch_wait_ms=batch_wait_ms,
            max_waiting=max_waiting,
            max_body_bytes=bytes_of("--max-body", max_body),
            max_images=max_images,
            max_image_bytes=bytes_of("--max-image", max_image),
            max_image_pixels=max_image_pixels,
            max_prompt_tokens=max_prompt_tokens,
            max_output_tokens=max_output_tokens,
            media_hosts=tuple(allow_media_host or ()),
            media_folders=tuple(allow_media_folder or ()),
            media_timeout_s=media_timeout,
            api_keys=_keys_in(api_key_file),
            salt_from_api_key=salt_from_api_key,
            shutdown_timeout_s=shutdown_timeout,
            artifacts=artifacts,
        )
        if replicas is None:
            if max_replicas is not None or ray_address is not None:
                raise OptionError("--max-replicas and --ray-address need --replicas")
            _run(options, json_to)
            return
        from vlcache_fx.serve.cluster.options import ClusterOptions
        from vlcache_fx.serve.extra import require_ray

        require_ray()
        cluster = ClusterOptions(
            replicas, max_replicas, cpus_per_replica, gpus_per_replica, threads, imbalance, ray_address
        )
        _run_cluster(options, cluster, json_to)


def _run(options: Any, json_to: TextIO | None) -> None:
    from vlcache_fx.serve.server import Server

    begin = time.perf_counter()
    progress = ExitStack()

    def ready(url: str) -> None:
        progress.close()
        _say_ready(server.service.models.sources, url, begin, json_to)

    server = Server(options, ready)
    typer.echo(f"listening at {server.url}; loading and compiling", err=True)
    with progress:
        progress.enter_context(showing_progress("starting"))
        server.run()


def _run_cluster(options: Any, cluster: Any, json_to: TextIO | None) -> None:
    from vlcache_fx.serve.cluster.run import Cluster

    begin = time.perf_counter()

    def ready(url: str) -> None:
        _say_ready(options.models, url, begin, json_to, cluster.replicas)

    running = Cluster(options, cluster, ready)
    many = "replica" if cluster.replicas == 1 else "replicas"
    typer.echo(f"starting {cluster.replicas} {many} behind {running.url}", err=True)
    running.run()


def _say_ready(
    models: Iterable[str], url: str, begin: float, json_to: TextIO | None, replicas: int | None = None
) -> None:
    seconds, names = time.perf_counter() - begin, list(models)
    if json_to is not None:
        found = {"url": f"{url}/v1", "models": names, "replicas": replicas, "seconds": round(seconds, 3)}
        print_json(found, indent=None, file=json_to)
        return
    more = "" if replicas is None else f", replicas: {replicas}"
    typer.echo(f"serving {', '.join(names)} at {url}/v1{more} (ready after {seconds:.1f} s)")


def _keys_in(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the API keys in {str(path)!r} cannot be read: {error}") from error
    if not keys:
        raise OptionError(f"the file {str(path)!r} has no API key: write one a line")
    return keys
