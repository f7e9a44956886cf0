"""What rlroute leans on inside Ray is where it was, and does what it did: no Ray is started here."""

import inspect

from rlroute.experiments.launch import ray_session


def test_the_method_of_ray_that_is_replaced_takes_what_the_replacement_hands_on(monkeypatch):
    """A new Ray that moves what is replaced of its inside must fail here, not in a sweep."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    assert list(inspect.signature(RayActorManager._actor_task_failed).parameters)[1:] == [
        "tracked_actor_task",
        "exception",
    ]
    seen = []
    monkeypatch.setattr(RayActorManager, "_actor_task_failed", lambda manager, task, error: seen.append(error))
    ray_session._make_tune_survive_want_of_memory()
    RayActorManager._actor_task_failed(None, None, OutOfMemoryError("a run"))
    RayActorManager._actor_task_failed(None, None, ValueError("another"))
    assert [type(error) for error in seen] == [RayActorError, ValueError]
    replaced = RayActorManager._actor_task_failed
    ray_session._make_tune_survive_want_of_memory()
    assert RayActorManager._actor_task_failed is replaced, "once is enough"


def test_ray_calls_the_method_that_is_replaced():
    from ray.air.execution._internal.actor_manager import RayActorManager

    callers = [
        name
        for name, function in inspect.getmembers(RayActorManager, inspect.isfunction)
        if "._actor_task_failed(" in inspect.getsource(function)
    ]
    assert callers, "whoever reports a failed task now, the replacement is not asked"
