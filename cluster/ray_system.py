"""The whole system as Ray actors: starts them, gives them out behind the protocols, and ends them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ActorAlreadyExistsError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.buffer import BufferActor, RayReferenceStore
from actors.device_turns import DeviceTurns, OwnDevices, Turns
from actors.learner_group import RayLearner
from actors.learner_rank import LearnerRank
from actors.prometheus import PrometheusSink
from actors.reference import ReferenceSampler
from actors.reward import RewardWorker
from actors.reward_pool import RayRewardPool
from actors.rollout_pool import RayRolloutPool
from actors.waiting import within
from actors.weight_transfer.backends import with_backend
from actors.weight_transfer.failures import EnginesLostError
from cluster.doctor.ray_setup import token_obstacle
from cluster.engines import EngineActors, reserve_one
from cluster.planning.memory import colocation_obstacle, dtype_on_gpu
from cluster.planning.placement import Bundle
from cluster.planning.ray_placement import place_on_cluster
from cluster.planning.shapes import model_shape
from cluster.scaling import Scaler
from cluster.start import Start
from dphrl.config.loading import InputError
from dphrl.config.schema import Config
from dphrl.own_code import is_hidden_from_workers, worker_hook
from dphrl.processors import be_a_neighbour, waiting_variables, whole_cpus
from dphrl.protocols import OnGraded, Parts, WholeReference
from dphrl.tracking.log import ENVIRONMENT as LOG_ENVIRONMENT
from dphrl.tracking.sinks import Sink
from dphrl.types import Prompt

PROGRESS_INTERVAL_S = 0.5
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
        self._scaler: Scaler | None = None
        self._worker_groups: dict[Any, Any] = {}

    def __enter__(self) -> RaySystem:
        connect(self.config)
        try:
            bundles, self._group = place_on_cluster(self.config)
            self._with_gpus = any(bundle.num_gpus for bundle in bundles)
            self.config = with_backend(self.config, with_gpus=self._with_gpus)
            self._spawn_all(bundles)
        except BaseException:
            # The placement group ends with the connection that made it.
            ray.shutdown()
            raise
        return self

    def _spawn_all(self, bundles: Sequence[Bundle]) -> None:
        place: dict[str, list[Any]] = {}
        for i, bundle in enumerate(bundles):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=i)
            options = {"num_cpus": bundle.num_cpus, "num_gpus": bundle.num_gpus, "scheduling_strategy": strategy}
            place.setdefault(bundle.role, []).append(options)
        # Ray would show all GPUs of the node to an actor that has none.
        self._without_gpu = HIDDEN_GPUS if any(bundle.num_gpus for bundle in bundles) else {}
        self._learner_options = place["learner"]
        self._ranks = self._spawn_ranks()
        self._bundles = bundles
        self._check_shared_memory()
        mine = {place: bundle for place, bundle in enumerate(bundles) if bundle.role == "rollout"}
        devices = {bundle.index: self._shared_devices(bundle) for bundle in mine.values()}
        self._actors = EngineActors(self.config, self.model_dir, self._group, mine, devices)
        shared = [*self._actors.engines.values()] if any(devices.values()) else []
        self._turns = DeviceTurns(shared, self._ranks, self.config.sync.timeout_s) if shared else None
        self._workers = [self._spawn_worker(i, options) for i, options in enumerate(place["reward"])]
        self._num_workers = len(self._workers)  # that ever were
        self._buffer = self._spawn(BufferActor, "buffer", 0, {"num_cpus": 0} | self._without_gpu)()

    def __exit__(self, *exc_info: object) -> None:
        remove_placement_group(self._group)
        ray.shutdown()

    def _spawn_ranks(self) -> list[Any]:
        return [self._spawn_rank(i, options) for i, options in enumerate(self._learner_options)]

    def _spawn_rank(self, index: int, options: dict[str, Any]) -> Any:
        deadline = time.monotonic() + NAME_TIMEOUT_S
        while True:
            try:
                return self._spawn(LearnerRank, "learner", index, options | _rank_env())(self.config, index)
            except ActorAlreadyExistsError:  # the rank of before, until Ray has seen its end
                if time.monotonic() > deadline:
                    raise
                time.sleep(NAME_POLL_INTERVAL_S)

    def _renew_ranks(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks[:] = self._spawn_ranks()

    def _spawn(self, actor_class: Any, role: str, index: int, options: dict[str, Any]) -> Callable[..., Any]:
        """The actor's constructor, under the name by which Ray's dashboard and `ray list actors` show it."""
        return cast(
            Callable[..., Any], actor_class.options(name=f"{self.config.run_name}-{role}-{index}", **options).remote
        )

    def _shared_devices(self, engine: Bundle) -> Sequence[str] | None:
        """GPUs of the learner ranks beside which a colocated engine runs; None for one that has its own."""
        if not engine.shares_gpus_of:
            return None
        return [
            str(gpu) for ids in ray.get([self._ranks[i].gpu_ids.remote() for i in engine.shares_gpus_of]) for gpu in ids
        ]

    def _check_shared_memory(self) -> None:
        """Raises InputError, before anything is loaded, when an engine does not fit beside its learner rank."""
        shared = {rank for bundle in self._bundles for rank in bundle.shares_gpus_of}
        sizes = [size for size in ray.get([self._ranks[rank].gpu_bytes.remote() for rank in shared]) if size]
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
        turns: Turns = self._turns or OwnDevices()
        start = Start(
            self._actors.engines,
            self._actors.start,
            self._ranks,
            self._workers,
            self._renew_ranks,
            self.model_dir,
            self.config.learner.timeout_s,
            self._turns,
            on_ready,
        )
        facts = await start.run()
        learner, dtype = self.config.learner, str(facts["dtype"])
        layout = f"deepspeed, {learner.num_ranks} ranks, ZeRO-{learner.zero_stage}"
        if self.config.model.lora is not None:
            layout += f", {self.config.model.lora.layout}"
        rollouts = RayRolloutPool(self._actors.engines, self.config, self.probes, dtype, self._actors, turns)
        rewards = RayRewardPool(self._workers, self.config)
        self._pools = rollouts, rewards
        if self._scaler is not None:
            self._scaler.up(rollouts, rewards)
        if self.config.tracking.prometheus:
            on_ready(f"metrics for Prometheus: {_metrics_url()}")
        self._learner = RayLearner(self._ranks, dtype, layout, turns, facts.get("compute"))
        return Parts(self._learner, rollouts, rewards)

    @asynccontextmanager
    async def listen(self, folder: Path) -> AsyncIterator[None]:
        """See `protocols.System`."""
        self._scaler = Scaler(folder, self.config, self._actors, self)
        async with self._scaler.serving():
            yield
        self._scaler = None

    async def start_worker(self) -> Any:
        """One more reward worker, up, in a placement group of its own."""
        index = self._num_workers
        self._num_workers += 1
        bundle, group = await reserve_one(self.config, "reward", index, with_gpus=self._with_gpus)
        options = {"num_cpus": bundle.num_cpus, "num_gpus": bundle.num_gpus}
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        worker = self._spawn_worker(index, options | {"scheduling_strategy": strategy})
        self._workers.append(worker)
        self._worker_groups[worker] = group
        limit = self.config.learner.timeout_s
        await within(worker.ready.remote(), limit, "learner.timeout_s", f"reward worker {index} to start")
        return worker

    async def end_worker(self, worker: Any) -> None:
        """End a reward worker, and free what it held if its placement group is its own."""
        self._workers.remove(worker)
        ray.kill(worker)
        if (group := self._worker_groups.pop(worker, None)) is not None:
            remove_placement_group(group)

    def _spawn_worker(self, index: int, options: dict[str, Any]) -> Any:
        # Graders hold no state: Ray may start a dead one again, and the pool retries what it lost.
        hidden = {} if options["num_gpus"] else self._without_gpu
        spawn = self._spawn(RewardWorker, "reward", index, options | {"max_restarts": -1} | hidden)
        return spawn(self.config.reward)

    async def fill_reference(
        self, prompts: Sequence[Prompt], identity: Mapping[str, str], folder: Path, on_graded: OnGraded
    ) -> tuple[RayReferenceStore, dict[str, float]]:
        """Run the reference stage in its own actor, which ends when the buffer is filled.

        That actor goes on as long as one engine is left. Then others start here, and another actor goes on with what is
        on disk.
        """
        assert self._pools is not None, "the parts are up"
        rollouts, _ = self._pools
        for attempt in range(self.config.rollout.max_replacements + 1):
            # The stage samples and scores, and for both the devices are ready then.
            if self._turns is not None:
                await self._turns.decode()
            actors = (rollouts.engines, self._workers, self._ranks)
            options = {"num_cpus": 0} | self._without_gpu
            sampler = self._spawn(ReferenceSampler, "reference", attempt, options)(self.config, *actors)
            filling = sampler.fill.remote(prompts, identity, self._buffer, str(folder.absolute()))
            try:
                near_perfect, exploration, counts = await _watched(sampler, asyncio.ensure_future(filling), on_graded)
                break
            except EnginesLostError:
                if attempt == self.config.rollout.max_replacements:
                    raise
                await rollouts.refit(self._learner)
            finally:
                ray.kill(sampler)
        return RayReferenceStore(self._buffer, near_perfect, exploration), counts

    async def adopt_reference(self, buffer: WholeReference) -> RayReferenceStore:
        """Put a buffer read from disk into the buffer actor."""
        await self._buffer.put.remote(buffer)
        return RayReferenceStore(self._buffer, buffer.near_perfect, buffer.exploration)


async def _watched(sampler: Any, filling: asyncio.Future[Any], on_graded: OnGraded) -> Any:
    """What `filling` returns; `on_graded` hears how far it is."""
    while not filling.done():
        await asyncio.wait([filling], timeout=PROGRESS_INTERVAL_S)
        if not filling.done():
            on_graded(*await sampler.newly_graded.remote())
    result = filling.result()
    on_graded(*await sampler.newly_graded.remote())
    return result


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


def _rank_env() -> dict[str, Any]:
    return {"runtime_env": {"env_vars": waiting_variables()}}
