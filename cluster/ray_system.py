"""The whole system as Ray actors: starts them, gives them out behind the protocols, and ends them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, RayActorError

from actors.buffer import BufferActor, RayReferenceStore
from actors.device_turns import DeviceTurns
from actors.learner_group import RayLearner
from actors.learner_rank import LearnerRank
from actors.prometheus import PrometheusSink
from actors.reference import ReferenceSampler, run_stage
from actors.reward import RewardWorker
from actors.reward_pool import RayRewardPool
from actors.rollout_engine import RolloutEngine
from actors.rollout_pool import RayRolloutPool
from actors.vllm_settings import process_variables
from actors.waiting import Actor, within
from actors.watched import settled
from actors.weight_transfer.backends import with_backend
from cluster.doctor.ray_setup import token_obstacle
from cluster.planning.memory import colocation_obstacle, dtype_on_gpu
from cluster.planning.placement import Bundle
from cluster.planning.ray_placement import Places, place_on_cluster
from cluster.planning.shapes import model_shape
from cluster.start import Start
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.own_code import is_hidden_from_workers, worker_hook
from dphrl.processors import be_a_neighbour, waiting_variables, whole_cpus
from dphrl.protocols import OnGraded, Parts, WholeReference
from dphrl.tracking.log import ENVIRONMENT as LOG_ENVIRONMENT
from dphrl.tracking.sinks import Sink
from dphrl.types import Prompt

NAME_POLL_INTERVAL_S = 0.2
NAME_TIMEOUT_S = 60.0
HIDDEN_GPUS = {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
# Ray sets this variable in the driver of a submitted job.
JOB_CONFIG_ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class RaySystem:
    """Actors in one placement group. Use as a context manager: leaving it ends them and frees their resources."""

    def __init__(self, config: Config, model_dir: str, probes: Sequence[Prompt]) -> None:
        self.config, self.model_dir, self.probes = config, model_dir, probes
        self._pools: tuple[RayRolloutPool, RayRewardPool] | None = None

    def __enter__(self) -> RaySystem:
        connect(self.config)
        try:
            bundles, group = place_on_cluster(self.config)
            self._places = Places(bundles, group)
            self._with_gpus = any(bundle.num_gpus for bundle in bundles)
            self.config = with_backend(self.config, with_gpus=self._with_gpus)
            self._spawn_all(bundles)
        except BaseException:
            # The placement group ends with the connection that made it.
            ray.shutdown()
            raise
        return self

    def _spawn_all(self, bundles: Sequence[Bundle]) -> None:
        place = self._places.options
        # Ray would show all GPUs of the node to an actor that has none.
        self._without_gpu = HIDDEN_GPUS if any(bundle.num_gpus for bundle in bundles) else {}
        self._learner_options = place["learner"]
        self._ranks = self._spawn_ranks()
        self._bundles = bundles
        self._check_shared_memory()
        self._engine_options = place["rollout"]
        self._engine_devices = [self._shared_devices(bundle) for bundle in bundles if bundle.role == "rollout"]
        self._engines = [self._spawn_engine(i) for i in range(len(self._engine_options))]
        shared = any(self._engine_devices)
        self._turns = DeviceTurns(self._engines, self._ranks, self.config.sync.timeout_s) if shared else None
        # Graders hold no state: Ray may start a dead one again, and the pool retries what it lost.
        self._workers = [
            self._spawn(RewardWorker, "reward", i, o | {"max_restarts": -1} | hidden)(self.config.reward)
            for i, o in enumerate(place["reward"])
            for hidden in [{} if o["num_gpus"] else self._without_gpu]
        ]
        self._buffer = self._spawn_buffer()

    def _spawn_buffer(self) -> Any:
        return self._spawn_anew(BufferActor, "buffer", 0, {"num_cpus": 0} | self._without_gpu)()

    def __exit__(self, *exc_info: object) -> None:
        self._places.release()
        ray.shutdown()

    def _spawn_ranks(self) -> list[Any]:
        return [self._spawn_rank(i, options) for i, options in enumerate(self._learner_options)]

    def _spawn_rank(self, index: int, options: dict[str, Any]) -> Any:
        return self._spawn_anew(LearnerRank, "learner", index, options | _rank_env())(self.config, index)

    def _spawn_anew(self, *of_actor: Any) -> Callable[..., Any]:
        """As `_spawn`, where an actor of before may have the name until Ray has seen its end."""

        def start(*arguments: Any) -> Any:
            deadline = time.monotonic() + NAME_TIMEOUT_S
            while True:
                try:
                    return self._spawn(*of_actor)(*arguments)
                except ActorAlreadyExistsError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(NAME_POLL_INTERVAL_S)

        return start

    def _renew_ranks(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks[:] = self._spawn_ranks()

    async def restart_learner(self, on_ready: Callable[[str], None]) -> None:
        """See `protocols.System`. Raises RuntimeError or TimeoutError, which say what was waited for."""
        await asyncio.gather(*map(settled, self._ranks))
        for rank in self._ranks:
            ray.kill(rank)
        # These wait for Ray, and engines and graders go on meanwhile.
        await asyncio.to_thread(self._places.find_room, "learner", self.config, on_ready)
        await asyncio.to_thread(self._renew_ranks)
        await self._start_of(on_ready, engines=(), workers=()).run()
        self._learning.begin_anew()

    def _spawn_engine(self, index: int) -> Any:
        options = self._engine_options[index] | _engine_env(self.config)
        spawn = self._spawn(RolloutEngine, "rollout", index, options)
        return spawn(self.config, self.model_dir, index, self._engine_devices[index])

    async def restart_engine(self, index: int) -> Any:
        """Kill an engine, dead or alive, and start another in its bundle; returns the new actor once it is up.

        It stands in the place of the old one in the list that the pool was given, and is stale until it is refit.
        Raises TimeoutError after learner.timeout_s.
        """
        limit, what = self.config.learner.timeout_s, f"rollout engine {index} to start again"
        ray.kill(self._engines[index])
        self._engines[index] = await within(self._spawn_when_free(index), limit, "learner.timeout_s", what)
        await within(self._engines[index].ready.remote(), limit, "learner.timeout_s", what)
        return self._engines[index]

    async def _spawn_when_free(self, index: int) -> Any:
        # The name stays taken, and the bundle in use, until Ray has seen the end of the old process.
        while True:
            try:
                return self._spawn_engine(index)
            except ActorAlreadyExistsError:
                await asyncio.sleep(NAME_POLL_INTERVAL_S)

    def _spawn(self, actor_class: Any, role: str, index: int, options: dict[str, Any]) -> Callable[..., Any]:
        """The actor's constructor, under the name by which Ray's dashboard and `ray list actors` show it."""
        return cast(
            Callable[..., Any], actor_class.options(name=f"{self.config.run_name}-{role}-{index}", **options).remote
        )

    def _shared_devices(self, engine: Bundle) -> Sequence[str] | None:
        """GPUs of the learner ranks beside which a colocated engine runs; None for one that has its own."""
        if not engine.shares_gpus_of:
            return None
        found = self._ask_ranks(engine.shares_gpus_of, lambda rank: rank.gpu_ids.remote())
        return [str(gpu) for ids in found for gpu in ids]

    def _ask_ranks(self, places: Iterable[int], call: Callable[[Actor], Any]) -> list[Any]:
        """What these ranks answer as soon as they are there. Raises RuntimeError when one is not within
        learner.timeout_s."""
        limit, places = self.config.learner.timeout_s, sorted(places)
        try:
            return cast(list[Any], ray.get([call(self._ranks[i]) for i in places], timeout=limit))
        except GetTimeoutError:
            who = ", ".join(map(str, places))
            raise RuntimeError(f"waited {limit:g} s (learner.timeout_s) for learner ranks {who} to start") from None

    def _check_shared_memory(self) -> None:
        """Raises InputError, before anything is loaded, when an engine does not fit beside its learner rank."""
        shared = {rank for bundle in self._bundles for rank in bundle.shares_gpus_of}
        sizes = [size for size in self._ask_ranks(shared, lambda rank: rank.gpu_bytes.remote()) if size]
        shape = model_shape(self.model_dir, trust_remote_code=self.config.model.trust_remote_code) if sizes else None
        if shape and (obstacle := colocation_obstacle(self.config, shape, dtype_on_gpu(self.config), min(sizes))):
            raise InputError(obstacle)

    def renew_learner(self, config: Config) -> bool:
        """Continue with another configuration: fresh learner ranks, the same running engines and reward workers.

        Returns False, and does nothing, when the configurations differ in what engines and workers were started with.
        """
        config = with_backend(config, with_gpus=self._with_gpus)
        if _engine_settings(config) != _engine_settings(self.config):
            return False
        self.config = config
        self._renew_ranks()
        self._check_shared_memory()
        return True

    def sinks(self) -> list[Sink]:
        """Sinks for the run's metrics that it only has on Ray."""
        return [PrometheusSink(self.config.run_name, self._live_metrics)] if self.config.tracking.prometheus else []

    def _live_metrics(self) -> dict[str, float]:
        """The pools' queue depths at this moment, from any thread; none before `start`."""
        return {name: value for pool in self._pools or () for name, value in pool.live_metrics().items()}

    async def start(self, on_ready: Callable[[str], None]) -> Parts:
        """Wait until every actor is up, and report each. Returns the parts; the engines are not refit yet."""
        facts = await self._start_of(on_ready, self._engines, self._workers).run()
        learner, dtype = self.config.learner, str(facts["dtype"])
        layout = f"deepspeed, {learner.num_ranks} ranks, ZeRO-{learner.zero_stage}"
        if self.config.model.lora is not None:
            layout += f", {self.config.model.lora.layout}"
        rollouts = RayRolloutPool(self._engines, self.config, self.probes, dtype, self.restart_engine, self._turns)
        rewards = RayRewardPool(self._workers, self.config)
        self._pools = rollouts, rewards
        if self.config.tracking.prometheus:
            on_ready(f"metrics for Prometheus: {_metrics_url()}")
        timeout_s = self.config.learner.timeout_s
        self._learning = RayLearner(self._ranks, dtype, layout, self._turns, facts.get("compute"), timeout_s)
        return Parts(self._learning, rollouts, rewards)

    def _start_of(self, on_ready: Callable[[str], None], engines: Sequence[Actor], workers: Sequence[Actor]) -> Start:
        timeout_s = self.config.learner.timeout_s
        return Start(engines, self._ranks, workers, self._renew_ranks, self.model_dir, timeout_s, self._turns, on_ready)

    async def fill_reference(
        self, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: Path, on_graded: OnGraded
    ) -> tuple[RayReferenceStore, dict[str, float]]:
        """Run the reference stage in its own actor, which ends when the buffer is filled."""
        # The stage samples and scores, and for both the devices are ready then.
        if self._turns is not None:
            await self._turns.decode()
        options = {"num_cpus": 0} | self._without_gpu
        near_perfect, exploration, counts = await run_stage(
            lambda: self._spawn_anew(ReferenceSampler, "reference", 0, options)(
                self.config, self._engines, self._workers, self._ranks
            ),
            lambda sampler: sampler.fill.remote(prompts, identity, str(folder.absolute())),
            on_graded,
            self.config.rollout.timeout_s + self.config.learner.timeout_s,
        )
        try:
            await self._load_buffer(folder)
        except RayActorError:  # it held nothing yet
            await self._revive_buffer(folder)
        return self._store(near_perfect, exploration, folder), counts

    async def adopt_reference(self, buffer: WholeReference, folder: Path) -> RayReferenceStore:
        """Put a buffer read from disk into the buffer actor."""
        what = "the buffer actor to take over the reference buffer"
        limit = self.config.learner.timeout_s
        await within(self._buffer.put.remote(buffer), limit, "learner.timeout_s", what)
        return self._store(buffer.near_perfect, buffer.exploration, folder)

    def _store(self, near_perfect: frozenset[str], exploration: frozenset[str], folder: Path) -> RayReferenceStore:
        timeout_s = self.config.learner.timeout_s
        return RayReferenceStore(
            self._buffer, near_perfect, exploration, lambda: self._revive_buffer(folder), timeout_s
        )

    async def _revive_buffer(self, folder: Path) -> Any:
        """A new buffer actor in place of the present one, with the buffer that is in `folder`."""
        ray.kill(self._buffer)
        self._buffer = await asyncio.to_thread(self._spawn_buffer)
        await self._load_buffer(folder)
        return self._buffer

    async def _load_buffer(self, folder: Path) -> None:
        loading = self._buffer.load.remote(str(folder.absolute()))
        await within(loading, self.config.learner.timeout_s, "learner.timeout_s", f"the buffer actor to read {folder}")


def _metrics_url() -> str:
    """Where Ray's agent on this node exports the metrics of this process."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _engine_settings(config: Config) -> list[Any]:
    """Everything that actors other than the learner were made from, or that decides how many there are."""
    learner = config.learner
    return [
        *(config.model, config.rollout, config.reward, config.sync, config.cluster, config.deterministic),
        *(config.max_sequence_tokens, learner.num_ranks, learner.cpus_per_rank, learner.accelerator),
    ]


def connect(config: Config) -> None:
    """Join the cluster that the config or RAY_ADDRESS names, else start one on this machine.

    Raises InputError for the URL of a dashboard, and where a Ray started here would have no token.
    """
    debug = bool(os.environ.get("DPHRL_DEBUG"))
    address = config.cluster.address if config.cluster.address != "auto" else os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    runtime_env: dict[str, Any] = {}
    # Set only where it is needed: with a runtime environment, Ray cannot use the workers that it starts beforehand.
    if is_hidden_from_workers():
        runtime_env["worker_process_setup_hook"] = worker_hook()
    log_format = os.environ.get(LOG_ENVIRONMENT)
    # The actors of a submitted job have its variables anyway, and Ray refuses a variable that it is told twice.
    if log_format and JOB_CONFIG_ENVIRONMENT not in os.environ:
        runtime_env["env_vars"] = {LOG_ENVIRONMENT: log_format}
    if runtime_env:
        options["runtime_env"] = runtime_env
    if address and address.startswith(("http://", "https://")):
        raise InputError(
            f"{address}: is a dashboard, to which jobs are sent (`dphrl submit`); for cluster.address and RAY_ADDRESS "
            "give HOST:6379, or unset them to run on this machine"
        )
    if address:
        ray.init(address=address, **options)
        return
    if obstacle := token_obstacle():
        raise InputError(obstacle)
    be_a_neighbour()
    num_cpus = config.cluster.num_cpus or whole_cpus()
    store_gib = config.cluster.object_store_gib
    store_bytes = None if store_gib is None else round(store_gib * 2**30)
    ray.init(address="local", num_cpus=num_cpus, object_store_memory=store_bytes, include_dashboard=False, **options)


def _engine_env(config: Config) -> dict[str, Any]:
    return {"runtime_env": {"env_vars": process_variables(config)}}


def _rank_env() -> dict[str, Any]:
    return {"runtime_env": {"env_vars": waiting_variables()}}
