"""What rlroute leans on inside Ray is where it was, and does what it did: no Ray is started here."""

import inspect
import os
import tempfile

import pytest

from rlroute.errors import StoreError
from rlroute.experiments.launch import ray_session
from rlroute.experiments.launch.jobs import Launch
from rlroute.experiments.launch.supervisor import require_reach


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


def test_a_place_where_no_private_folder_can_be_made_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # the session writes Ray's settings there
    monkeypatch.setattr(ray_session, "temporary_folder", lambda: str(tmp_path / "gone"))
    said = f"cannot lie in {tmp_path}/gone: No such file.*want a TMPDIR .* of at most 14 characters"
    with pytest.raises(StoreError, match=said), ray_session.session(Launch()):
        pass


def test_a_machine_without_any_temporary_folder_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", lambda: os.stat("/no such folder"))
    with pytest.raises(StoreError, match="no temporary folder: No such file"):
        require_reach(Launch())
