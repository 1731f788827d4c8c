"""The live half of a job: one detached actor, named `job-<request_id>`, from launch to final state.

It answers status queries, passes on the wish to stop, hands out credentials to the run's workers (and to nobody else:
they appear in no config, environment or plan), and writes progress through to the store.
"""

from __future__ import annotations

import asyncio
import time
from functools import cached_property
from typing import Any

import structlog

from serve_app import logs
from serve_app.lifecycle import Phase, Status
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.storage import run_uri, storage_credentials
from serve_app.store.jobs import Job, JobStore, StaleAttempt
from train_loop.data.sources import Credentials
from train_loop.errors import Stopped, UserError
from train_loop.launch import ActorMonitor, Keys, Placement, RunFiles, launch
from train_loop.spec import JobSpec

log = structlog.get_logger()
FLUSH_S = 1.0


def actor_name(request_id: str) -> str:
    """The name under which Ray knows a job's actor."""
    return f"job-{request_id}"


class JobActor:
    """One attempt at one job. Every method is async: status never waits for training, which runs in a thread."""

    def __init__(self, request_id: str, attempt: int) -> None:
        logs.configure()
        self.settings = Settings.load()
        self.store = JobStore.open(self.settings.database_url)
        self.attempt = attempt
        job = self.store.get(request_id)
        if job is None:
            raise LookupError(f"no job {request_id}")
        self.job: Job = job
        self.spec = JobSpec.model_validate(job.spec)
        self.live: dict[str, Any] = {"phase": str(Phase.PREPARING_DATA)}
        self.points: list[dict[str, Any]] = []
        self.dirty = False
        self.redactor = logs.Redactor()
        self.stop = job.cancel_requested
        self.user_error: UserError | None = None
        self.finished = asyncio.Event()
        self.log = log.bind(request_id=request_id, attempt=attempt)

    # --- asked by the ingress ---

    async def status(self) -> dict[str, Any]:
        """The fields that change while a job runs."""
        return dict(self.live)

    async def cancel(self) -> None:
        """Ask the run to stop at its next step boundary."""
        self.stop = True

    # --- asked and told by the run (train_loop.context.Monitor) ---

    async def keys(self) -> Keys:
        """The run's credentials, opened afresh from the vault each time."""
        return await asyncio.to_thread(self._keys)

    async def on_phase(self, name: str) -> None:
        self.live["phase"] = name
        self.dirty = True

    async def on_event(self, kind: str, message: str) -> None:
        await asyncio.to_thread(self.store.journal.add_event, self.job.request_id, kind, message)

    async def on_progress(self, progress: dict[str, Any]) -> None:
        self.points += progress.pop("points", [])
        self.live.update(progress)
        self.dirty = True

    async def on_log(self, rank: int, lines: list[tuple[float, str]]) -> None:
        """Keep a worker's log lines, without any secret of the run."""
        clean = [(time_, self.redactor(line)) for time_, line in lines]
        await asyncio.to_thread(self.store.journal.add_log, self.job.request_id, self.attempt, rank, clean)

    async def stop_requested(self) -> bool:
        return self.stop

    async def on_failure(self, error: UserError) -> None:
        self.user_error = self.user_error or error

    async def failure(self) -> UserError | None:
        return self.user_error

    # --- the run ---

    async def run(self) -> None:
        """Run the attempt to its end and write how it ended. Called once, by the dispatcher, which doesn't wait."""
        flusher = asyncio.create_task(self._flush())
        try:
            await asyncio.to_thread(self._run)
        except StaleAttempt:
            self.log.info("a newer attempt has taken over")
        finally:
            self.finished.set()
            await flusher

    def _keys(self) -> Keys:
        settings, details = self.settings, self.spec.dataset_details
        dataset = None
        if details.secret_id is not None:
            dataset = Credentials.from_secret(self._vault.reveal(self.job.org_id, details.secret_id))
        keys = Keys(dataset=dataset, storage=storage_credentials(settings))
        for found in (keys.dataset, keys.storage):
            if found is not None:
                self.redactor.hide(found.access_key_id, found.secret_access_key, found.session_token)
        return keys

    @cached_property
    def _vault(self) -> SecretVault:
        # Made once: it keeps a role's temporary keys until shortly before they expire.
        return SecretVault.from_settings(self.store, self.settings)

    def _run(self) -> None:
        request_id = self.job.request_id
        me = ActorMonitor(actor_name(request_id), self.settings.ray_namespace)
        profile = self.settings.profiles[self.spec.infra_config.gpu_type]
        files = RunFiles(
            storage_uri=run_uri(self.settings, self.job.org_id, request_id),
            model_mirror=str(self.settings.model_mirror),
            keys=me.keys,
        )
        placement = Placement(
            resources=profile.resources,
            use_gpu=profile.use_gpu,
            accelerator_type=profile.accelerator_type,
            data_cpus=self.settings.data_cpus,
        )
        if self.settings.embedded:
            self.store.journal.add_event(
                request_id,
                "placement",
                f"embedded mode: {self.spec.infra_config.gpu_type} x {self.spec.infra_config.gpu_count} x "
                f"{self.spec.infra_config.node_count} runs as {self.spec.infra_config.num_workers} CPU workers on this machine",
            )
        try:
            manifest = launch(self.spec, request_id, files, placement, me)
        except Stopped:
            self._finish(Status.CANCELED, message="Canceled on request; what was trained so far is kept as a checkpoint.")
        except UserError as error:
            self._finish(Status.FAILED, message=error.message, error_code=error.code, error_message=error.message)
        except Exception as error:
            self.log.exception("the run failed")
            text = f"The run failed ({type(error).__name__}): {_first_line(error)}"
            self._finish(Status.FAILED, message=text, error_code="internal_error", error_message=text)
        else:
            self.live |= {"step": manifest["steps"], "progress": 1.0, "eta_s": 0.0, "metrics": manifest["metrics"]}
            self._finish(
                Status.COMPLETED,
                message=f"Adapter saved: {len(manifest['adapter_files'])} files at {manifest['adapter_uri']}.",
                output_model_path=manifest["adapter_uri"],
            )

    def _finish(self, status: Status, *, message: str, **fields: Any) -> None:
        if status is Status.COMPLETED:
            self.live["phase"] = str(Phase.DONE)
        self._report()
        self.store.finish(self.job.request_id, self.attempt, status, message=message, **fields)
        self.live |= {"status": str(status), "message": message, **fields}

    def _report(self) -> None:
        points, self.points = self.points, []
        self.store.journal.add_points(self.job.request_id, points)
        fields = {k: v for k, v in self.live.items() if k in REPORTED}
        job = self.store.report(self.job.request_id, self.attempt, **fields)
        self.stop = self.stop or job.cancel_requested

    async def _flush(self) -> None:
        """Write progress and heartbeat through to the store, about once a second."""
        beat_at = 0.0
        while not self.finished.is_set():
            now = time.monotonic()
            if self.dirty or now - beat_at > 5 * FLUSH_S:
                self.dirty, beat_at = False, now
                try:
                    await asyncio.to_thread(self._report)
                except StaleAttempt:
                    self.stop = True
                    return
            try:
                await asyncio.wait_for(self.finished.wait(), FLUSH_S)
            except TimeoutError:
                continue


REPORTED = frozenset({"phase", "step", "total_steps", "epoch", "eta_s", "progress", "metrics"})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
