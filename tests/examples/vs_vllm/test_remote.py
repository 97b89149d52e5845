import sys
from pathlib import Path

import numpy as np
import pytest

from examples.vs_vllm.cases import Request
from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError
from examples.vs_vllm.remote import WORKER, VllmPeer, engine_settings, other_photos, worker_variables

FAKE_WORKER = """
import json, sys
for number, line in enumerate(sys.stdin):
    message = json.loads(line)
    if number == 0:
        reply = {"vllm": "0", "torch": "0", "threads": 1} if message["model"] else {"error": "no model"}
    elif message["ids"][0] == 60:
        break
    else:
        if message["logprobs"]:
            import numpy
            numpy.save(message["logprobs"], numpy.zeros(3, "float32"))
        reply = {"seconds": 2, "model_seconds": 1, "num_tokens": 8, "cached_tokens": 5, "encoder_runs": 1}
    print(json.dumps(reply), flush=True)
"""
COMMAND = [sys.executable, "-c", FAKE_WORKER]


def request(first: int = 9, vision_tokens: int = 4) -> Request:
    return Request((first,), (10,), Path("photo.npy"), vision_tokens)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_engine_settings_one_step_per_prompt() -> None:
    settings = engine_settings(Path("model"), "bfloat16", 4226)
    assert settings["max_num_batched_tokens"] == settings["max_model_len"] == 8192
    assert settings["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("room", "vision_tokens", "photos"), [(8192, 4096, 2), (2048, 1024, 2), (512, 1024, 1)]
)
def test_other_photos_exceed_the_cache(room: int, vision_tokens: int, photos: int) -> None:
    assert other_photos({"max_num_batched_tokens": room}, vision_tokens) == photos


def test_worker_variables_without_other_packages(environment: Environment) -> None:
    base = {"PATH": "/bin", "PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours/venv"}
    found = worker_variables(environment, [0, 1], base)
    assert found["PATH"] == "/bin"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert found["OMP_NUM_THREADS"] == "2"
    assert "VIRTUAL_ENV" not in found
    assert not any("/ours" in value for value in found.values())
    assert "LD_PRELOAD" not in found


def test_worker_variables_preload_openmp(environment: Environment) -> None:
    environment.openmp.parent.mkdir(parents=True)
    environment.openmp.touch()
    assert worker_variables(environment, [0], {})["LD_PRELOAD"] == str(environment.openmp)
    with_another = worker_variables(environment, [0], {"LD_PRELOAD": "/x.so"})["LD_PRELOAD"]
    assert with_another == f"{environment.openmp}:/x.so"


def test_worker_imports_nothing_of_this_project() -> None:
    assert "vlcache_fx" not in WORKER.read_text(encoding="utf-8")


def test_vllm_peer_ask(environment: Environment) -> None:
    with VllmPeer(environment, {"model": "x"}, [0], COMMAND) as peer:
        assert peer.facts["threads"] == 1
        answer = peer.ask(request())
        assert (answer.seconds, answer.model_seconds, answer.encoder_runs) == (2, 1, 1)
        assert (answer.num_tokens, answer.computed_tokens, answer.reuse) == (8, 3, "exact")
        assert peer.logprobs(request()).tolist() == np.zeros(3).tolist()


def test_vllm_peer_other_number_of_tokens(environment: Environment) -> None:
    with (
        VllmPeer(environment, {"model": "x"}, [0], COMMAND) as peer,
        pytest.raises(PeerError, match="counted 8 tokens in a prompt of 9"),
    ):
        peer.ask(request(vision_tokens=5))


def test_vllm_peer_load_error(environment: Environment) -> None:
    with pytest.raises(PeerError, match="no model"):
        VllmPeer(environment, {"model": ""}, [0], COMMAND)


def test_vllm_peer_ended_worker(environment: Environment) -> None:
    with VllmPeer(environment, {"model": "x"}, [0], COMMAND) as peer:
        with pytest.raises(PeerError, match=r"has stopped.*vllm\.log"):
            peer.ask(request(first=60))
        with pytest.raises(PeerError, match="has stopped"):
            peer.ask(request())


def test_vllm_peer_without_python(environment: Environment) -> None:
    with pytest.raises(PeerError, match="cannot start vLLM"):
        VllmPeer(environment, {}, [0])
