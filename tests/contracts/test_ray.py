"""Ray, and Flower's simulation on it, take the options of flower_transport/on_ray.py and private_ray.py.

That they work together is seen in tests/simulations/test_ray_engine.py, which starts them.
"""

from __future__ import annotations

import inspect
from typing import Any

import core_training.foundation.environment  # noqa: F401  # isort: skip - before the libraries are imported
import pytest

from core_training.foundation.socket_paths import LONGEST_ADDRESS
from tests.contracts.leaning import leans, look_up

pytest.importorskip("ray")
FILE = "flower_transport/on_ray.py"
PRIVATE = "flower_transport/private_ray.py"
OPTIONS = {"address": "local", "include_dashboard": False, "log_to_driver": False, "_temp_dir": "/nowhere"}


@leans(FILE)
def test_a_simulation_takes_the_apps_the_number_of_sites_and_rays_options() -> None:
    run = look_up(FILE, "flwr.simulation:run_simulation")
    taken = inspect.signature(run).parameters
    assert {"server_app", "client_app", "num_supernodes", "backend_config"} <= taken.keys()


@leans(FILE)
def test_options_reach_ray_and_its_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another name they would be left out without a word: two cores an actor, and all of Ray's talk."""
    import ray

    given: dict[str, Any] = {}
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    backend = look_up(FILE, "flwr.server.superlink.fleet.vce.backend.raybackend:RayBackend")(
        {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": OPTIONS,
        }
    )
    assert backend.client_resources == {"num_cpus": 1, "num_gpus": 0.0}
    assert OPTIONS.items() <= given.items()


@leans(PRIVATE)
def test_ray_takes_these_options() -> None:
    """`_temp_dir` among those that have no name of their own: of these Ray refuses what it does not know."""
    import ray

    assert OPTIONS.keys() - {"_temp_dir"} <= inspect.signature(ray.init).parameters.keys()
    with pytest.raises(RuntimeError, match="_temp_folder"):
        ray.init(address="local", _temp_folder="/nowhere")


@leans(PRIVATE)
def test_a_session_has_no_longer_a_name_than_is_counted_on() -> None:
    validate = look_up(PRIVATE, "ray._private.utils:validate_socket_filepath")
    validate("x" * LONGEST_ADDRESS)
    with pytest.raises(OSError, match="length"):
        validate("x" * (LONGEST_ADDRESS + 5))


@leans(FILE)
def test_ray_takes_sigterm_by_a_function_that_can_be_kept_from_it() -> None:
    node, utils = look_up(FILE, "ray._private.node:Node"), look_up(FILE, "ray._private.utils")
    assert callable(utils.set_sigterm_handler)
    assert "ray._private.utils.set_sigterm_handler(" in inspect.getsource(node)


@leans("flower_transport/apps.py")
def test_a_node_is_told_which_of_the_partitions_it_is() -> None:
    assert look_up(FILE, "flwr.common.constant:PARTITION_ID_KEY") == "partition-id"


@leans("core_training/foundation/environment.py")
def test_ray_reports_no_usage() -> None:
    usage = look_up("core_training/foundation/environment.py", "ray._common.usage.usage_lib:usage_stats_enabled")
    assert usage() is False
